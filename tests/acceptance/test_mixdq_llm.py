"""Bit allocation on a language model that was really trained, as a user would run it, offline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import compress
import pytest
import torch
from compress.calibration.recording import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.evaluation.by_task import evaluator_for
from compress.evaluation.size import size_metrics
from compress.exporters.verify import verify_folder
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

PARTS = {
    "model": "builtin:stories",
    "calibration": {"samples": 12, "length": 256},
    "evaluate": {"fidelity": {"samples": 24}, "layers": False},
    "export": {"path": "out/unused"},
}


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    """What 4 bits for every layer give: metrics of asymmetric grids (False) and of symmetric ones (True)."""
    place = tmp_path_factory.mktemp("uniform")
    found = {}
    for symmetric in (False, True):
        stages = [{"rtn": {"weight_bits": 4, "weight_symmetric": symmetric}}]
        recipe = load_recipe({**PARTS, "stages": stages}).recipe
        model = open_model(recipe.model, progress=SilentProgress())
        evaluator = evaluator_for(model, recipe.evaluate, recipe.seed, recipe.calibration)
        reference = evaluator.reference(model, place / "references", SilentProgress())
        calibration = record(
            model, recipe.calibration, seed=0, cache=place / "calibration", progress=SilentProgress()
        )
        for name in ("work", "shared"):
            (place / name).mkdir(exist_ok=True)
        registry.get("rtn").apply(
            model, recipe.stages[0].settings, calibration, Workspace(place / "work", place / "shared"),
            SilentProgress(),
        )  # fmt: skip
        metrics = evaluator.compare(model, reference, SilentProgress()).metrics
        found[symmetric] = {**metrics, **size_metrics(model)}
    return found


@pytest.fixture(scope="module")
def run(uniform, tmp_path_factory):
    """A run with the bytes that 4 bits for every layer take as its budget, and the report of it."""
    folder = tmp_path_factory.mktemp("mixdq") / "stories"
    budget = int(min(figures["bytes"] for figures in uniform.values()))
    recipe = {
        **PARTS,
        "stages": [
            {
                "mixdq": {
                    "budget": {"bytes": budget},
                    "bits": [2, 3, 4, 6, 8],
                    "sensitivity": {"samples": 6},
                    "points": 4,
                }
            }
        ],
        "require": {"perplexity_increase": "<= 0.2", "size_ratio": "<= 0.25"},
        "export": {"path": str(folder)},
    }
    return folder, budget, compress.run(recipe, work_dir=folder.parent / "work")


def test_the_budget_is_kept_and_used(run):
    folder, budget, report = run
    metrics = report["evaluation"]["metrics"]
    assert 0.99 * budget <= metrics["bytes"] <= budget
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert stored == metrics["bytes"]


def test_it_predicts_better_than_equal_bits_in_no_fewer_bytes(run, uniform):
    _, _, report = run
    ours = report["evaluation"]["metrics"]
    for figures in uniform.values():
        assert ours["bytes"] <= figures["bytes"]
        assert ours["perplexity_original"] == figures["perplexity_original"]
        assert ours["perplexity"] < figures["perplexity"]
        assert ours["kl"] < figures["kl"]


def test_layers_have_bits_of_their_own(run):
    folder, _, report = run
    config = json.loads((folder / "config.json").read_text())
    bits = {name: scheme["bits"] for name, scheme in config["quantization_config"]["modules"].items()}
    assert len(bits) == 35 and len(set(bits.values())) > 1 and "lm_head" not in bits
    rows = {row["name"]: row["weight_bits"] for row in report["evaluation"]["linears"]}
    assert {name: rows[name] for name in bits} == bits and rows["lm_head"] == 32


def test_the_folder_is_verified_and_has_all_that_the_model_needs(run):
    folder, _, report = run
    assert report["export"]["verified"] and report["export"]["max_abs_error"] == 0.0
    assert verify_folder(folder)["verified"]
    source = Path(compress.__file__).parent / "models" / "builtin" / "stories"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "pipeline_tag: text-generation" in card
    assert "perplexity" in card and "denoiser" not in card


def test_a_fresh_process_computes_and_writes_the_same_through_transformers(run, tmp_path):
    folder, _, _ = run
    program = (
        "import compress, torch, transformers\n"
        "from safetensors.torch import save_file\n"
        f"folder = {str(folder)!r}\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(folder)\n"
        "inputs = tokenizer('Once upon a time, there was a', return_tensors='pt')\n"
        "with torch.no_grad():\n"
        "    logits = model(**inputs).logits\n"
        "    text = model.generate(**inputs, max_new_tokens=30, do_sample=False)\n"
        f"save_file({{'logits': logits, 'text': text, **inputs}}, {str(tmp_path / 'out.safetensors')!r})\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    here = compress.load(folder)
    with torch.no_grad():
        assert torch.equal(here(input_ids=found["input_ids"]).logits, found["logits"])
        written = here.generate(found["input_ids"], max_new_tokens=30, do_sample=False)
    assert torch.equal(written, found["text"]) and written.shape[1] > found["input_ids"].shape[1]
