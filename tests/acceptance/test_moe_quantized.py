"""Quantized mixtures of experts as a user makes them: planned, run, gone on with, verified, refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import compress
import pytest
import torch
from compress.cli._output import Output
from compress.cli.main import invoke
from compress.recipes.loader import load_recipe
from compress.runtime.moe_names import expert_linear
from safetensors.torch import load_file

from ..tiny_items import make_asked_moe

EEP = {
    "keep_experts": 4, "init_random": 6, "prune_evals": 20, "total_evals": 24, "random_draws": 0,
    "fitness": {"by": "tokens"}, "splits": {"train": 20, "test": 20},
}  # fmt: skip


def _told(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    return invoke([*arguments], Output(out, err)), out.getvalue(), err.getvalue()


def _json(*arguments: str) -> dict:
    code, out, err = _told(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def _recipe(folder: Path, *stages: dict, model: str = "builtin:moe", **parts) -> str:
    document = {
        "model": model, "stages": list(stages), "calibration": {"samples": 8, "length": 32},
        "evaluate": {"fidelity": {"samples": 4}}, "export": {"path": str(folder / "out")}, **parts,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(document))
    return str(folder / "recipe.yaml")


@pytest.mark.slow
def test_a_recipe_that_quantizes_experts_keeps_what_its_plan_promised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = _recipe(tmp_path, {"smoothquant": {"weight_bits": 4}}, require={"size_ratio": "<= 0.17"})
    planned = _json("plan", recipe)
    report = _json("run", recipe)
    (stage,) = report["stages"]
    assert stage["after"] == planned["stages"][0]["after"]
    assert report["export"]["bytes"] == planned["export"]["bytes"]
    assert report["export"]["verified"] and report["export"]["max_abs_error"] == 0.0
    rows = [row for row in report["evaluation"]["linears"] if expert_linear(row["name"])]
    assert len(rows) == 4 * 8 * 3 and {row["weight_bits"] for row in rows} == {4}
    assert all(row["bytes"] < row["bytes_original"] for row in rows)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`model.layers.*.mlp.experts.*.down_proj` | 4 | 8 | output channel | 32 |" in card
    assert "all other tensors together have" in card
    found = _json("inspect", "out")
    assert found["parameters"] == stage["after"]["parameters"] and found["experts"]["kept"] == 8
    assert _json("verify", "out", "--against", "builtin:moe")["verified"]
    again = _json("run", recipe, "--overwrite")
    assert again["stages"][0]["resumed"] and again["export"]["files"] == report["export"]["files"]
    fresh = _json("run", recipe, "--overwrite", "--fresh")
    assert not fresh["stages"][0]["resumed"]
    hashes = [
        {row["name"]: row["sha256"] for row in document["export"]["files"]} for document in (report, fresh)
    ]
    assert hashes[0]["model.safetensors"] == hashes[1]["model.safetensors"]
    assert hashes[0]["config.json"] == hashes[1]["config.json"]


@pytest.mark.slow
def test_pruned_and_quantized_in_one_recipe_it_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_asked_moe(tmp_path / "model", "Qwen2MoeForCausalLM")
    (tmp_path / "text.txt").write_text("\n".join(f"{n}={n * n}ab?" for n in range(2000)))
    calibration = {"samples": 8, "length": 16, "text": str(tmp_path / "text.txt")}
    recipe = _recipe(
        tmp_path, {"eep": EEP}, {"mixdq": {"budget": {"mean_bits": 5}, "bits": [4, 8], "points": 1}},
        model=str(tmp_path / "model"), calibration=calibration, evaluate={"answers": {}, "fidelity": None},
    )  # fmt: skip
    planned, report = _json("plan", recipe), _json("run", recipe)
    after = report["stages"][1]["after"]
    assert after["parameters"] == planned["stages"][1]["after"]["parameters"]
    assert after["bytes"] <= planned["stages"][1]["after"]["bytes"]
    assert report["export"]["verified"] and "answers" in report["evaluation"]["metrics"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    modules = [name for name in config["quantization_config"]["modules"] if expert_linear(name)]
    assert config["num_experts"] == 4 and len(modules) == 2 * 4 * 3
    found = _json("inspect", "out")
    assert (found["experts"]["kept"], found["experts"]["of"]) == (4, 6)
    recorded = json.dumps(report["evaluation"]["metrics"]["answers"])
    assert f'"answers": {recorded}' in json.dumps(_json("evaluate", "out"))
    # A run that lost its last stage goes on with the first one, to the same bytes.
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    stages = sorted((tmp_path / ".compress" / "stages").iterdir(), key=lambda path: path.stat().st_mtime)
    shutil.rmtree(stages[-1])
    again = _json("run", recipe, "--overwrite")
    assert [stage["resumed"] for stage in again["stages"]] == [True, False]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_dequantized_it_opens_with_stock_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = {"path": str(tmp_path / "out"), "format": "dequantized"}
    report = _json("run", _recipe(tmp_path, {"rtn": {"weight_bits": 4}}, export=export))
    assert report["export"]["verified"]
    program = (
        "import sys, transformers\n"
        "module, info = transformers.AutoModelForCausalLM.from_pretrained("
        "sys.argv[1], output_loading_info=True)\n"
        "assert 'compress' not in sys.modules and not any(info.values()), info\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in names


def test_mapped_routers_are_not_quantized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_asked_moe(tmp_path / "model")
    mapped = {"eep": {**EEP, "router": "free", "export": "custom"}}
    (tmp_path / "text.txt").write_text("0123456789=ab?" * 200)
    recipe = _recipe(
        tmp_path, mapped, {"rtn": {}}, model=str(tmp_path / "model"), evaluate={"fidelity": None},
        calibration={"samples": 8, "length": 16, "text": str(tmp_path / "text.txt")},
    )  # fmt: skip
    code, _, err = _told("plan", recipe)
    assert code == 3 and "mapped routers" in err and "written in floating point alone" in err
    assert not (tmp_path / "out").exists()


def test_experts_are_removed_before_they_are_quantized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = _told("validate", _recipe(tmp_path, {"rtn": {}}, {"eep": EEP}))
    assert code == 2 and "eep" in err


def test_a_pattern_that_matches_no_expert_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = _told("plan", _recipe(tmp_path, {"rtn": {"keep": ["*.experts.8.*"]}}))
    assert code == 2 and "'*.experts.8.*' matches no linear layer" in err
    kept = {"rtn": {"keep": ["*.experts.7.*", "*.mlp.experts.*.down_proj"]}}
    notes = " ".join(_json("plan", _recipe(tmp_path, kept))["stages"][0]["notes"])
    assert "left in floating point (keep: *.experts.7.*): model.layers.0.mlp.experts.7.gate_proj" in notes


def test_the_recipe_of_all_three_methods_has_them():
    recipe = load_recipe("moe_full_stack").recipe
    assert [stage.method for stage in recipe.stages] == ["eep", "mixdq", "cskv"]
    assert {"answers_drop", "size_ratio", "kv_bytes_ratio"} <= set(recipe.require)


@pytest.mark.slow
def test_it_runs_offline_within_its_gates(tmp_path):
    program = "import sys; from compress.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "run", "moe_full_stack", "--quiet"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    out = tmp_path / "out" / "moe-full-stack"
    report = json.loads((out / "report.json").read_text())
    assert all(gate["passed"] for gate in report["gates"])
    metrics = report["evaluation"]["metrics"]
    assert metrics["kv_bytes_ratio"] < 0.14 and metrics["answers_drop"] <= 0.02
    module = compress.load(out)
    assert module.config.num_local_experts == 6
    ids = torch.arange(3, 13)[None]
    assert module.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 14)
