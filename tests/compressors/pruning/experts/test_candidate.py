"""What is shown of an individual is the model that would be shipped; afterwards everything is as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from compress.compressors.pruning.experts.candidate import Candidates, kept_of, mixing_of
from compress.compressors.pruning.experts.genome import (
    Individual,
    Space,
    identity,
    individual_of,
    one_hot,
)
from compress.compressors.pruning.experts.layer_groups import layer_groups
from compress.errors import PlanError, StageError
from compress.models.experts import keep_experts_of
from compress.models.mapped_experts import map_routers_of
from compress.models.mixtures import mixtures
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.mapped_router import mapped

from ....tiny_moe import CLASSES, make_moe
from .opened_moe import hooks, opened

NOT_RENORMALISED = ("Qwen2MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV2ForCausalLM")
MAPPABLE = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV2ForCausalLM")
KEPT = 4


def _open(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


@torch.no_grad()
def _logits(module):
    ids = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(7))
    return module(input_ids=ids, use_cache=False).logits


def _groups(model, groups="per_layer"):
    return layer_groups([mixture.layer for mixture in mixtures(model.module)], groups)


def _choice(model, groups, seed=0):
    """Return [groups, 4] experts in no order, two of each half."""
    count = mixtures(model.module)[0].count
    generator = np.random.default_rng(seed)
    halves = [generator.permutation(count // 2)[:2] + half * (count // 2) for _ in groups for half in (0, 1)]
    rows = np.stack(halves).reshape(len(groups), KEPT)
    return np.stack([generator.permutation(row) for row in rows])


def _chosen(model, groups, seed=0):
    """Return an individual that chooses, its rows in no order."""
    both = one_hot(_choice(model, groups, seed), mixtures(model.module)[0].count)
    return Individual(both, both)


def _merged(model, groups, seed=0):
    """Return one whose first group is as chosen, and whose others mix experts."""
    chosen = _chosen(model, groups, seed)
    noise = np.random.default_rng(seed + 1).normal(0.0, 0.2, chosen.experts.shape)
    noise[0] = 0.0 if len(groups) > 1 else noise[0]
    return Individual(chosen.router, (chosen.experts + noise).astype(np.float32))


def _shipped(folder, tmp_path, individual, groups, active=None):
    """Cut the model, save it, and return what the stock class opens."""
    model = _open(folder)
    groups = _groups(model, groups)
    kept, mixing = kept_of(individual, groups), mixing_of(individual, groups)
    keep_experts_of(model, kept, active=active, mixing=mixing)
    model.module.save_pretrained(tmp_path / "shipped")
    found, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "shipped", output_loading_info=True, dtype="auto"
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.eval()


def _snapshot(model):
    """Return everything by which a later state can be told from this one."""
    tensors = [*model.module.named_parameters(), *model.module.named_buffers()]
    plain = {
        (name, key): value
        for name, part in model.module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, int | float | str | None)
    }
    return {name: (tensor, tensor.clone()) for name, tensor in tensors}, plain, hooks(model)


def _assert_same(model, before):
    tensors, plain, found = _snapshot(model)
    assert list(tensors) == list(before[0]) and plain == before[1] and found == before[2]
    for name, (tensor, _) in tensors.items():
        assert tensor is before[0][name][0] and torch.equal(tensor, before[0][name][1]), name


@pytest.mark.parametrize("kind", [_chosen, _merged])
@pytest.mark.parametrize("class_name", CLASSES)
def test_what_is_shown_is_what_the_stock_class_opens(tmp_path, class_name, kind):
    folder = make_moe(tmp_path / "m", class_name)
    model = _open(folder)
    groups = _groups(model)
    individual = kind(model, groups)
    candidates = Candidates(model, groups)
    before, original = _snapshot(model), _logits(model.module)
    with candidates.shown(individual):
        shown = _logits(model.module)
    wanted = _logits(_shipped(folder, tmp_path, individual, "per_layer"))
    assert (shown - wanted).abs().max() <= 1e-5 < (shown - original).abs().max()
    _assert_same(model, before)
    assert torch.equal(_logits(model.module), original)


@pytest.mark.parametrize("class_name", NOT_RENORMALISED)
def test_weights_are_those_among_experts_that_stay(class_name):
    """A softmax over all experts, with some closed, is another model where nothing divides by the sum."""
    model = opened(class_name)
    groups = _groups(model)
    individual = _chosen(model, groups)
    with Candidates(model, groups).shown(individual):
        shown = _logits(model.module)
    for place, mixture in enumerate(mixtures(model.module)):
        rows = torch.from_numpy(individual.router[place].copy())
        closed = mapped(mixture.router, rows, class_name)
        chosen = rows.argmax(dim=1)
        closed.register_forward_hook(lambda _, args, out, at=chosen: (out[0], out[1], at[out[2]]))
        setattr(mixture.block, mixture.router_name, closed)
    assert (shown - _logits(model.module)).abs().max() > 1e-3


@pytest.mark.parametrize("class_name", [name for name in CLASSES if name != "PhimoeForCausalLM"])
def test_fewer_experts_per_token_and_layers_that_share(tmp_path, class_name):
    folder = make_moe(tmp_path / "m", class_name, num_hidden_layers=4)
    model = _open(folder)
    groups = _groups(model, 1)
    assert len(groups[0].layers) >= 2
    individual = _merged(model, groups, seed=3)
    before = _snapshot(model)
    with Candidates(model, groups, active=1).shown(individual):
        shown = _logits(model.module)
    wanted = _logits(_shipped(folder, tmp_path, individual, 1, active=1))
    assert (shown - wanted).abs().max() <= 1e-5
    with Candidates(model, groups).shown(individual):
        assert (_logits(model.module) - shown).abs().max() > 1e-4
    _assert_same(model, before)


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_identity_changes_no_logit(class_name):
    model = opened(class_name)
    groups = _groups(model)
    original = _logits(model.module)
    space = Space(len(groups), mixtures(model.module)[0].count, mixtures(model.module)[0].count)
    candidates = Candidates(model, groups)
    with candidates.shown(identity(space)):
        assert torch.equal(_logits(model.module), original)
    # Merged rows that are the identity but for a term of nothing: the tensors are made anew, and equal.
    rows = identity(space).experts.copy()
    rows[:, 0, 1] = 1e-30
    with candidates.shown(Individual(identity(space).router, rows)):
        assert (_logits(model.module) - original).abs().max() <= 1e-5
    assert candidates.merges == len(groups)


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_merging_is_linear_in_every_tensor_of_an_expert(class_name):
    model = opened(class_name)
    groups = _groups(model)
    chosen = _chosen(model, groups)
    rows = chosen.experts.copy()
    rows[:, 0] = 0.0
    rows[:, 0, [1, 4]] = 0.5
    names = set()
    before = [mixture.expert_tensors() for mixture in mixtures(model.module)]
    with Candidates(model, groups).shown(Individual(chosen.router, rows)):
        for place, mixture in enumerate(mixtures(model.module)):
            order = np.argsort(chosen.router[place].argmax(axis=1)).tolist()
            for name, tensor in mixture.expert_tensors().items():
                old = before[place][name]
                assert torch.allclose(tensor[order.index(0)], (old[1] + old[4]) / 2, atol=1e-7)
                kept = chosen.router[place].argmax(axis=1)[order[1]]
                if order[1] != 0:
                    assert torch.equal(tensor[1], old[kept])
                names.add(name)
    assert {"gate_up_proj", "down_proj"} <= names
    assert ("down_proj_bias" in names) == (class_name == "GptOssForCausalLM")


def test_an_expert_can_stand_behind_the_row_of_another(tmp_path):
    """Merging can end in a single coefficient; the router's row need not be that expert's."""
    folder = make_moe(tmp_path / "m", "MixtralForCausalLM")
    model = _open(folder)
    groups = _groups(model)
    router = one_hot(np.array([[0, 1, 2, 3]] * len(groups)), 6)
    experts = np.tile(np.eye(6, dtype=np.float32)[[5, 1, 5, 4]], (len(groups), 1, 1))
    individual = Individual(router, experts)
    candidates = Candidates(model, groups)
    with candidates.shown(individual):
        shown = _logits(model.module)
    assert candidates.merges == 0
    assert (shown - _logits(_shipped(folder, tmp_path, individual, "per_layer"))).abs().max() <= 1e-5


def test_a_single_coefficient_that_is_not_one_scales_its_expert():
    """What noise makes of a row that had a single 1, where it hits that entry alone."""
    model = opened("MixtralForCausalLM")
    groups = _groups(model)
    router = one_hot(np.array([[0, 1, 2, 3]] * len(groups)), 6)
    rows = router * np.array([0.5, 1.0, -2.0, 1.0], dtype=np.float32)[:, None]
    before = [mixture.expert_tensors() for mixture in mixtures(model.module)]
    with Candidates(model, groups).shown(Individual(router, rows)):
        for mixture, old in zip(mixtures(model.module), before, strict=True):
            for name, tensor in mixture.expert_tensors().items():
                scale = torch.tensor([0.5, 1.0, -2.0, 1.0])[:, None, None]
                assert torch.equal(tensor, old[name][:4] * scale)


def test_only_layers_whose_coefficients_changed_are_merged_again():
    model = opened("MixtralForCausalLM")
    groups = _groups(model)
    individual = _merged(model, groups)
    candidates = Candidates(model, groups)
    logits = []
    for _ in range(2):
        with candidates.shown(individual):
            logits.append(_logits(model.module))
    assert candidates.merges == 2 and torch.equal(*logits)  # the first of three groups is only chosen
    rows = individual.experts.copy()
    rows[2] *= 1.5
    with candidates.shown(Individual(individual.router, rows)):
        assert not torch.equal(_logits(model.module), logits[0])
    assert candidates.merges == 3
    # Another choice of the router's rows in the same order merges nothing; the old rows in between are gone.
    with candidates.shown(individual):
        assert torch.equal(_logits(model.module), logits[0])
    assert candidates.merges == 4
    candidates.forget()
    with candidates.shown(individual):
        assert torch.equal(_logits(model.module), logits[0])
    assert candidates.merges == 6


def test_experts_that_stay_are_not_copied():
    model = opened("MixtralForCausalLM")
    groups = _groups(model)
    before = [mixture.experts.gate_up_proj for mixture in mixtures(model.module)]
    with Candidates(model, groups).shown(_chosen(model, groups)):
        assert all(
            mixture.experts.gate_up_proj is old
            for mixture, old in zip(mixtures(model.module), before, strict=True)
        )
        assert [mixture.router.num_experts for mixture in mixtures(model.module)] == [KEPT] * len(groups)


def test_experts_in_bfloat16_are_merged_in_float32_and_rounded_once():
    model = opened("MixtralForCausalLM", dtype="bfloat16")
    groups = _groups(model, 1)
    chosen = _chosen(model, groups)
    rows = np.random.default_rng(0).normal(0.0, 0.5, chosen.experts.shape).astype(np.float32)
    order = np.argsort(chosen.router[0].argmax(axis=1))
    weights = torch.from_numpy(rows[0][order].copy())
    mixture = mixtures(model.module)[0]
    old = mixture.experts.gate_up_proj.detach()
    exact = torch.einsum("je,eab->jab", weights.double(), old.double())
    with Candidates(model, groups).shown(Individual(chosen.router, rows)):
        made = mixture.experts.gate_up_proj.detach()
        assert made.dtype == torch.bfloat16 and _logits(model.module).dtype == torch.bfloat16
    naive = torch.zeros_like(made)
    for old_expert in range(old.shape[0]):
        naive += weights[:, old_expert].to(torch.bfloat16)[:, None, None] * old[old_expert]
    bound = exact.abs() * 2.0**-8 + 1e-6
    assert bool(((made.double() - exact).abs() <= bound).all())
    assert not bool(((naive.double() - exact).abs() <= bound).all())


def test_the_model_is_as_before_after_an_exception():
    model = opened("DeepseekV3ForCausalLM")
    groups = _groups(model)
    before, original = _snapshot(model), _logits(model.module)

    class Broken(Exception):
        pass

    with pytest.raises(Broken), Candidates(model, groups).shown(_merged(model, groups)):
        router = mixtures(model.module)[0].router
        assert router.weight.shape[0] == KEPT == len(router.e_score_correction_bias)
        raise Broken
    _assert_same(model, before)
    assert torch.equal(_logits(model.module), original)


def test_what_cannot_be_shown_is_refused_and_changes_nothing():
    model = opened("DeepseekV3ForCausalLM")
    groups = _groups(model)
    candidates = Candidates(model, groups)
    before = _snapshot(model)
    uneven = individual_of(np.array([[0, 1, 2, 5]] * len(groups)), 8)
    few = individual_of(np.array([[0, 4]] * len(groups)), 8)
    bad = Individual(uneven.router, np.full_like(uneven.experts, np.nan))
    other = individual_of(np.array([[0, 1, 4, 5]]), 8)
    refused = [
        (PlanError, uneven, "equally many"), (PlanError, few, "the router needs 2"),
        (StageError, bad, "not finite"), (StageError, other, "the model has 2 groups of layers"),
    ]  # fmt: skip
    for error, individual, message in refused:
        with pytest.raises(error, match=message), candidates.shown(individual):
            raise AssertionError("it was shown")
    with pytest.raises(PlanError, match="no group of layers holds it"):
        Candidates(model, groups[:1])
    _assert_same(model, before)


@pytest.mark.parametrize("class_name", MAPPABLE)
@pytest.mark.parametrize("active", [None, 1])
def test_a_free_router_weighs_all_rows_and_mixes_them(class_name, active):
    model, other = opened(class_name), opened(class_name)
    groups = _groups(model)
    chosen = _merged(model, groups)
    noise = np.random.default_rng(5).normal(0.0, 0.1, chosen.router.shape).astype(np.float32)
    individual = Individual(chosen.router + noise, chosen.experts)
    before, original = _snapshot(model), _logits(model.module)
    with Candidates(model, groups, active).shown(individual):
        shown = _logits(model.module)
    _assert_same(model, before)
    layers = {layer: place for place, group in enumerate(groups) for layer in group.layers}
    mapping, rows = (
        {layer: torch.tensor(values[place]) for layer, place in layers.items()}
        for values in (individual.router, individual.experts)
    )
    map_routers_of(other, mapping, rows, active=active)
    assert (shown - _logits(other.module)).abs().max() <= 1e-5
    assert (shown - original).abs().max() > 1e-3
    with pytest.raises(StageError, match="weights are mixed"):
        kept_of(individual, groups)


def test_a_random_state_is_left_alone():
    model = opened("PhimoeForCausalLM")
    groups = _groups(model)
    state = torch.random.get_rng_state()
    with Candidates(model, groups).shown(_merged(model, groups)):
        _logits(model.module)
    assert torch.equal(torch.random.get_rng_state(), state)
