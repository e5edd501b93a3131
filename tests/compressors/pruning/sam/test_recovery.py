"""What scores and features are worth on toys: only what shows on every seed is asked for.

Two of the paper's claims do not, on random encoders: that features help the second aligning too, and that
alternate slimming ends nearer than one step with as many steps of training.
"""

import copy

import pytest
import torch
from compress.compressors.pruning.sam.choosing import Kept, choose
from compress.compressors.pruning.sam.cutting import slice_bottleneck, slice_embedding
from compress.compressors.pruning.sam.scores import DisturbedTaylor, Scores, score
from compress.compressors.pruning.sam.sites import encoder_sites

from .encoders import QUIET, heavy_tailed, opened, shown
from .learners import OutputJudge, run_align, settings_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _settings(**changes):
    return settings_of(steps=60, lr=3e-3, recompute=False, patience=1000, checkpoint_every=1000, **changes)


def _chosen(module, *, seed, embedding):
    found = score(
        opened(module), DisturbedTaylor(shown(8, seed + 99), 0.01, seed), embedding=embedding,
        bottleneck=True, gradients="summed", recompute=False, folder=None, progress=QUIET,
    )  # fmt: skip
    return choose(found, encoder_sites(module), _settings())


def _random(module, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = encoder_sites(module).layers
    scores = Scores(
        torch.rand(48, generator=generator),
        tuple(torch.rand(layer.head_dim, generator=generator) for layer in layers),
        tuple(torch.rand(layer.inner, generator=generator) for layer in layers),
    )
    return choose(scores, encoder_sites(module), _settings())


def _cut(module, kept: Kept, *, bottleneck):
    found = copy.deepcopy(module)
    if kept.embedding is not None:
        slice_embedding(found, kept.embedding, rel_pos="slice")
    if bottleneck:
        slice_bottleneck(found, kept.attention, kept.inner, attn_scale="preserve", rel_pos="slice")
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_alternate_slimming_rests_on(seed, tmp_path):
    original = heavy_tailed(seed)
    judge = OutputJudge(original, shown(8, seed + 50))
    given = {"train": shown(15, seed + 1), "original": original, "judge": judge}

    def align(name, student, settings=None, **changes):
        found = run_align(
            student, folder=tmp_path / name, settings=settings or _settings(), **given, **changes
        )
        assert found.best_value < 0.9 * found.epochs[0][1], name  # every aligning lowers the error
        return found

    scored, drawn = _chosen(original, seed=seed, embedding=True), _random(original, seed)
    first = _cut(original, scored, bottleneck=False)
    assert judge.measure(first) < judge.measure(_cut(original, drawn, bottleneck=False))

    outputs_alone = align("outputs", copy.deepcopy(first), _settings(features=False))
    with_features = align("features", first)
    assert with_features.epochs[0] == outputs_alone.epochs[0]
    assert with_features.best_value < outputs_alone.best_value

    second = _cut(first, _chosen(first, seed=seed, embedding=False), bottleneck=True)
    align("second", second, phase="bottleneck", previous=first)

    by_score, by_chance = (_cut(original, kept, bottleneck=True) for kept in (scored, drawn))
    one = align("one step", by_score, phase="outputs")
    other = align("one step, by chance", by_chance, phase="outputs")
    assert one.best_value < other.best_value
