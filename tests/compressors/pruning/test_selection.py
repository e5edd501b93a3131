"""Totals, floors, rounding, heads: on groups made by hand and scores from a generator."""

import pytest
import torch
from compress.compressors.pruning.competition import competition
from compress.compressors.pruning.details import effective_ratios, widths_after
from compress.compressors.pruning.groups import Group, Selection
from compress.compressors.pruning.heads import by_dimension, by_head
from compress.compressors.pruning.scopes import Member, Scope, rank
from compress.compressors.pruning.selection import compose, even_scores, select
from compress.compressors.pruning.widths import Widths
from compress.errors import PlanError
from compress.models.structure import AttentionSite
from compress.recipes.pruning import IsomorphicSettings

LAYERS, WIDTH, INNER, HEADS, HEAD_DIM = 4, 48, 96, 6, 8


def attention(layer, heads=HEADS, head_dim=HEAD_DIM):
    name = f"layers.{layer}.attention"
    site = AttentionSite(
        name, layer, *(f"{name}.{part}" for part in "qkvo"), heads, head_dim, {"head_dim": "head_dim"}
    )
    return Group(f"{name}.q", "attention", heads * head_dim, (), ("q", "k", "v", "o"), layer, site)


def inner(layer, size=INNER, label=("out", "in")):
    return Group(f"layers.{layer}.fc1", "ff", size, (), label, layer)


def model():
    groups = [Group("embedding", "width", WIDTH, (), ("stream",))]
    for layer in range(LAYERS):
        groups += [attention(layer), inner(layer)]
    return groups


def random_scores(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in groups}


def settings(round_to=1, **keys):
    ratios = {
        name: keys.pop(name) for name in ("width", "ff", "heads", "head_dim", "modules") if name in keys
    }
    return IsomorphicSettings(ratios=ratios or None, round_to=round_to, **keys)


def after(groups, scores, chosen, **keys):
    return widths_after(groups, select(groups, scores, chosen, **keys))


def of_kind(widths, kind):
    return [count for name, count in widths.channels.items() if ("fc1" in name) == (kind == "ff")]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("ranking", ["isomorphic", "global", "local"])
def test_totals_are_exact(share, ranking):
    groups = model()
    chosen = settings(ff=share, heads=share, head_dim=share, ranking=ranking)
    found = after(groups, random_scores(groups), chosen)
    scopes = LAYERS if ranking == "local" else 1
    wanted = [scopes * int(LAYERS * size / scopes * (1 - share) + 1e-9) for size in (INNER, HEADS, HEAD_DIM)]
    totals = [sum(of_kind(found, "ff")), sum(found.heads.values()), sum(found.head_dims.values())]
    assert totals == wanted


def test_a_weak_layer_loses_more_and_stays_alive():
    groups = model()
    scores = random_scores(groups)
    scores["layers.2.fc1"] *= 1e-3
    found = after(groups, scores, settings(round_to=8, ff=0.3))
    # The weak layer falls to the least, and what it keeps too much is taken from the others.
    assert found.channels["layers.2.fc1"] == 8
    others = [count for name, count in found.channels.items() if name in ("layers.0.fc1", "layers.1.fc1")]
    assert all(8 < count < INNER for count in others)
    total = sum(of_kind(found, "ff"))
    assert int(LAYERS * INNER * 0.7) - 8 * LAYERS < total <= int(LAYERS * INNER * 0.7)


def test_without_rounding_the_floor_takes_from_the_others():
    groups = model()
    scores = random_scores(groups)
    scores["layers.2.fc1"] *= 1e-3
    found = after(groups, scores, settings(round_to=8, ff=0.3), rounding=False)
    assert found.channels["layers.2.fc1"] == 8 and sum(of_kind(found, "ff")) == int(LAYERS * INNER * 0.7)


def test_equal_scores_remove_no_more_than_asked():
    groups = model()
    equal = {group.name: torch.ones(group.size) for group in groups}
    chosen = select(groups, equal, settings(ff=0.5))
    assert [len(kept) for kept in chosen.kept.values()] == [INNER // 2] * LAYERS
    assert chosen == select(groups, equal, settings(ff=0.5))


def test_the_best_channels_of_a_layer_stay():
    groups = model()
    scores = random_scores(groups)
    chosen = select(groups, scores, settings(ff=0.4, width=0.25))
    for name in ("embedding", "layers.1.fc1"):
        stays = chosen.mask(name)
        assert scores[name][stays].min() > scores[name][~stays].max()
        assert list(chosen.kept[name]) == sorted(chosen.kept[name])


def test_rounding_is_on_the_head_and_down():
    groups = [attention(layer, heads=3, head_dim=20) for layer in range(3)]
    scores = random_scores(groups)
    exact = after(groups, scores, settings(round_to=1, head_dim=0.3))
    down = after(groups, scores, settings(round_to=4, head_dim=0.3))
    assert sum(exact.head_dims.values()) == 42
    for name, count in down.head_dims.items():
        # Floors are filled first, so a layer may be rounded from one more or less than without them.
        assert count % 4 == 0 and count >= 4 and abs(count - exact.head_dims[name]) < 5
    assert set(down.heads.values()) == {3}


def test_nearest_keeps_the_total_close():
    groups = [inner(layer) for layer in range(12)]
    for seed in range(20):
        scores = random_scores(groups, seed)
        near = sum(after(groups, scores, settings(round_to=8, ff=0.37, rounding="nearest")).channels.values())
        down = sum(after(groups, scores, settings(round_to=8, ff=0.37)).channels.values())
        wanted = int(12 * INNER * 0.63)
        assert abs(near - wanted) <= 4 and down <= wanted and near % 8 == 0


def test_nearest_leaves_an_odd_layer_whole_or_rounds_it():
    scope = Scope(
        "ff", "ff", "ff", 0.1, 8, (Member("a", 100, 100, 8), Member("b", 99, 100, 8)), torch.zeros(0)
    )
    assert scope.rounded({"a": 100, "b": 98}, "down") == {"a": 100, "b": 96}
    assert scope.rounded({"a": 97, "b": 96}, "nearest") == {"a": 96, "b": 96}
    assert scope.rounded({"a": 99, "b": 96}, "nearest") == {"a": 100, "b": 96}
    assert scope.rounded({"a": 96, "b": 99}, "nearest") == {"a": 96, "b": 96}  # 100 is gone for good


@pytest.mark.parametrize("width", [0.0, 0.5])
def test_heads_do_not_depend_on_the_width(width):
    groups = model()
    scores = random_scores(groups)
    scores["layers.3.attention.q"] *= 1e-3
    found = after(groups, scores, settings(width=width, heads=0.4))
    assert sum(found.heads.values()) == int(LAYERS * HEADS * 0.6)
    assert found.heads["layers.3.attention.q"] == 1
    assert set(found.head_dims.values()) == {HEAD_DIM}


def test_heads_are_scored_by_the_mean_of_their_channels():
    groups = [attention(0), attention(1)]
    scores = {group.name: torch.ones(group.size) for group in groups}
    scores["layers.0.attention.q"][2 * HEAD_DIM : 3 * HEAD_DIM] = 0.1
    scores["layers.1.attention.q"][5 * HEAD_DIM :] = 0.2
    chosen = select(groups, scores, settings(heads=0.16))
    assert chosen.heads == {
        "layers.0.attention.q": (0, 1, 3, 4, 5), "layers.1.attention.q": (0, 1, 2, 3, 4),
    }  # fmt: skip
    assert chosen.kept["layers.1.attention.q"] == tuple(range(5 * HEAD_DIM))


def test_every_head_drops_its_own_channels_or_all_the_same():
    groups = [attention(0), attention(1)]
    scores = random_scores(groups)
    own = select(groups, scores, settings(head_dim=0.5))
    same = select(groups, scores, settings(head_dim=0.5, head_dim_mode="shared"))
    for group in groups:
        table = scores[group.name].reshape(HEADS, HEAD_DIM)
        for chosen, alike in ((own, False), (same, True)):
            masks = chosen.mask(group.name).reshape(HEADS, HEAD_DIM)
            assert len(set(masks.sum(dim=1).tolist())) == 1
            assert (len({tuple(row) for row in masks.tolist()}) == 1) == alike
        masks = own.mask(group.name).reshape(HEADS, HEAD_DIM)
        assert all(row[mask].min() > row[~mask].max() for row, mask in zip(table, masks, strict=True))
        mean, shared = table.mean(dim=0), same.mask(group.name)[:HEAD_DIM]
        assert mean[shared].min() > mean[~shared].max()
    assert widths_after(groups, own) == widths_after(groups, same)


def test_whole_heads_and_their_channels_go_at_once():
    groups = model()
    found = select(groups, random_scores(groups), settings(heads=0.5, head_dim=0.25))
    widths = widths_after(groups, found)
    for group in groups:
        if group.kind == "attention":
            heads, head_dim = widths.heads[group.name], widths.head_dims[group.name]
            assert len(found.kept[group.name]) == heads * head_dim
            owners = {place // HEAD_DIM for place in found.kept[group.name]}
            assert owners == set(found.heads[group.name])


def test_scaling_a_class_changes_global_choices_alone():
    groups = model()
    scores = random_scores(groups)
    scaled = {name: value * (10 if "fc1" in name else 1) for name, value in scores.items()}
    for ranking, equal in (("isomorphic", True), ("local", True), ("global", False)):
        chosen = settings(width=0.5, heads=0.5, head_dim=0.25, ranking=ranking)
        assert (select(groups, scores, chosen) == select(groups, scaled, chosen)) == equal, ranking


def test_layers_of_other_forms_do_not_compete():
    groups = [inner(0), inner(1), inner(2, label=("out", "norm", "in"))]
    scores = random_scores(groups)
    scores["layers.2.fc1"] *= 100
    found = after(groups, scores, settings(ff=0.5))
    assert found.channels["layers.2.fc1"] == INNER // 2


def test_patterns_give_shares_of_their_own():
    groups = model()
    scores = random_scores(groups)
    chosen = settings(ff=0.5, modules={"layers.0.*": 0.75, "*.1.fc1": 0.0})
    found = after(groups, scores, chosen)
    assert found.channels["layers.0.fc1"] == INNER // 4 and found.channels["layers.1.fc1"] == INNER
    assert found.head_dims["layers.0.attention.q"] == HEAD_DIM // 4
    assert found.channels["layers.2.fc1"] + found.channels["layers.3.fc1"] == INNER


def test_kept_layers_lose_nothing():
    groups = model()
    chosen = settings(ff=0.5, heads=0.5, keep=("layers.0.*",))
    found = after(groups, random_scores(groups), chosen)
    assert found.channels["layers.0.fc1"] == INNER and found.heads["layers.0.attention.q"] == HEADS
    assert sum(found.heads.values()) == HEADS + (LAYERS - 1) * HEADS // 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ff": 0.5, "modules": {"layer.0.fc1": 0.5}}, r"matches no layer.*|layers\.0\.fc1"),
        ({"ff": 0.5, "keep": ("layers.9.*",)}, "keep: the pattern 'layers.9.*' matches no layer"),
        ({"ff": 0.5, "modules": {"*fc1": 0.5, "layers.0.fc1": 0.2}}, "belong to patterns before it"),
        ({"ff": 0.99, "round_to": 8}, "ff: 0.99 of the 384 channels .* leaves 3; .* at least 32"),
        ({"heads": 0.99}, "heads: 0.99 of the 24 heads .* leaves 0; .* at least 4"),
        ({"head_dim": 0.5, "round_to": 8}, "no layer of attention can lose head channels: they have 8 each"),
        ({"ff": 0.01, "round_to": 8, "rounding": "nearest"}, "nothing would be removed"),
    ],
)
def test_what_cannot_be_asked(keys, message):
    groups = model()
    with pytest.raises(PlanError, match=message):
        select(groups, random_scores(groups), settings(**keys))


@pytest.mark.parametrize(
    ("kinds", "keys", "message"),
    [
        ({"ff"}, {"heads": 0.5}, "heads: 0.5 is asked of attention heads .* there are none"),
        ({"ff"}, {"ff": 0.5, "head_dim": 0.5}, "head_dim: 0.5 is asked of .* there are none"),
        ({"ff", "attention"}, {"width": 0.5}, "width: 0.5 is asked of residual channels"),
        ({"width"}, {"ff": 0.5}, "ff: 0.5 is asked of feed-forward networks"),
    ],
)
def test_a_share_of_what_the_model_does_not_have(kinds, keys, message):
    groups = [group for group in model() if group.kind in kinds]
    with pytest.raises(PlanError, match=message):
        select(groups, random_scores(groups), settings(**keys))


def test_default_proportions_leave_out_what_is_not_there():
    groups = [group for group in model() if group.kind == "ff"]
    found = competition(groups, IsomorphicSettings(target={"macs": 0.5}))
    assert [scope.name for scope in found] == ["ff"]


def test_four_steps_give_the_totals_of_one():
    chosen = settings(round_to=1, ff=0.55, heads=0.5, head_dim=0.3, width=0.35)
    groups = model()
    once = after(groups, random_scores(groups), chosen)
    initial, now, whole = Widths.of(groups), groups, None
    for index in range(4):
        picked = select(
            now,
            random_scores(now, index),
            chosen,
            initial=initial,
            scale=(index + 1) / 4,
            rounding=index == 3,
        )
        whole = compose(whole, picked) if whole else picked
        now = smaller(now, widths_after(now, picked))
    steps = widths_after(groups, whole)
    assert steps == Widths.of(now)
    for one, four in zip(vars(once).values(), vars(steps).values(), strict=True):
        assert sum(one.values()) == sum(four.values())


def smaller(groups, widths):
    """Return groups as a model has them that was cut to `widths`."""
    return [
        attention(group.block, widths.heads[group.name], widths.head_dims[group.name])
        if group.kind == "attention"
        else Group(group.name, group.kind, widths.channels[group.name], (), group.label, group.block)
        for group in groups
    ]


def test_composed_selections_count_in_the_first_layout():
    first = Selection({"a": (1, 3, 5, 7)}, {}, {"a": 8})
    second = Selection({"a": (0, 3), "b": (1,)}, {}, {"a": 4, "b": 2})
    both = compose(first, second)
    assert both.kept == {"a": (1, 7), "b": (1,)} and both.sizes == {"a": 8, "b": 2}


def test_even_scores_spread_shares_evenly():
    groups = [inner(0, 64), inner(1, 96), attention(0, 3, 16), attention(1, 6, 16)]
    found = after(groups, even_scores(groups), settings(ff=0.25, heads=1 / 3, head_dim=0.25))
    assert found.channels == {"layers.0.fc1": 48, "layers.1.fc1": 72}
    assert found.heads == {"layers.0.attention.q": 2, "layers.1.attention.q": 4}
    assert set(found.head_dims.values()) == {12}


def test_effective_shares_tell_totals():
    groups = model()
    chosen = settings(round_to=8, ff=0.3)
    widths = after(groups, random_scores(groups), chosen)
    (row,) = effective_ratios(groups, widths, chosen).values()
    assert (
        row["before"] == LAYERS * INNER and row["exact"] == 268 and row["after"] == sum(of_kind(widths, "ff"))
    )
    assert row["removed"] == pytest.approx(1 - row["after"] / row["before"], abs=1e-6)


def test_order_is_of_units_above_the_floors():
    members = (Member("a", 3, 3, 1), Member("b", 2, 2, 1))
    scope = Scope("ff", "ff", "ff", 0.5, 1, members, torch.zeros(0, dtype=torch.int64))
    ranked = rank(scope, {"a": torch.tensor([0.1, 0.9, 0.5]), "b": torch.tensor([0.5, 0.2])})
    assert ranked.order.tolist() == [0, 1, 0]
    assert ranked.counts(3) == {"a": 2, "b": 1}


def test_heads_and_channels_are_scored_by_means():
    group = attention(0, heads=2, head_dim=3)
    scores = torch.tensor([1.0, 5.0, 3.0, 2.0, 2.0, 8.0])
    assert by_head(group, scores).tolist() == [3.0, 4.0]
    assert by_dimension(group, scores).tolist() == [1.5, 3.5, 5.5]


def test_totals_are_of_the_sizes_before_and_never_above_those_now():
    scope = Scope("ff", "ff", "ff", 0.9, 1, (Member("a", 6, 10, 1),), torch.zeros(5, dtype=torch.int64))
    assert scope.wanted() == 1  # 10 * (1 - 0.9) is a little less than 1 in floating point
    assert scope.total(0.1) == 6  # 9 of 10 would stay, and 6 are left


def test_composed_heads_count_in_the_first_layout():
    first = Selection({"a": (0, 1, 4, 5)}, {"a": (0, 2)}, {"a": 8})
    second = Selection({"a": (2,)}, {"a": (1,)}, {"a": 4})
    both = compose(first, second)
    assert both.heads == {"a": (2,)} and both.kept == {"a": (4,)}


def test_widths_that_are_at_least_others():
    one, other = Widths({"a": 3, "b": 9}, {"c": 2}, {"c": 5}), Widths({"a": 4, "b": 8}, {"c": 1}, {"c": 6})
    assert one.at_least(other) == Widths({"a": 4, "b": 9}, {"c": 2}, {"c": 6})
