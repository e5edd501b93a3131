"""Experts found elsewhere, applied on a machine that could not hold the model: 3 GB from disk to disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import torch
from compress.exporters import compress_format
from compress.exporters.writer import StoredTensor, write_tensors
from compress.models.open import read_spec
from compress.recipes.schema import ModelRef

from ..tiny_moe import moe_config

GB = 10**9
SHARD_BYTES = 500_000_000
LAYERS, EXPERTS, WIDTH, INNER = 8, 8, 1536, 5120
KEPT = {layer: sorted((layer + step) % EXPERTS for step in (0, 2, 3, 5)) for layer in range(LAYERS)}
_SECONDS = 300


def _write_model(folder: Path) -> int:
    """Write a random bfloat16 checkpoint shard by shard; return the bytes of the largest one."""
    config = moe_config(
        "MixtralForCausalLM", hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS, num_attention_heads=12, num_key_value_heads=4, vocab_size=8000,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    spec = read_spec(ModelRef(id=str(folder)))
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(8000 * WIDTH, dtype=torch.bfloat16).uniform_(-1.0, 1.0, generator=generator)

    def drawn(index, shape):  # another part of the same numbers for every tensor
        return block.roll(-7919 * index)[: prod(shape)].view(shape)

    tensors, _ = compress_format.predict(spec)
    filled = [
        StoredTensor(t.name, t.dtype, t.shape, lambda index=index, shape=t.shape: drawn(index, shape))
        for index, t in enumerate(tensors)
    ]
    write_tensors(folder, filled, max_shard_size=SHARD_BYTES, name="model.safetensors")
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def _recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        "model: model\n"
        f"stages: [{{eep: {{experts: {json.dumps(KEPT)}}}}}]\n"
        "evaluate: {fidelity: null}\n"
        'require: {size_ratio: "<= 0.6"}\n'
        "export: {path: out, max_shard_size: 500MB}\n"
    )


def _start(folder: Path, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "compress", *command], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(".out.partial-*/*"))


def _kill_half_way(folder: Path) -> None:
    process = _start(folder, "run", "recipe.yaml", "--json")
    until = time.monotonic() + _SECONDS
    while _written(folder) < SHARD_BYTES // 2:
        assert process.poll() is None and time.monotonic() < until, "it wrote nothing that could be cut off"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return found + [further for child in found for further in _children(child)]


def _resident(process: int) -> int:
    """Return the resident bytes of a process and all that it started, each with what they share."""
    total, first = 0, _command(process)
    for one in (process, *_children(process)):
        try:
            # Between fork and exec a child has the memory of its parent, which is no second one.
            if one == process or _command(one) != first:
                pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return total


def _command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def _run_watched(folder: Path) -> tuple[dict, int, int]:
    """Return the report, the largest peak of a process, and the largest sum of all at one moment."""
    process = _start(folder, "run", "recipe.yaml", "--json")
    together, until = 0, time.monotonic() + _SECONDS
    while True:
        try:
            output, _ = process.communicate(timeout=0.05)
            break
        except subprocess.TimeoutExpired:
            assert time.monotonic() < until
            together = max(together, _resident(process.pid))
    assert process.returncode == 0, output
    report = json.loads(output)
    return report, report["environment"]["peak_rss_bytes"], together


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_three_gigabytes_are_pruned_in_the_memory_of_a_shard_and_one_more(tmp_path):
    if shutil.disk_usage(tmp_path).free < 8 * GB:
        pytest.skip("less than 8 GB are free for a checkpoint of 3 GB and its half")
    shard = _write_model(tmp_path / "model")
    total = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert total > 3 * GB and shard <= SHARD_BYTES + 10**6
    _recipe(tmp_path)

    _kill_half_way(tmp_path)
    assert not (tmp_path / "out").exists() and _written(tmp_path) > 0
    report, peak, together = _run_watched(tmp_path)
    assert not list(tmp_path.glob(".out.partial-*")) and (tmp_path / "out").is_dir()

    planned = json.loads(_start(tmp_path, "plan", "recipe.yaml", "--json").communicate()[0])
    limit = shard + 10**9
    assert 100 * 2**20 < peak <= together <= limit, f"{peak:,} and {together:,} of {limit:,} bytes"
    assert together <= planned["stages"][0]["peak_memory_bytes"] <= limit
    assert planned["export"]["bytes"] == report["export"]["bytes"]
    assert report["export"]["verified"] is True and report["stages"][0]["resumed"] is False
    assert 0.5 < report["evaluation"]["metrics"]["size_ratio"] < 0.53
