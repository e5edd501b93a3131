"""Errors of subsets: against blocks that are really cut, and a planted best subset."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from compress.compressors.pruning.experts.genome import Space
from compress.compressors.pruning.experts.reconstruction import (
    SubsetErrors,
    calibration_items,
    compared,
    subsets,
)
from compress.compressors.pruning.experts.statistics import observe
from compress.models.experts import keep_experts
from compress.models.mixtures import mixtures
from compress.runtime.moe_config import moe_shape

from ....tiny_moe import CLASSES
from .opened_moe import QUIET, batches, hooks, opened, routed_plainly


def _errors(model, calls, kept, active=None, items=8):
    found = mixtures(model.module)
    routing = moe_shape(model.config).routing
    choices = subsets(Space(1, kept, routing.experts, routing.groups), 0, 0)
    errors = {mixture.layer: SubsetErrors(mixture, choices, active) for mixture in found}
    wanted = torch.arange(items)
    observe(
        model.module, calls,
        [lambda mixture, routed: errors[mixture.layer].update(mixture, routed.of(wanted))],
        label="comparing", progress=QUIET,
    )  # fmt: skip
    return choices, {layer: error.total for layer, error in errors.items()}


def _output(block, hidden):
    found = block(hidden[None])
    return found[0][0] if isinstance(found, tuple) else found[0]


CASES = [
    *((class_name, None, {}) for class_name in CLASSES),
    # The router of PhimoeForCausalLM picks two experts, never one.
    *((class_name, 1, {}) for class_name in CLASSES if class_name != "PhimoeForCausalLM"),
    ("DeepseekV2ForCausalLM", None, {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    ("OlmoeForCausalLM", None, {"norm_topk_prob": True}),
]


@pytest.mark.parametrize(("class_name", "active", "changes"), CASES)
@torch.no_grad()
def test_the_error_of_a_subset_is_that_of_the_block_that_is_cut_to_it(class_name, active, changes):
    model, calls = opened(class_name, **changes), batches()
    choices, errors = _errors(model, calls, 4, active)
    plain = routed_plainly(model, calls)
    for number in (0, 3, len(choices) // 2, len(choices) - 1):
        cut, kept = copy.deepcopy(model.module), choices[number].tolist()
        keep_experts(cut, model.config, dict.fromkeys(plain, kept), active=active)
        for mixture, smaller in zip(mixtures(model.module), mixtures(cut), strict=True):
            hidden = plain[mixture.layer][0]
            moved = _output(smaller.block, hidden) - _output(mixture.block, hidden)
            assert float(errors[mixture.layer][number]) == pytest.approx(
                float(moved.double().square().sum()), rel=1e-4
            )


def test_nothing_of_the_model_is_changed():
    for class_name in ("DeepseekV3ForCausalLM", "GptOssForCausalLM"):
        model = opened(class_name)
        before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
        counts = [(mixture.router.top_k, mixture.router.num_experts) for mixture in mixtures(model.module)]
        _errors(model, batches(), 4)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
        assert counts == [(m.router.top_k, m.router.num_experts) for m in mixtures(model.module)]
        assert hooks(model) == 0


@torch.no_grad()
def test_in_a_block_of_pairs_the_subsets_with_one_of_each_pair_lose_nothing():
    model = opened("MixtralForCausalLM", num_local_experts=8)
    pairs = [(0, 4), (1, 2), (3, 7), (5, 6)]
    for mixture in mixtures(model.module):
        for tensor in (*mixture.router_tensors().values(), *mixture.expert_tensors().values()):
            for first, second in pairs:
                tensor[second] = tensor[first]
    # Both of a pair are chosen with equal weights, so one of them alone is the same.
    choices, errors = _errors(model, batches(), 4, active=1)
    assert len(choices) == 70
    whole = {layer: float(values.max()) for layer, values in errors.items()}
    lossless = [len({pair for pair in pairs if set(pair) & set(row)}) == 4 for row in choices.tolist()]
    assert sum(lossless) == 16
    for layer, values in errors.items():
        assert ((values < 1e-5 * whole[layer]).tolist()) == lossless


def test_many_batches_are_as_one_and_later_items_do_not_count():
    model = opened("Qwen3MoeForCausalLM")
    _, one = _errors(model, batches(items=12, size=12), 3, items=10)
    _, many = _errors(model, batches(items=12, size=3), 3, items=10)
    _, again = _errors(model, batches(items=12, size=12), 3, items=10)
    _, every = _errors(model, batches(items=12, size=12), 3, items=12)
    for layer, values in one.items():
        torch.testing.assert_close(values, many[layer], rtol=1e-5, atol=1e-6)
        assert torch.equal(values, again[layer])
        assert (every[layer] > values).any()


def test_chunks_change_nothing(monkeypatch):
    model = opened("DeepseekV3ForCausalLM")
    _, whole = _errors(model, batches(), 4)
    for name, value in (("_OUTPUTS", 4 * 8 * 32 * 5), ("_WEIGHTS", 4 * 8 * 5 * 7)):  # 5 tokens, 7 subsets
        monkeypatch.setattr(f"compress.compressors.pruning.experts.reconstruction.{name}", value)
    _, parts = _errors(model, batches(), 4)
    for layer, values in whole.items():
        torch.testing.assert_close(values, parts[layer], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "kept", "pools", "count"),
    [
        (8, 4, 1, 70),
        (8, 8, 1, 1),
        (8, 4, 2, 36),
        (16, 4, 1, 1820),
        (16, 8, 1, 5000),
        (60, 30, 1, 5000),
        (64, 32, 1, 2000),
        (128, 64, 1, 2000),
        (64, 32, 8, 2000),
    ],
)
def test_how_many_subsets_are_compared(experts, kept, pools, count):
    space = Space(3, kept, experts, pools)
    found = subsets(space, 5, 1)
    assert found.shape == (count, kept)
    assert compared(space) == count
    assert len({tuple(row) for row in found.tolist()}) == count
    assert (np.diff(found, axis=1) > 0).all() if kept > 1 else True
    size = experts // pools
    for pool in range(pools):
        assert ((found // size == pool).sum(axis=1) == kept // pools).all()
    if count == math.comb(experts, kept):
        assert found.tolist() == sorted(found.tolist())


def test_64_items_are_compared_and_drawn_where_their_number_is_known():
    assert calibration_items(None, 1).tolist() == list(range(64))
    assert calibration_items(20, 1).tolist() == list(range(20))
    drawn = calibration_items(200, 1).tolist()
    assert drawn == sorted(set(drawn)) == calibration_items(200, 1).tolist()
    assert (len(drawn), max(drawn) < 200, max(drawn) > 64) == (64, True, True)
    assert drawn != calibration_items(200, 2).tolist()


def test_draws_follow_the_seed_and_the_group():
    space = Space(2, 8, 16)
    assert np.array_equal(subsets(space, 1, 0), subsets(space, 1, 0))
    assert not np.array_equal(subsets(space, 1, 0), subsets(space, 1, 1))
    assert not np.array_equal(subsets(space, 1, 0), subsets(space, 2, 0))
