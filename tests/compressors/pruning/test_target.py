"""The search for a target: never above, close below, alike in all kinds, whatever the scores are."""

import pytest
import torch
from compress.compressors.pruning.cutting import planned_surgery
from compress.compressors.pruning.graph import find_groups_in
from compress.compressors.pruning.selection import even_scores, ranked
from compress.compressors.pruning.target import Cost, Counter, Search, limits_of
from compress.compressors.pruning.widths import Widths
from compress.errors import PlanError
from compress.recipes.pruning import IsomorphicSettings, TargetSettings
from pydantic import ValidationError

VIT = "ViTForImageClassification"
LARGER = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_hidden_layers": 6}


@pytest.fixture
def found(prunable):
    """Return `found(class_name, limits, **settings)` -> (Found, count, groups, spec) with random scores."""

    def run(class_name, limits, *, config=None, seed=0, **keys):
        model = prunable(class_name, **(config or {}))
        groups = find_groups_in(model.module, model.family)
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.size, generator=generator) + 0.5 for group in groups}
        settings = IsomorphicSettings(target={"macs": 0.5}, **{"round_to": 4, **keys})
        count = Counter(model.spec, groups)
        dense = count.cost(Widths.of(groups))
        asked = {name: share * getattr(dense, name) for name, share in limits.items()}
        search = Search(groups, ranked(groups, scores, settings), settings, count.cost, asked)
        return search.find(), asked, groups, model.spec

    return run


@pytest.mark.parametrize(
    ("ranking", "share"), [("isomorphic", 0.35), ("isomorphic", 0.81), ("global", 0.5), ("local", 0.62)]
)
def test_close_below_and_never_above(ranking, share, found):
    result, asked, _, _ = found(VIT, {"macs": share}, config=LARGER, seed=1, ranking=ranking)
    assert 0.995 <= result.cost.load(asked) <= 1


@pytest.mark.parametrize("share", [0.97, 0.94, 0.9])
def test_a_mild_target_is_met_where_one_step_of_the_widest_axis_takes_more(share, found):
    """A step of 32 of 192 residual channels takes a sixth of the model: other kinds give it instead."""
    result, asked, _, _ = found(VIT, {"macs": share}, config=LARGER, seed=1, round_to=32)
    assert 0.995 <= result.cost.load(asked) <= 1


@pytest.mark.parametrize("share", [0.83, 0.88])
def test_what_rounding_leaves_is_filled_with_single_layers(share, found):
    """Heads of one layer are given back where eight channels more of all its heads would be too many."""
    ratios = {"heads": 0.5, "head_dim": 0.3}
    result, asked, _, _ = found(VIT, {"macs": share}, config=LARGER, seed=1, ratios=ratios, round_to=8)
    assert 0.995 <= result.cost.load(asked) <= 1


@pytest.mark.parametrize("rounding", ["down", "nearest"])
def test_the_tightest_limit_decides(rounding, found):
    limits = {"macs": 0.9, "parameters": 0.5, "bytes": 0.8}
    result, asked, _, _ = found(VIT, limits, config=LARGER, rounding=rounding)
    used = {name: getattr(result.cost, name) / limit for name, limit in asked.items()}
    assert max(used.values()) == used["parameters"] and 0.995 <= used["parameters"] <= 1


@pytest.mark.parametrize(
    "class_name",
    [VIT, "ConvNextForImageClassification", "SwinForImageClassification", "DiTTransformer2DModel"],
)
def test_the_count_is_that_of_the_cut_model(class_name, found):
    result, _, groups, spec = found(class_name, {"macs": 0.6})
    now = Widths.of(groups).flat()
    kept = {name: count for name, count in result.widths.flat().items() if count != now[name]}
    size = spec.cut(planned_surgery(spec, groups, kept, result.widths.heads)).size()
    assert result.cost == Cost(size.macs, size.parameters, size.bytes)


def test_every_kind_loses_its_part(found):
    result, _, groups, _ = found(VIT, {"macs": 0.5}, config=LARGER, round_to=2)
    now = Widths.of(groups)
    removed = [
        1 - sum(after.values()) / sum(before.values())
        for before, after in (
            (pick(now.channels, "fc1"), pick(result.widths.channels, "fc1")),
            (pick(now.channels, "patch"), pick(result.widths.channels, "patch")),
            (now.heads, result.widths.heads),
            (now.head_dims, result.widths.head_dims),
        )
    ]
    inner, width, heads, dims = removed
    assert inner == pytest.approx(width, abs=0.05) and heads == pytest.approx(width, abs=0.05)
    assert dims == pytest.approx(width / 2, abs=0.05)


def pick(widths, part):
    return {name: count for name, count in widths.items() if part in name}


def test_limits_up_to_one_are_shares():
    original = Cost(macs=1000, parameters=200, bytes=800)
    target = TargetSettings(macs="0.5K", parameters=0.25, bytes=1)
    assert limits_of(target, original) == {"macs": 500, "parameters": 50, "bytes": 800}


def test_what_cannot_be_reached_is_told_with_the_range(found):
    with pytest.raises(PlanError, match=r"cannot be reached.*takes [\d,]+ macs, of [\d,]+ macs now"):
        found(VIT, {"macs": 1e-5})
    with pytest.raises(PlanError, match="keeps it already"):
        found(VIT, {"macs": 1.0})


def test_layers_that_are_kept_stay_whole_while_others_go_on(found):
    result, asked, groups, _ = found(VIT, {"macs": 0.6}, config=LARGER, keep=("vit.layers.0.*",))
    now = Widths.of(groups).flat()
    after = result.widths.flat()
    assert all(after[name] == now[name] for name in now if name.startswith("vit.layers.0."))
    assert 0.995 <= result.cost.load(asked) <= 1


def test_even_scores_are_those_of_a_plan(prunable):
    model = prunable(VIT)
    groups = find_groups_in(model.module, model.family)
    assert {name: len(value) for name, value in even_scores(groups).items()} == Widths.of(groups).flat()


@pytest.mark.parametrize("value", [1.2, 50, "60"])
def test_what_is_neither_a_share_nor_an_amount_is_refused(value):
    with pytest.raises(ValidationError, match="neither a share, which is at most 1, nor an amount"):
        TargetSettings.model_validate({"macs": 0.5, "parameters": value})
    assert TargetSettings.model_validate({"macs": 1, "bytes": "1kB"}).bytes == 1000
