"""The benchmark of depth pruning times real models of fewer blocks, and tells every result at once."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = argparse.Namespace(quick=True, data=8, search_steps=None, steps=2, samples=20)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tinyfusion

    yield tinyfusion
    for name in ("tinyfusion", "_depth_speed", "_dit_xl", "_common"):
        sys.modules.pop(name, None)


@pytest.fixture
def four(make_tiny):
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(make_tiny(num_layers=4)).eval()


def test_models_of_fewer_blocks_share_the_tensors_and_leave_the_first_whole(benchmark, four):
    from _depth_speed import measure, shallower

    half = shallower(four, 2)
    assert (len(four.transformer_blocks), len(half.transformer_blocks)) == (4, 2)
    assert (four.config["num_layers"], half.config["num_layers"]) == (4, 2)
    assert [four.transformer_blocks[place] for place in (0, 2)] == list(half.transformer_blocks)
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([7]),
        "class_labels": torch.tensor([1]),
    }
    with torch.no_grad():
        assert not torch.equal(four(**call).sample, half(**call).sample)
    seconds = measure(four, (4, 2), batch=1, rounds=3, seed=0)
    assert list(seconds) == [4, 2] and 0 < seconds[2] < seconds[4] < 60


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_of_the_blocks_of_dit_xl_take_little_more_than_half_the_time(benchmark):
    """At real width, in processor time, on one thread: about as much faster as there are fewer blocks."""
    from _depth_speed import speed_table

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio = speed_table((28, 14), batch=1, rounds=3, seed=0)[14]
    finally:
        torch.set_num_threads(threads)
    assert 1.8 <= ratio < 2.3


def test_a_command_line_shortens_the_shipped_recipe(benchmark):
    full = benchmark.prepared(
        argparse.Namespace(quick=False, data=None, search_steps=None, steps=None, samples=None)
    )
    assert (full.search.groups, full.samples) == ("2:4", 2000) and full.recovery.steps >= 100
    quick = benchmark.prepared(QUICK)
    assert (quick.search.steps, quick.recovery.steps, quick.samples) == (20, 2, 20)
    assert quick.recipe.calibration.data.generate == 8


@pytest.mark.slow
def test_every_result_is_told(benchmark, capsys):
    benchmark.quality_table(benchmark.prepared(QUICK), [3], ["oracle"])
    lines = capsys.readouterr().out.splitlines()
    told = [line.partition(": feature-FID")[0] for line in lines if line.startswith("seed 3, oracle, ")]
    assert told == [f"seed 3, oracle, {how}" for how in ("not recovered", "fine-tuning", "distillation")]
    assert "seed 3, oracle: keeps [0, 2, 5, 7] after" in "\n".join(lines)
    cells = [cell.strip() for cell in lines[-2].split("|")[1:-1]]
    assert cells[0] == "oracle" and len(cells) == 7 and len(set(cells)) > 3
