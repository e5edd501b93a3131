"""The benchmark of SlimSAM gives every way as many steps, and other scores to those that ask."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import slimsam

    yield slimsam
    for name in ("slimsam", "_sam", "_common"):
        sys.modules.pop(name, None)


@pytest.fixture
def bench(benchmark):
    return benchmark.prepared(argparse.Namespace(quick=True, steps=4, samples=3))


def test_every_way_has_valid_settings_and_as_many_steps_in_all(benchmark, bench):
    for way in (*benchmark.WAYS, *benchmark.DEEP):
        settings = bench.settings(way)
        assert settings.steps == (4 if settings.slimming == "one_step" else 2), way.name
        assert all(getattr(settings, name) == value for name, value in way.changes.items())
    assert len({way.name for way in (*benchmark.WAYS, *benchmark.DEEP)}) == 10


def test_the_judge_finds_no_fault_with_the_original_and_some_with_another(benchmark, bench):
    model = bench.opened()
    judge = bench.judge(model, seed=0)
    found = judge.measure(model.module)
    assert (found.error, found.agreement) == (0.0, 1.0) and 0.3 < found.miou < 1.0
    with torch.no_grad():
        model.module.vision_encoder.neck.conv1.weight.mul_(-1)
    worse = judge.measure(model.module)
    assert worse.error > 0.01 and worse.agreement < 0.9 and worse.miou < found.miou


def test_scores_by_magnitude_and_by_chance(benchmark):
    from _sam import scored_by
    from compress.compressors.pruning.sam import scores
    from compress.compressors.pruning.sam import slimming as stage
    from compress.models.open import open_model
    from compress.progress import SilentProgress
    from compress.recipes.schema import ModelRef

    model = open_model(ModelRef(id="builtin:sam"), progress=SilentProgress())
    own = stage.score
    asked = {"embedding": False, "bottleneck": True, "gradients": "summed", "recompute": False}

    def scored(kind, seed):
        with scored_by(kind, seed):
            objective = scores.DisturbedTaylor([], 0.01, 0)
            return stage.score(model, objective, **asked, folder=None, progress=SilentProgress())

    found = scored("magnitude", 0)
    layer = model.module.vision_encoder.layers[1].mlp
    by_hand = (layer.lin1.weight.abs().sum(dim=1) + layer.lin2.weight.abs().sum(dim=0)) / 2
    assert torch.allclose(found.inner[1].float(), by_hand, rtol=1e-5) and found.embedding is None
    one, again, other = scored("random", 1), scored("random", 1), scored("random", 2)
    assert torch.equal(one.inner[0], again.inner[0]) and not torch.equal(one.inner[0], other.inner[0])
    assert [len(part) for part in one.attention] == [len(part) for part in found.attention]
    assert stage.score is own


@pytest.mark.slow
def test_a_way_is_run_and_told(benchmark, bench, capsys):
    model = bench.opened()
    judge = bench.judge(model, seed=0)
    ways = [way for way in benchmark.WAYS if way.name in ("as shipped", "one step")]
    results = {way.name: [bench.run(way, 0, judge)] for way in ways}
    alternate, once = (found[0] for found in results.values())
    assert (len(alternate.pruned), len(once.pruned)) == (2, 1)
    assert alternate.parameters == once.parameters < 0.4 * 800_152
    assert once.quality.error > 0
    benchmark.table(benchmark.HEADER, [benchmark.row(name, found) for name, found in results.items()])
    benchmark.tell_latency(model, results, rounds=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in lines if not line.startswith("| --")]
    assert names == ["way", *results, "encoder", "original", names[-1]] and names[-1] in results
