"""The main job: the shipped recipe on the built-in DiT, and the comparisons that it claims to win."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compress.recipes.loader import load_recipe

QUICK = {
    "model": "builtin:dit",
    "calibration": {"samples": 16, "steps": 10, "guidance_scale": 1.5},
    "evaluate": {"fidelity": {"samples": 16, "steps": 10, "guidance_scale": 1.5}},
}
SHIPPED = load_recipe("dit_w4a8").recipe.stages[0]
OURS = SHIPPED.settings.model_dump(mode="json", exclude_unset=True)
W4A8 = {"weight_bits": 4, "activation_bits": 8, "adaln_weight_bits": 8}


def _compress(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "compress", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Run the shipped recipe once, as a user does."""
    folder = tmp_path_factory.mktemp("shipped")
    done = _compress(folder, "run", "dit_w4a8", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "out" / "dit-w4a8", json.loads(done.stdout)


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Return `measure(method, settings)` -> the report of a quick run; runs share their recordings."""
    import compress

    folder = tmp_path_factory.mktemp("measured")
    found = {}

    def run(method, **settings):
        key = json.dumps([method, settings])
        if key not in found:
            recipe = {
                **QUICK,
                "stages": [{method: settings}],
                "export": {"path": str(folder / str(len(found)))},
            }
            found[key] = compress.run(recipe, work_dir=folder / ".compress")
        return found[key]

    return run


def _sqnr(report):
    return report["evaluation"]["metrics"]["sqnr_db"]


@pytest.mark.slow
def test_the_folder_is_complete(shipped):
    folder, report = shipped
    names = {path.name for path in folder.iterdir()}
    assert {
        "diffusion_pytorch_model.safetensors", "config.json", "compress.json", "README.md", "report.json",
        "recipe.yaml", "samples.png", "sqnr_per_timestep.png", "layer_error.png", "scheduler",
    } <= names  # fmt: skip
    assert list(report) == ["recipe", "model", "stages", "evaluation", "gates", "export", "environment"]
    assert report["export"]["verified"] is True
    assert report["export"]["max_abs_error"] == 0.0
    assert len(report["export"]["loads_with"]) == 2
    assert all(gate["passed"] for gate in report["gates"])
    assert json.loads((folder / "report.json").read_text()) == report


@pytest.mark.slow
def test_every_listed_file_has_its_hash(shipped):
    folder, report = shipped
    listed = {row["name"]: row["sha256"] for row in report["export"]["files"]}
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json"
    }
    assert listed == found
    done = _compress(folder.parent, "verify", folder.name, "--json")
    assert done.returncode == 0, done.stderr
    (folder / "config.json").rename(folder / "kept")
    try:
        assert _compress(folder.parent, "verify", folder.name).returncode in (4, 6)
    finally:
        (folder / "kept").rename(folder / "config.json")


@pytest.mark.slow
def test_the_shipped_recipe_keeps_its_promises(shipped):
    metrics = shipped[1]["evaluation"]["metrics"]
    assert metrics["linear_bytes_ratio"] <= 0.27
    assert metrics["class_agreement_drop"] <= 0.02
    assert metrics["class_agreement_original"] >= 0.85
    assert metrics["size_ratio"] <= 0.40


@pytest.mark.slow
def test_the_plan_predicts_the_bytes_that_are_written(shipped, tmp_path):
    _, report = shipped
    done = _compress(tmp_path, "plan", "dit_w4a8", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["export"]["bytes"] == pytest.approx(report["export"]["bytes"], rel=0.01)
    assert planned["stages"][0]["after"]["bytes"] == pytest.approx(
        report["stages"][0]["after"]["bytes"], rel=0.01
    )
    assert list(tmp_path.iterdir()) == [], "plan wrote something"


@pytest.mark.slow
@pytest.mark.parametrize(
    "loading",
    [
        "import compress; model = compress.load(path)",
        "import compress; from diffusers import DiTTransformer2DModel as M; model = M.from_pretrained(path)",
        "from diffusers import DiTTransformer2DModel as M; import compress; model = M.from_pretrained(path)",
    ],
    ids=["compress.load", "stock class", "stock class imported first"],
)
def test_a_fresh_process_loads_the_same_model(shipped, loading, tmp_path):
    import compress
    import torch

    folder, _ = shipped
    script = f"""
import sys, torch
path, out = sys.argv[1:]
{loading}
torch.manual_seed(99)
inputs = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
with torch.no_grad():
    steps, labels = torch.tensor([5, 500, 999]), torch.tensor([0, 4, 10])
    y = model.eval()(inputs, timestep=steps, class_labels=labels).sample
print(y.float().flatten().double().sum().item(), y.dtype)
from safetensors.torch import save_file
save_file({{"y": y.contiguous()}}, out)
"""
    out = tmp_path / "y.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    model = compress.load(folder).eval()
    inputs = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    steps, labels = torch.tensor([5, 500, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        expected = model(inputs, timestep=steps, class_labels=labels).sample
    assert torch.equal(load_file(out)["y"], expected)


@pytest.mark.slow
def test_stock_diffusers_alone_refuses_loudly(shipped):
    script = "import sys; from diffusers import DiTTransformer2DModel as M; M.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(shipped[0])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "compress" in done.stderr


def test_the_comparisons_are_of_the_shipped_recipe():
    assert SHIPPED.method == "vidit_q"
    assert OURS == {
        **W4A8, "group_size": 128, "weight_symmetric": True, "clip": "mse", "rounding": "gptq",
    }  # fmt: skip


@pytest.mark.slow
def test_w8a8_is_close_to_the_original(measure):
    assert _sqnr(measure("vidit_q", weight_bits=8, activation_bits=8)) >= 30.0


@pytest.mark.slow
def test_w4a8_is_three_decibels_above_round_to_nearest_at_equal_size(measure):
    ours, rtn = measure("vidit_q", **OURS), measure("rtn", **W4A8)
    assert _sqnr(ours) >= _sqnr(rtn) + 3.0
    assert ours["export"]["bytes"] <= 1.05 * rtn["export"]["bytes"]


@pytest.mark.slow
def test_w4a8_is_above_smoothquant_at_equal_size(measure):
    ours, smoothed = measure("vidit_q", **OURS), measure("smoothquant", **W4A8)
    assert _sqnr(ours) > _sqnr(smoothed)
    assert ours["export"]["bytes"] <= 1.05 * smoothed["export"]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(("weight_bits", "activation_bits", "least"), [(8, 8, 30), (6, 6, 20), (4, 4, 5)])
def test_every_setting_runs_to_a_verified_folder(measure, weight_bits, activation_bits, least):
    report = measure("vidit_q", weight_bits=weight_bits, activation_bits=activation_bits)
    assert report["export"]["verified"] is True
    assert _sqnr(report) >= least


@pytest.mark.slow
def test_a_gate_that_fails_keeps_the_result_aside(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({
        "model": "builtin:dit",
        "calibration": {"samples": 2, "steps": 2},
        "stages": [{"rtn": W4A8}],
        "evaluate": {"fidelity": {"samples": 2, "steps": 2}},
        "require": {"sqnr_db": ">= 200"},
        "export": {"path": "out"},
    }))  # fmt: skip
    done = _compress(tmp_path, "run", "recipe.yaml")
    assert done.returncode == 6, done.stderr
    assert "sqnr_db" in done.stderr
    assert "200" in done.stderr
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.rejected" / "report.json").read_text())
    assert report["gates"][0]["passed"] is False


@pytest.mark.slow
@pytest.mark.parametrize("export_format", ["torchao", "dequantized"])
def test_other_formats_are_verified_too(tmp_path, export_format):
    import compress
    from safetensors.torch import load_file

    recipe = {
        "model": "builtin:dit",
        "calibration": {"samples": 2, "steps": 2},
        "stages": [{"vidit_q": {**OURS, "rotation": "none", "group_size": None}}],  # torchao has neither
        "evaluate": {"fidelity": {"samples": 2, "steps": 2}},
        "export": {"path": str(tmp_path / "out"), "format": export_format},
    }
    report = compress.run(recipe, work_dir=tmp_path / ".compress")
    assert report["export"]["verified"] is True
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(weights)
    copies = {name for name in tensors if ".norm1.emb." in name and "blocks.0." not in name}
    assert len(copies) == 7 * 5, "of one embedder in eight blocks, which stock loading wants"
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if name not in copies)
    assert report["evaluation"]["metrics"]["bytes"] == stored < report["export"]["bytes"]
    assert "import compress" not in report["export"]["loads_with"][-1]
    script = (
        "import sys, torch; from diffusers import DiTTransformer2DModel as M;"
        "m = M.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16);"
        "print(sum(p.numel() for p in m.parameters()))"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, env=environment, cwd=Path(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
