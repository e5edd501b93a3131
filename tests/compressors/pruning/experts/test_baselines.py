"""Rules that choose experts without a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress.compressors.pruning.experts.baselines import closest, highest, measure, random_choices
from compress.compressors.pruning.experts.genome import Space, chosen, given_choice
from compress.compressors.pruning.experts.layer_groups import layer_groups
from compress.compressors.pruning.experts.reconstruction import SubsetErrors, calibration_items, subsets
from compress.compressors.pruning.experts.statistics import observe
from compress.errors import PlanError, StageError
from compress.models.mixtures import mixtures
from compress.recipes.experts import HEURISTICS
from compress.runtime.moe_config import moe_shape

from ....tiny_moe import CLASSES
from .opened_moe import QUIET, batches, hooks, opened, per_layer, routed_plainly


def _measured(model, calls, kept=4, groups=None, active=None, seed=0):
    groups = per_layer(model) if groups is None else groups
    return measure(model, calls, groups, kept, active=active, seed=seed, progress=QUIET).shared


def _best(values, kept):
    """Return the experts with the largest values; of equal ones the first."""
    order = sorted(range(len(values)), key=lambda expert: (-values[expert], expert))
    return tuple(sorted(order[:kept]))


def _by_hand(plain, layers, experts):
    """Return counts and sums of weights over the tokens of some layers."""
    counts, sums = [0] * experts, [0.0] * experts
    for layer in layers:
        _, weights, indices = plain[layer]
        for row, picked in zip(weights.tolist(), indices.tolist(), strict=True):
            for weight, expert in zip(row, picked, strict=True):
                counts[expert] += 1
                sums[expert] += weight
    return counts, sums


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_gets_a_choice_of_every_rule(class_name):
    model, calls = opened(class_name, dtype="bfloat16"), batches(size=3)
    groups = per_layer(model)
    found = _measured(model, calls)
    assert tuple(found) == HEURISTICS
    routing = moe_shape(model.config).routing
    space = Space(len(groups), 4, routing.experts, routing.groups)
    for name, kept in found.items():
        individual = given_choice(space, kept, name)
        assert [tuple(row) for row in chosen(individual.router).tolist()] == list(kept)
    assert found == _measured(model, calls)
    assert hooks(model) == 0


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM"])
@pytest.mark.parametrize("groups", ["per_layer", 1, 2])
def test_counts_and_weights_choose_as_by_hand(class_name, groups):
    model, calls = opened(class_name), batches(items=10, size=4)
    layers = [mixture.layer for mixture in mixtures(model.module)]
    dealt = layer_groups(layers, groups)
    found = _measured(model, calls, kept=3, groups=dealt)
    plain = routed_plainly(model, calls)
    for place, group in enumerate(dealt):
        counts, sums = _by_hand(plain, group.layers, 6)
        assert found["frequency"][place] == _best(counts, 3)
        assert found["soft_activation"][place] == _best(sums, 3)


def test_naee_adds_the_errors_of_a_group_of_layers():
    model, calls = opened("MixtralForCausalLM"), batches()
    rows = subsets(Space(1, 3, 6), 0, 0)
    errors = {mixture.layer: SubsetErrors(mixture, rows, None) for mixture in mixtures(model.module)}
    observe(
        model.module, calls, [lambda mixture, routed: errors[mixture.layer].update(mixture, routed)],
        label="comparing", progress=QUIET,
    )  # fmt: skip
    found = _measured(model, calls, kept=3, groups=layer_groups([0, 1, 2], 2))["naee"]
    for place, layers in enumerate([(0, 1), (2,)]):
        total = sum(errors[layer].total for layer in layers)
        assert found[place] == tuple(rows[int(total.argmin())].tolist())


@torch.no_grad()
def test_naee_finds_the_planted_subset_of_70():
    # Four experts are near copies of the other four, and mostly chosen with them, since their rows of the
    # router are equal. The first of a pair has more weight, by the router's bias, and the copy's output is a
    # little larger: with one expert per token, the four first ones are nearest to the whole.
    model, pairs = opened("GptOssForCausalLM", num_local_experts=8), [(0, 2), (3, 1), (5, 7), (6, 4)]
    for mixture in mixtures(model.module):
        router, experts = mixture.router_tensors(), mixture.expert_tensors()
        for first, second in pairs:
            for tensor in (*router.values(), *experts.values()):
                tensor[second] = tensor[first]
            router["bias"][first] += 0.2
            router["bias"][second] -= 0.2
            experts["down_proj"][second] *= 1.05
            experts["down_proj_bias"][second] *= 1.05
    calls, originals = batches(items=32, size=8), (0, 3, 5, 6)
    assert len(subsets(Space(1, 4, 8), 0, 0)) == 70
    found = _measured(model, calls, active=1)
    assert found["naee"] == (originals,) * 3
    assert originals not in found["frequency"]  # both of the pairs that are chosen most


def test_many_batches_choose_as_one():
    model = opened("DeepseekV3ForCausalLM")
    assert _measured(model, batches(size=8)) == _measured(model, batches(size=3))


def test_drawn_subsets_follow_the_seed():
    model, calls = opened("MixtralForCausalLM", num_local_experts=16, num_hidden_layers=2), batches(items=2)
    first, same = (_measured(model, calls, kept=8, seed=3)["naee"] for _ in range(2))
    assert first == same
    assert any(_measured(model, calls, kept=8, seed=seed)["naee"] != first for seed in (4, 5))


def test_naee_looks_at_64_items_and_the_counts_at_all():
    model, calls = opened("MixtralForCausalLM"), batches(items=90, tokens=6, size=30)
    groups = per_layer(model)

    def measured(some, items=None):
        return measure(model, some, groups, 3, active=None, seed=0, progress=QUIET, items=items).shared

    whole, some = measured(calls), calibration_items(90, 0)
    first = {name: values[:4] for name, values in calls[2].items()}
    assert whole["naee"] == measured([*calls[:2], first])["naee"]
    one = {name: torch.cat([call[name] for call in calls])[some] for name in calls[0]}
    assert measured(calls, items=90)["naee"] == measured([one])["naee"]
    assert measured(calls, items=90)["frequency"] == whole["frequency"]


def test_the_measured_model_may_route_to_fewer_experts_later():
    model, calls = opened("MixtralForCausalLM"), batches()
    two, one = _measured(model, calls, kept=2), _measured(model, calls, kept=2, active=1)
    assert two["frequency"] == one["frequency"]  # of the original in both cases
    assert two["naee"] != one["naee"]


def test_pools_keep_equally_many():
    space = Space(2, 4, 8, pools=2)
    scores = [torch.tensor([9, 8, 7, 6, 1, 2, 3, 4.0]), torch.tensor([1, 1, 1, 1, 5, 5, 5, 5.0])]
    assert highest(scores, space) == ((0, 1, 6, 7), (0, 1, 4, 5))
    rows = np.array([[0, 1, 4, 5], [0, 1, 4, 6]])
    assert closest([torch.tensor([1.0, 0.5]), torch.tensor([2.0, 2.0])], [rows, rows]) == (
        (0, 1, 4, 6),
        (0, 1, 4, 5),
    )


def test_random_choices_follow_the_seed():
    space = Space(groups=3, kept=4, experts=8)
    drawn = random_choices(space, 30, seed=5)
    assert len({one.sha256 for one in drawn}) == 30
    assert [one.sha256 for one in random_choices(space, 10, seed=5)] == [one.sha256 for one in drawn[:10]]
    assert random_choices(space, 1, seed=6)[0].sha256 != drawn[0].sha256
    assert all(one.is_choice for one in drawn)


def test_what_does_not_fit_is_refused():
    model = opened("MixtralForCausalLM")
    with pytest.raises(PlanError, match="3 experts per token"):
        _measured(model, batches(), active=3)
    with pytest.raises(PlanError, match="2 experts per token, of 1 experts"):
        _measured(model, batches(), kept=1)
    with pytest.raises(PlanError, match="no module of the model is in layer 3"):
        _measured(model, batches(), groups=layer_groups(range(4), "per_layer"))
    with pytest.raises(StageError, match="measuring experts: there is no batch"):
        _measured(model, [])
    assert hooks(model) == 0


def test_no_hook_is_left_when_a_batch_fails():
    model = opened("MixtralForCausalLM")

    def broken():
        yield from batches()
        raise RuntimeError("of the items")

    with pytest.raises(RuntimeError, match="of the items"):
        _measured(model, broken())
    assert hooks(model) == 0
