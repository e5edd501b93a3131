"""Language models in the formats of other packages, as a user would make, load and verify them, offline.

What makes them loadable is shown in processes that cannot import this package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import compress
import pytest
import torch
from compress.errors import PlanError
from compress.exporters.card_subject import Subject
from compress.exporters.inspection import inspect
from compress.pipeline import evaluate, verify
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

MODEL = "builtin:stories"
RTN8 = {"rtn": {"weight_bits": 8, "weight_symmetric": True}}
RTN4 = {"rtn": {"weight_bits": 4, "weight_symmetric": True, "activation_bits": 16, "group_size": None}}
MIXED = {"mixdq": {"budget": {"mean_bits": 4}, "bits": [2, 3, 4, 6, 8], "activation_bits": [8],
                   "sensitivity": {"samples": 4}, "points": 3}}  # fmt: skip
SMOOTH = {"smoothquant": {"weight_symmetric": True, "keep": ["*.o_proj"]}}
RUNS = {
    "rtn-4": ([RTN4], "compressed-tensors"),
    "rtn-8": ([RTN8], "compressed-tensors"),
    "mixdq": ([MIXED], "compressed-tensors"),
    "smoothquant": ([SMOOTH], "compressed-tensors"),
    "int8-of-rtn": ([RTN8], "bitsandbytes-int8"),
    "int8": ([], "bitsandbytes-int8"),
    "nf4": ([], "bitsandbytes-nf4"),
}
# No site of this tree is on the path: -I leaves out the current folder and PYTHONPATH.
ALONE = """
import sys, torch
from safetensors.torch import load_file, save_file
folder, inputs, outputs, hidden = sys.argv[1:]
sys.path[:] = [place for place in sys.path if place not in hidden.split(":")]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")
                    and "editable" not in getattr(finder, "__name__", "")]
try:
    import compress
    raise SystemExit("this process can import compress")
except ModuleNotFoundError:
    pass
import transformers
torch.set_num_threads(1)
model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    logits = model(load_file(inputs)["ids"]).logits
made = model.generate(load_file(inputs)["ids"][:1, :5], max_new_tokens=8, do_sample=False)
save_file({"logits": logits, "made": made}, outputs)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return `made(name)` -> (report, folder) of a key of RUNS; each is run once."""
    place, found = tmp_path_factory.mktemp("formats"), {}

    def run(name):
        if name not in found:
            stages, format_ = RUNS[name]
            recipe = {
                "model": MODEL, "stages": stages, "calibration": {"samples": 8, "length": 128},
                "evaluate": {"fidelity": {"samples": 8}, "layers": False},
                "export": {"path": str(place / name), "format": format_},
            }  # fmt: skip
            found[name] = compress.run(recipe, work_dir=place / "work"), place / name
        return found[name]

    return run


def alone(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Load and run a folder in a process without this package."""
    from safetensors.torch import save_file

    save_file({"ids": ids}, folder.parent / "ids.safetensors")
    outputs = folder.parent / f"{folder.name}-outputs.safetensors"
    hidden = [str(Path(compress.__file__).resolve().parents[1]), str(Path(compress.__file__).parents[1])]
    arguments = [str(folder), str(folder.parent / "ids.safetensors"), str(outputs), ":".join(hidden)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *arguments], capture_output=True, text=True, timeout=300,
        check=False, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(outputs)


@pytest.mark.parametrize("name", RUNS)
def test_plain_transformers_computes_what_was_measured(made, name):
    report, folder = made(name)
    assert report["export"]["verified"] is True
    assert report["export"]["max_abs_error"] == 0.0
    assert report["export"]["format"] == RUNS[name][1]
    ids = torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    found = alone(folder, ids)
    torch.set_num_threads(1)
    with torch.no_grad():
        assert torch.equal(found["logits"], compress.load(folder)(ids).logits)
    assert found["made"].shape == (1, 13)


@pytest.mark.parametrize("name", RUNS)
def test_sizes_are_those_planned_and_told(made, name):
    report, folder = made(name)
    recipe = report["recipe"]
    plan = compress.plan(recipe)
    assert (
        plan["export"]["bytes"] == (folder / "model.safetensors").stat().st_size == report["export"]["bytes"]
    )
    found, metrics = inspect(folder), report["evaluation"]["metrics"]
    assert found["tensor_bytes"] == metrics["bytes"]
    assert found["parameters"] == metrics["parameters"]
    linears = {row["name"]: row for row in report["evaluation"]["linears"]}
    for row in found["layers"]:
        if row["method"] is not None:
            told = linears[row["name"]]
            assert (row["bits"], row["bytes"]) == (told["weight_bits"], told["bytes"]), row["name"]
    card = (folder / "README.md").read_text()
    assert f"{metrics['bits_per_weight']:.2f}" in card
    assert f"{metrics['bytes']:,}" in card
    assert "without compress:\n\n```python\nimport transformers\n" in card


def test_quality_is_that_of_the_bits(made):
    increase = {name: made(name)[0]["evaluation"]["metrics"]["perplexity_increase"] for name in RUNS}
    assert all(abs(increase[name]) < 0.02 for name in ("rtn-8", "int8", "int8-of-rtn", "smoothquant"))
    assert increase["rtn-8"] < increase["mixdq"] < 0.5
    assert 0 < increase["nf4"] < increase["rtn-4"]


def test_the_bits_of_mixdq_are_those_of_the_file(made):
    report, folder = made("mixdq")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    written = {
        name: group["weights"]["num_bits"]
        for group in section["config_groups"].values()
        for name in group["targets"]
    }
    chosen = {
        row["name"]: row["weight_bits"]
        for row in report["evaluation"]["linears"]
        if row["method"] is not None
    }
    assert written == chosen
    assert len(set(written.values())) > 2
    assert Subject(report).mixed_label in (folder / "README.md").read_text()


def test_int8_keeps_the_integers_of_the_stage(made, tmp_path):
    _, folder = made("int8-of-rtn")
    _, packed = made("rtn-8")
    ours, theirs = load_file(folder / "model.safetensors"), load_file(packed / "model.safetensors")
    name = "model.layers.2.mlp.up_proj"
    assert ours[f"{name}.weight"].dtype == torch.int8
    assert torch.equal(ours[f"{name}.weight"], theirs[f"{name}.weight"])
    assert torch.equal(ours[f"{name}.SCB"], theirs[f"{name}.weight_scale"].view(-1) * 127)


@pytest.mark.parametrize("name", ["mixdq", "nf4", "int8"])
def test_verify_and_evaluate_measure_the_folder_again(made, name):
    report, folder = made(name)
    again = verify(folder, against=MODEL)
    assert again["verified"] is True, again
    measured = evaluate(folder)["evaluation"]["metrics"]
    for metric in ("perplexity", "bytes", "bits_per_weight"):
        assert measured[metric] == pytest.approx(report["evaluation"]["metrics"][metric], rel=1e-6)


REFUSED = {
    "asymmetric": ([{"rtn": {"weight_bits": 4}}], "compressed-tensors", "weight_symmetric: true"),
    "unabsorbed scales": (
        [{"smoothquant": {"weight_symmetric": True}}], "compressed-tensors", 'keep: ["*.o_proj"]',
    ),
    "static": (
        [{"rtn": {"weight_symmetric": True, "activation_scale": "static"}}], "compressed-tensors",
        "activation_scale: token",
    ),
    "rotated": ([{"vidit_q": {"weight_symmetric": True, "rotation": "block"}}], "compressed-tensors", ""),
    "rounded twice": ([RTN4], "bitsandbytes-nf4", "leave that stage out"),
    "4 bits in int8": ([RTN4], "bitsandbytes-int8", "weight_bits: 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_the_plan(tmp_path, name):
    stages, format_, hint = REFUSED[name]
    recipe = {"model": MODEL, "stages": stages, "export": {"path": str(tmp_path / "o"), "format": format_}}
    with pytest.raises(PlanError) as caught:
        compress.run(recipe, work_dir=tmp_path / "work")
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "o").exists()


def test_a_recipe_without_stages_needs_a_format_that_rounds(tmp_path):
    from compress.errors import RecipeError

    recipe = {"model": MODEL, "stages": [], "export": {"path": str(tmp_path / "o")}}
    with pytest.raises(RecipeError, match="nothing would change"):
        compress.run(recipe, work_dir=tmp_path / "work")
