"""Slimming as a user meets it: a run, what it writes, who loads that, kills in between, memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compress
import pytest
import torch
from compress.calibration.content import hash_weights
from compress.errors import CompressError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from safetensors.torch import load_file, save_file

from ..peaks import PEAK
from ..tiny_sam import save_tiny_sam
from ..tiny_scenes import write_scenes

pytestmark = pytest.mark.slow
_SECONDS = 300
STAGE = {"ratio": 0.5, "steps": 6, "batch_size": 2, "choice_images": 2, "lr": 1e-3, "checkpoint_every": 1}


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny model and images with masks, and a recipe of every given name."""
    save_tiny_sam(tmp_path / "model")
    write_scenes(tmp_path / "images", 14)

    def recipe(name, format="compress", **stage):
        document = {
            "model": "model",
            "calibration": {"images": "images", "samples": 3},
            "stages": [{"slimsam": {**STAGE, **stage}}],
            "evaluate": {"fidelity": {"samples": 2}},
            "export": {"path": name, "format": format},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(document))
        return tmp_path

    return recipe


def start(folder: Path, *command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "compress", *map(str, command)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(folder: Path, name: str) -> dict:
    """Carry out a recipe in a process of its own; return its report."""
    process = start(folder, "run", f"{name}.yaml", "--work-dir", f"work-{name}", "--json")
    output, errors = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, errors
    return json.loads(output)


def stock(folder: Path, place: Path) -> dict[str, torch.Tensor] | str:
    """Load a folder where this package is not; return embedding and masks, or the last line of the error."""
    code = (
        "import sys\n"
        "sys.modules['compress'] = None\n"
        "import torch, transformers\n"
        "from safetensors.torch import load_file, save_file\n"
        "model = transformers.SamModel.from_pretrained(sys.argv[1]).eval()\n"
        "inputs = load_file(sys.argv[2] + '/inputs.safetensors')\n"
        "with torch.no_grad():\n"
        "    embedding = model.vision_encoder(inputs['pixel_values']).last_hidden_state\n"
        "    masks = model(**inputs, return_dict=False)[1]\n"
        "save_file({'embedding': embedding.contiguous(), 'masks': masks.contiguous()},"
        " sys.argv[2] + '/outputs.safetensors')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, folder, place], capture_output=True, text=True, check=False,
        env=environment | {"HF_HUB_OFFLINE": "1"}, cwd="/",
    )  # fmt: skip
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return load_file(place / "outputs.safetensors")


def inputs_of(place: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "input_points": 64 * torch.rand(2, 1, 1, 2, generator=generator),
    }
    save_file(found, place / "inputs.safetensors")
    return found


def computed(module, inputs):
    with torch.no_grad():
        embedding = module.vision_encoder(inputs["pixel_values"]).last_hidden_state
        return {"embedding": embedding, "masks": module(**inputs, return_dict=False)[1]}


def test_a_uniform_model_is_a_stock_model(place):
    folder = place("out")
    report = run(folder, "out")
    details = report["stages"][0]["details"]
    rows = {phase["name"]: phase for phase in details["phases"]}
    assert list(rows) == [
        "embedding pruning", "embedding aligning", "bottleneck pruning", "bottleneck aligning",
    ]  # fmt: skip
    # Half of the residual stream is gone after the first, half of the rest after the second.
    encoder = details["parameters"]["encoder"]
    assert encoder[0] > rows["embedding pruning"]["parameters"] > rows["bottleneck pruning"]["parameters"]
    assert rows["bottleneck pruning"]["parameters"] == encoder[1]
    out = folder / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["vision_config"]["hidden_size"], config["vision_config"]["mlp_dim"]) == (24, 48)
    assert not json.loads((out / "compress.json").read_text()).get("surgery")
    assert "quantization_config" not in config
    kept = json.loads((out / "slimming.json").read_text())["kept"]
    assert len(kept["embedding"]) == 24 and [len(one) for one in kept["attention"]] == [6] * 3
    inputs = inputs_of(folder)
    loaded, plain = computed(compress.load(out), inputs), stock(out, folder)
    assert isinstance(plain, dict), plain
    for name, value in loaded.items():
        assert value.std() > 1e-2 and float((plain[name] - value).abs().max()) < 1e-6
    verified = start(folder, "verify", "out")
    assert verified.wait(_SECONDS) == 0, verified.communicate()


def test_a_global_model_needs_compress_and_stock_code_says_so(place):
    folder = place("out", ranking="global")
    report = run(folder, "out")
    widths = report["stages"][0]["details"]["widths"]
    assert len({after for _, after in widths["inner"]} | {after for _, after in widths["head_dim"]}) > 2
    out = folder / "out"
    assert json.loads((out / "compress.json").read_text())["surgery"]
    inputs = inputs_of(folder)
    refused = stock(out, folder)
    assert isinstance(refused, str) and "compress" in refused
    module = compress.load(out)
    dims = [layer.attn.qkv.out_features // 12 for layer in module.vision_encoder.layers]
    assert dims == [after for _, after in widths["head_dim"]]
    assert computed(module, inputs)["masks"].std() > 1e-2

    # Without what tells the widths, in either file, nobody makes up a model.
    (out / "compress.json").unlink()
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError):
        compress.load(out)
    assert isinstance(stock(out, folder), str)


def _folder_of(folder: Path, name: str) -> Path | None:
    return next((folder / "work-killed").rglob(name), None)


def _kill_at(folder: Path, name: str) -> None:
    """Start a run, and kill it as soon as a file stands in its work directory."""
    process = start(folder, "run", "killed.yaml", "--work-dir", "work-killed", "--json")
    until = time.monotonic() + _SECONDS
    while _folder_of(folder, name) is None:
        assert process.poll() is None, f"it ended before {name}: {process.communicate()[1]}"
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "killed").exists(), f"it had ended when it was killed at {name}"


def test_a_run_that_is_killed_again_and_again_writes_the_same_bytes(place):
    folder = place("whole", steps=12)
    place("killed", steps=12)
    whole = run(folder, "whole")
    for name in (
        "embedding pruning, kept.json", "training.safetensors", "embedding aligning.json",
        "bottleneck pruning, kept.json", "bottleneck-aligning/training.safetensors",
    ):  # fmt: skip
        _kill_at(folder, name)
    report = run(folder, "killed")
    resumed = report["stages"][0]["details"]["phases"][-1]["resumed_at"]
    assert 0 < resumed <= 12 and not whole["stages"][0]["details"]["phases"][-1]["resumed_at"]
    for name in ("model.safetensors", "compress.json", "slimming.json", "config.json"):
        first, second = ((folder / one / name).read_bytes() for one in ("whole", "killed"))
        assert first == second, name
    for one, other in zip(
        whole["stages"][0]["details"]["phases"], report["stages"][0]["details"]["phases"], strict=True
    ):
        assert {**one, "seconds": 0, "resumed_at": 0} == {**other, "seconds": 0, "resumed_at": 0}


def _save_base(folder: Path, side: int) -> None:
    """Write SAM-B with random weights, for images of another size."""
    from transformers import SamConfig, SamImageProcessorPil, SamModel

    parts = {name: {"image_size": side} for name in ("vision_config", "prompt_encoder_config")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            module = SamModel(SamConfig(**parts))
        module = module.to_empty(device="cpu")
        for name, item in [*module.named_parameters(), *module.named_buffers()]:
            with torch.no_grad():
                # Of such a size that gradients are no numbers with a lost exponent, which take a CPU long.
                item.normal_(std=0.02) if item.ndim > 1 else item.fill_(float(name.endswith("weight")))
    first, copy = module.shared_image_embedding, module.prompt_encoder.shared_embedding
    copy.positional_embedding.data.copy_(first.positional_embedding.data)
    module.save_pretrained(folder)
    square = {"height": side, "width": side}
    SamImageProcessorPil(size={"longest_edge": side}, pad_size=square).save_pretrained(folder)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_all_phases_of_sam_b_take_the_memory_that_was_planned(tmp_path):
    _save_base(tmp_path / "model", 256)
    write_scenes(tmp_path / "images", 14, height=192, width=256)
    document = {
        "model": "model",
        "calibration": {"images": "images", "samples": 2},
        "stages": [{"slimsam": {"ratio": 0.5, "steps": 2, "batch_size": 2, "choice_images": 2}}],
        "evaluate": {"fidelity": None},
        "export": {"path": "out"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))
    planned = json.loads(start(tmp_path, "plan", "recipe.yaml", "--json").communicate()[0])
    (tmp_path / "watched.py").write_text(
        PEAK + "import sys\nfrom compress.cli.main import main\n"
        "try:\n    main()\nfinally:\n    open('peak', 'w').write(str(peak()))\n"
    )
    done = subprocess.run(
        [sys.executable, "watched.py", "run", "recipe.yaml", "--json"], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    details = json.loads(done.stdout)["stages"][0]["details"]
    assert [phase["name"].split()[1] for phase in details["phases"]] == ["pruning", "aligning"] * 2
    assert details["phases"][1]["steps"] == details["phases"][3]["steps"] == 2
    expected, peak = planned["stages"][0]["peak_memory_bytes"], int((tmp_path / "peak").read_text())
    assert peak <= 1.1 * expected and expected <= 1.4 * peak, f"{peak:,} of {expected:,} bytes"
    model = open_model(ModelRef(id=str(tmp_path / "out")), progress=SilentProgress())
    assert model.size().parameters == planned["stages"][0]["after"]["parameters"] and hash_weights(
        model.module
    )
