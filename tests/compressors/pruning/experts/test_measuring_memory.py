"""What measuring the rules needs, held against what it says that it needs."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.pruning.experts.baselines import measuring_bytes
from compress.compressors.pruning.experts.genome import Space
from compress.compressors.pruning.experts.reconstruction import SubsetErrors, subsets, work_bytes
from compress.compressors.pruning.experts.statistics import Routed, RoutingSums
from compress.models.mixtures import mixtures
from compress.runtime.moe_config import moe_shape

from ....tiny_moe import moe_config, moe_module

SIZES = [
    ("MixtralForCausalLM", {"num_local_experts": 8, "hidden_size": 512}),
    ("Qwen2MoeForCausalLM", {"num_experts": 20, "hidden_size": 256, "moe_intermediate_size": 300}),
    ("GptOssForCausalLM", {"num_local_experts": 12, "intermediate_size": 500}),
    ("DeepseekV3ForCausalLM", {"n_routed_experts": 16, "hidden_size": 128}),
    ("PhimoeForCausalLM", {"num_local_experts": 4}),
]


def _peak(call):
    """Return the most bytes of tensors that are alive at once within a call, beside those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _routed(mixture, tokens, width):
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(3))
    logits, weights, indices = mixture.router(hidden)
    return Routed(hidden, logits, weights, indices, torch.zeros(tokens, dtype=torch.int64))


@pytest.mark.parametrize(("class_name", "changes"), SIZES)
@torch.no_grad()
def test_the_peak_is_below_what_is_stated_and_does_not_grow_with_the_batch(class_name, changes):
    mixture = mixtures(moe_module(class_name, **changes))[-1]
    shape = moe_shape({**moe_config(class_name, **changes), "_class_name": class_name})
    space = Space(1, shape.routing.experts // 2, shape.routing.experts, shape.routing.groups)
    few = subsets(space, 0, 0)[:200]
    errors = SubsetErrors(mixture, few, None)
    routed = [_routed(mixture, tokens, shape.width) for tokens in (1100, 2200)]
    first, second = (_peak(lambda one=one: errors.update(mixture, one)) for one in routed)
    stated = work_bytes(space, shape.width, shape.expert_inner)
    assert stated / 8 < first < stated
    assert second < 1.02 * first


def test_what_stays_is_stated_as_well():
    changes = {"num_local_experts": 8, "num_hidden_layers": 4}
    shape = moe_shape({**moe_config("MixtralForCausalLM", **changes), "_class_name": "MixtralForCausalLM"})
    found = mixtures(moe_module("MixtralForCausalLM", **changes))
    space = Space(2, 4, 8)
    sums = RoutingSums(8, [mixture.layer for mixture in found])
    choices = [subsets(space, 0, group) for group in range(2)]
    errors = [SubsetErrors(mixture, choices[0], None).total for mixture in found]
    tensors = [*sums.counts.values(), *sums.weights.values(), *errors]
    held = sum(tensor.nbytes for tensor in tensors) + sum(rows.nbytes for rows in choices)
    work = work_bytes(space, shape.width, shape.expert_inner)
    assert measuring_bytes(shape, groups=2, kept=4) == held + work


def test_a_real_model_can_be_planned_for():
    names = {"num_local_experts": 8, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape = moe_shape({**moe_config("MixtralForCausalLM", **names), "_class_name": "MixtralForCausalLM"})
    one_layer = 8 * 3 * 4096 * 14336 * 2  # bytes of its experts in bfloat16
    assert measuring_bytes(shape, groups=32, kept=4) < 0.1 * one_layer
