"""The pruning benchmark runs what it times, counts what runs, and holds what it promises."""

import argparse
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = "ViT-Ti/16"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _random_models
    import isomorphic
    from transformers import ViTConfig

    tiny = ViTConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=2, image_size=32,
        patch_size=8, num_labels=10,
    )  # fmt: skip
    monkeypatch.setitem(_random_models.CLASSIFIERS, TINY, tiny)
    yield isomorphic
    for name in ("isomorphic", "_random_models", "_torch_pruning", "_common"):
        sys.modules.pop(name, None)


ARGUMENTS = argparse.Namespace(images=8, batch=4, seed=0, rounds=2)


def test_both_prune_to_the_same_totals_and_torch_counts_what_we_state(benchmark, tmp_path, capsys):
    import torch

    folder = benchmark.write_model(tmp_path / "model", TINY, 0)
    images = benchmark.write_images(tmp_path / "images", 8, 32, 0)
    ours, clock, memory = benchmark.prune(folder, images, ARGUMENTS)
    assert list(clock.parts) == ["groups", "scores", "decision", "cut", "check"]
    assert 0.1 < memory < 100
    peer, _ = benchmark.prune_by_peer(folder, images, ARGUMENTS)
    assert ours.module.classifier.in_features == peer.classifier.in_features == 32
    assert benchmark.counted_macs(ours) == ours.size().macs == benchmark.macs(ours.module)
    state = torch.get_rng_state()
    benchmark.latency_table({"dense": peer, "ours": ours.module}, 32, ARGUMENTS)
    assert torch.equal(torch.get_rng_state(), state)
    shown = capsys.readouterr().out
    assert f"| ours      |         {sum(p.numel() for p in ours.module.parameters()) / 1e6:.2f} |" in shown


def test_a_target_is_told_as_it_is_reached(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUND_TO", 4)
    benchmark.target_table(tmp_path, (TINY,), ARGUMENTS)
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    asked, reached, counted = float(row[2]), float(row[3]), float(row[5])
    assert counted == reached <= asked
    assert row[4] == f"{100 * (reached / asked - 1):+.2f} %" or abs(reached - asked) < 0.002


def test_calls_take_turns(benchmark):
    order = []
    found = benchmark.latencies([lambda: order.append("a"), lambda: order.append("b")], 2, warm_up=1)
    assert "".join(order) == "ababab"
    assert all(0 <= least <= middle for least, middle in found)
