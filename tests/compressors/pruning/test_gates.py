"""Choices of blocks that can be learned, and low-rank changes of linear layers."""

from math import comb, exp

import pytest
import torch
from compress.compressors.pruning.block_groups import BlockGroup, groups_of
from compress.compressors.pruning.gates import Annealing, ChoiceGates, gumbel
from compress.compressors.pruning.lora import low_rank, low_rank_parameters
from compress.compressors.recovery.tied import tied_embedders
from compress.errors import PlanError
from torch import nn

from ...dit_xl import CONFIG, WHOLE
from ...small_dits import LIST, equal_embedders_of

ANNEALING = Annealing((4.0, 0.1), (100.0, 100.0), 11)


def gates(groups, depth, annealing=ANNEALING, pinned=()):
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": depth}
    return ChoiceGates(groups_of(config, groups), {LIST: depth}, annealing, pinned)


def noise(choices, items, seed=0):
    return gumbel(
        choices.numbers, [torch.Generator().manual_seed(seed * items + row) for row in range(items)]
    )


@pytest.mark.parametrize(
    ("groups", "depth", "kept"),
    [("1:2", 8, 4), ("2:4", 8, 4), ("3:4", 8, 6), ("7:14", 14, 7), (("2:4", "1:2", "1:1"), 7, 4)],
)
def test_every_item_keeps_as_many_blocks_as_asked(groups, depth, kept):
    choices = gates(groups, depth)
    masks = choices.masks(noise(choices, 64), 5)[LIST]
    assert masks.shape == (64, depth)
    assert set(masks.unique().tolist()) == {0.0, 1.0}  # exactly
    assert (masks.sum(dim=1) == kept).all()
    assert len(masks.unique(dim=0)) > 1


def test_equal_logits_draw_all_choices_alike():
    choices = gates("2:4", 4)
    masks = choices.masks(noise(choices, 6000), 0)[LIST].detach()
    rows, counts = masks.unique(dim=0, return_counts=True)
    assert len(rows) == comb(4, 2)
    share, spread = 6000 / 6, (6000 * (1 / 6) * (5 / 6)) ** 0.5
    assert all(abs(count - share) < 3 * spread for count in counts.tolist())


def test_a_larger_logit_is_drawn_as_often_as_its_softmax_says():
    choices = gates("1:2", 2, Annealing((1.0, 1.0), (2.0, 2.0), 2))
    with torch.no_grad():
        choices.logits[0][1] += 0.5  # odds of e
    drawn = choices.masks(noise(choices, 4000), 0)[LIST][:, 1].mean().item()
    expected = 1 / (1 + torch.tensor(-1.0).exp().item())
    assert drawn == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)


def test_of_six_choices_the_larger_logit_is_drawn_as_often_as_its_softmax_says():
    """With two choices the difference of their numbers is symmetric, and their sign would not show."""
    choices = gates("2:4", 4, Annealing((1.0, 1.0), (2.0, 2.0), 2))
    with torch.no_grad():
        choices.logits[0][0] += 0.5  # blocks 0 and 1, with odds of e against each of the others
    drawn = choices.masks(noise(choices, 6000), 0)[LIST].detach()
    share = (drawn[:, :2].sum(dim=1) == 2).float().mean().item()
    expected = exp(1) / (exp(1) + 5)
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 6000) ** 0.5)


def test_the_temperature_changes_gradients_and_not_what_is_drawn():
    choices = gates("2:4", 8)
    numbers, weights = noise(choices, 16), torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for step in (0, 10):
        choices.zero_grad()
        masks = choices.masks(numbers, step)[LIST]
        (masks * weights).sum().backward()
        found.append((masks.detach(), [item.grad.clone() for item in choices.logits]))
    assert torch.equal(found[0][0], found[1][0])
    for soft, hard in zip(found[0][1], found[1][1], strict=True):
        assert soft.shape == (6,) and (soft != 0).all() and not torch.allclose(soft, hard)


def test_temperature_and_scaling_are_lines():
    annealing = Annealing((4.0, 0.1), (100.0, 300.0), 101)
    assert annealing.at(0) == (4.0, 100.0) and annealing.at(100) == (0.1, 300.0)
    assert annealing.at(50) == pytest.approx((2.05, 200.0))


def test_the_decision_is_of_the_logits_that_are_given():
    choices = gates("1:2", 4)
    with torch.no_grad():
        choices.logits[0][1] += 1
    assert choices.decide(0).choices == (1, 0)
    average = [torch.tensor([0.03, 0.02]), torch.tensor([0.0, 0.02])]
    found = choices.decide(0, average)
    assert found.choices == (0, 1)
    assert found.confidences == pytest.approx([1 / (1 + torch.tensor(-x).exp().item()) for x in (1.0, 2.0)])


def test_blocks_that_have_to_stay_always_do():
    choices = gates("2:4", 8, pinned={(LIST, 0)})
    with torch.no_grad():
        choices.logits[0][3:] += 5.0  # the choices without block 0
    masks = choices.masks(noise(choices, 200), 3)[LIST]
    assert (masks[:, 0] == 1).all() and (masks[:, 4] == 0).any()
    masks.square().sum().backward()
    assert all(item.grad.isfinite().all() for item in choices.logits)
    assert choices.decide(3).choices[0] < 3
    with pytest.raises(PlanError, match="have to stay"):
        gates("1:4", 4, pinned={(LIST, 0), (LIST, 2)})


def test_blocks_of_no_group_stay():
    group = BlockGroup(LIST, ((1, 6), (2, 5)), 1)
    choices = ChoiceGates([group], {LIST: 8, "others": 3}, ANNEALING)
    masks = choices.masks(noise(choices, 20), 0)
    assert masks.keys() == {LIST}
    rows = masks[LIST].unique(dim=0)
    assert rows.tolist() == [[1, 0, 1, 1, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0, 1, 1]]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4, bias=False)).requires_grad_(False)


def test_a_low_rank_change_is_nothing_at_first_and_gone_afterwards():
    module, inputs = layers(), torch.randn(5, 8)
    before, expected = dict(module.state_dict()), module(inputs)
    with low_rank(module, rank=3, alpha=None, seed=0) as parameters:
        assert torch.equal(module(inputs), expected)
        assert sum(item.numel() for item in parameters.values()) == 3 * (8 + 16 + 16 + 4)
        assert sum(item.numel() for item in parameters.values()) == low_rank_parameters(module, 3)
        with torch.no_grad():
            parameters["2.low_rank_up"].normal_()
        up, down = parameters["2.low_rank_up"], parameters["2.low_rank_down"]
        hidden = module[1](module[0](inputs))
        assert torch.allclose(module(inputs), expected + 2 * hidden @ (up @ down).T, atol=1e-5)
        module(inputs).sum().backward()
        assert parameters["0.low_rank_up"].grad.abs().sum() > 0 and module[0].weight.grad is None
        assert down.abs().max() <= 16**-0.5
    assert module.state_dict().keys() == before.keys() and torch.equal(module(inputs), expected)
    assert all("forward" not in vars(layer) for layer in module)


def test_alpha_scales_the_change_and_the_seed_draws_it():
    module, inputs = layers(), torch.randn(5, 8)
    found = []
    for seed, alpha in ((0, 3.0), (0, 6.0), (1, 3.0)):
        with low_rank(module, rank=3, alpha=alpha, seed=seed) as parameters, torch.no_grad():
            parameters["2.low_rank_up"].fill_(1.0)
            found.append(module(inputs))
    plain = module(inputs)
    assert torch.allclose(found[1] - plain, 2 * (found[0] - plain), atol=1e-5)
    assert not torch.allclose(found[2], found[0])


def test_of_dit_xl_a_hundredth_learns():
    """6.52 M at rank 8, of 674.8 M; the paper's layout with one matrix for q, k and v has 6.00 M."""
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        module = DiTTransformer2DModel.from_config(CONFIG)
    copies = frozenset(
        name for name, _ in module.named_parameters()
        if ".norm1.emb." in name and not name.startswith(f"{LIST}.0.")
    )  # fmt: skip
    learned = low_rank_parameters(module, 8, copies)
    stored = sum(item.numel() for name, item in module.named_parameters() if name not in copies)
    assert stored == WHOLE.parameters and learned == pytest.approx(6.52e6, rel=1e-3)
    assert 0.0085 < learned / stored < 0.01


def test_layers_under_several_names_change_once(make_tiny):
    from compress.models.open import open_model
    from compress.progress import SilentProgress
    from compress.recipes.schema import ModelRef

    model = open_model(ModelRef(id=str(make_tiny())), progress=SilentProgress())
    equal_embedders_of(model.module)
    with (
        tied_embedders(model.module, model.config["_class_name"]),
        low_rank(model.module, rank=2, alpha=None, seed=0) as parameters,
    ):
        assert any(".0.norm1.emb." in name for name in parameters)
        assert not any(".1.norm1.emb." in name for name in parameters)
