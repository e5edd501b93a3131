"""A checkpoint with a compressed cache: killed and finished, verified, loaded, found out when changed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import compress
import pytest
import torch
from compress.report import without_timings
from compress.runtime.kv.attach import kv_scheme_of
from compress.runtime.validate import open_folder

from ..tiny_cache import decoded

RECIPE = """\
model: builtin:stories
calibration: {samples: 8, length: 128}
stages:
%s  - cskv: {removed: 0.5, window: 16, bits: 4, key_group: 16}
evaluate: {fidelity: {samples: 2}, layers: false}
export: {path: out, kv_cache: checkpoint}
"""
RTN = "  - rtn: {weight_bits: 8}\n"
TRAINED = """\
model: builtin:stories
calibration: {samples: 8, length: 128}
stages:
  - cskv: {removed: 0.5, window: 16, init: asvd, steps: 200, lr: 0.001, batch_tokens: 256}
evaluate: {fidelity: {samples: 2}, layers: false}
export: {path: out, kv_cache: checkpoint}
"""
OFTEN_KEPT = """\
from compress.cli.main import main
from compress.compressors.kv_cache import training
training.SAVE_SECONDS, training._SAVED_AT_MOST = 0.0, 1e9
main()
"""
STOCK = """\
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({path!r})
with torch.no_grad():
    torch.save(model(torch.arange(100)[None]).logits, {out!r})
assert "compress" not in sys.modules
"""


def _prepare(folder: Path, stages: str) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE % stages)
    return folder


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "compress", *words], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _finish(folder: Path, *words: str, code: int = 0) -> str:
    process = _start(folder, *words)
    text, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors
    return text + errors


def _kill_after_the_stage(folder: Path) -> None:
    process = _start(folder, "run", "recipe.yaml", "--json")
    end = time.monotonic() + 300
    while not list(folder.glob(".compress/stages/cskv-*/stage.json")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "out").exists()


def _kill_within_the_training(folder: Path) -> None:
    """Kill a run that keeps the state of its training after every batch, once it has kept one."""
    process = subprocess.Popen([sys.executable, "-c", OFTEN_KEPT, "run", "recipe.yaml", "--json"], cwd=folder)
    end = time.monotonic() + 300
    while not list(folder.glob(".compress/**/training.safetensors")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(folder.glob(".compress/**/training.safetensors"))
    assert not list(folder.glob(".compress/**/*.self_attn.safetensors"))  # no attention is finished


def _hashes(out: Path) -> dict[str, str]:
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.name != "report.json"
    }
    report = without_timings(json.loads((out / "report.json").read_text()))
    return {**found, "report": hashlib.sha256(json.dumps(report).encode()).hexdigest()}


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["", RTN], ids=["cskv", "rtn-cskv"])
def test_a_killed_run_goes_on_with_the_finished_stage_and_gives_the_same_bytes(tmp_path, stages):
    whole, killed = _prepare(tmp_path / "whole", stages), _prepare(tmp_path / "killed", stages)
    _finish(whole, "run", "recipe.yaml", "--json")
    _kill_after_the_stage(killed)
    _finish(killed, "run", "recipe.yaml", "--json")
    report = json.loads((killed / "out" / "report.json").read_text())
    assert {stage["resumed"] for stage in report["stages"]} == {True}
    assert _hashes(whole / "out") == _hashes(killed / "out")
    assert report["export"]["verified"] and report["export"]["max_abs_error"] == 0.0
    assert "through the compressed cache with equal logits" in report["export"]["notes"][-1]
    loaded = compress.load(killed / "out")
    assert kv_scheme_of(loaded).bits == 4
    assert torch.equal(decoded(loaded, 70, 40), decoded(compress.load(whole / "out"), 70, 40))


@pytest.mark.slow
def test_a_run_that_is_killed_within_the_training_goes_on_with_it_and_gives_the_same_bytes(tmp_path):
    whole, killed = _prepare(tmp_path / "whole", ""), _prepare(tmp_path / "killed", "")
    for folder in (whole, killed):
        (folder / "recipe.yaml").write_text(TRAINED)
    _finish(whole, "run", "recipe.yaml", "--json")
    _kill_within_the_training(killed)
    text = _finish(killed, "run", "recipe.yaml")
    assert "the training of the factors goes on after step" in " ".join(text.split())
    assert _hashes(whole / "out") == _hashes(killed / "out")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = _prepare(tmp_path_factory.mktemp("cskv") / "run", "")
    _finish(folder, "run", "recipe.yaml")
    return folder


@pytest.mark.slow
def test_stock_code_computes_the_logits_of_the_original(exported):
    found, expected = exported / "found.pt", exported / "expected.pt"
    original = Path(compress.__file__).parent / "models" / "builtin" / "stories"
    for path, out in ((exported / "out", found), (original, expected)):
        code = STOCK.format(path=str(path), out=str(out))
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(found), torch.load(expected))


@pytest.mark.slow
def test_verify_measures_it_again_and_finds_another_factor(exported):
    _finish(exported, "verify", "out", "--against", "builtin:stories")
    path, report = exported / "out" / "model.safetensors", exported / "out" / "report.json"
    before, told = path.read_bytes(), report.read_text()
    entry = open_folder(exported / "out").tensors["model.layers.2.self_attn.cskv.k_b.weight"]
    path.write_bytes(before[: entry.start] + bytes(entry.bytes) + before[entry.start + entry.bytes :])
    text = _finish(exported, "verify", "out", code=6)
    assert "has another SHA-256 than the report says" in " ".join(text.split())
    hashes = (hashlib.sha256(data).hexdigest() for data in (before, path.read_bytes()))
    report.write_text(told.replace(*hashes))  # as somebody would who wants it not to be noticed
    _finish(exported, "verify", "out")
    text = _finish(exported, "verify", "out", "--against", "builtin:stories", code=6)
    assert "decode_kl" in text
    path.write_bytes(before)
    report.write_text(told)


@pytest.mark.slow
def test_a_compressed_folder_is_no_model_to_start_from(exported):
    text = _finish(exported, "run", "recipe.yaml", "--model", "out", "--output", "again", code=4)
    assert "already compressed" in " ".join(text.split())
