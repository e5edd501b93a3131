"""N:M groups: their candidates, how they fill a model, what stays, and who stands for whom."""

import json

import pytest
import torch
from compress.compressors.pruning.block_groups import groups_of, kept_of, matched
from compress.errors import PlanError
from compress.models.blocks import checked

D28 = {"_class_name": "DiTTransformer2DModel", "num_layers": 28}
FLUX = {"_class_name": "FluxTransformer2DModel", "num_layers": 4, "num_single_layers": 6}
HUNYUAN = {"_class_name": "HunyuanDiT2DModel", "num_layers": 10}
D19 = tuple(f"{kept}:4" for kept in (3, 3, 2, 3, 2, 3, 3))


@pytest.mark.parametrize(("group", "rows"), [("1:2", 2), ("2:4", 6), ("3:4", 4), ("7:14", 3432)])
def test_candidates_are_all_ways_each_once(group, rows):
    kept, size = map(int, group.split(":"))
    first = groups_of(D28, group)[0] if 28 % size == 0 else None
    table = first.candidates()
    assert table.shape == (rows, size) and first.choices == rows
    assert len(torch.unique(table, dim=0)) == rows
    assert bool((table.sum(dim=1) == kept).all())
    assert set(table.unique().tolist()) == {0.0, 1.0}
    assert [len(first.places(row)) for row in range(rows)] == [kept] * rows


def test_groups_follow_each_other():
    groups = groups_of(D28, "2:4")
    assert [group.members for group in groups] == [tuple(range(i, i + 4)) for i in range(0, 28, 4)]
    mixed = groups_of(D28, ("2:4",) * 6 + ("1:2", "2:2"))
    assert [len(group.members) for group in mixed] == [4] * 6 + [2, 2]
    kept = kept_of(D28, groups, [0] * 7)
    assert kept == {"transformer_blocks": tuple(i for i in range(28) if i % 4 < 2)}
    assert kept == checked(D28, kept)


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (D28, "2:5", "has 28 blocks, and 2:5 repeated does not fill them"),
        (D28 | {"num_layers": 14}, ("2:4",) * 7, "has 14 blocks, and the groups have 28 together"),
        (D28, ("2:4",) * 6, "has 28 blocks, and the groups have 24 together"),
        (D28, "4:2", "4:2 keeps more"),
        (D28, "28:28", "nothing would be removed"),
        (D28, "14:28", "40,116,600 choices"),
        (D28, {"blocks": "1:2"}, "the model has no blocks"),
        (FLUX, ("1:2", "1:2"), "2 lists of blocks"),
        (HUNYUAN | {"num_layers": 7}, "1:2", "odd depth of 7"),
        (HUNYUAN, "1:3", "4 pairs of blocks that may go"),
    ],
)
def test_groups_that_do_not_fit_are_refused(config, asked, message):
    with pytest.raises(PlanError, match=message):
        groups_of(config, asked)


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (D28, "2:5"), (D28 | {"num_layers": 2}, "3:4"), (D28 | {"num_layers": 3}, "2:4"),
        (HUNYUAN | {"num_layers": 40}, "1:2"), (HUNYUAN | {"num_layers": 12}, "1:4"),
    ],
)  # fmt: skip
def test_the_list_of_groups_that_a_refusal_shows_fits(config, asked):
    with pytest.raises(PlanError) as caught:
        groups_of(config, asked)
    shown = json.loads(caught.value.hint.partition("such as ")[2])
    groups = groups_of(config, tuple(shown))
    assert any(group.kept < len(group.units) for group in groups)
    units = (
        config["num_layers"] if config["_class_name"] == D28["_class_name"] else config["num_layers"] // 2 - 1
    )
    assert sum(len(group.units) for group in groups) == units


def test_one_pair_alone_is_told_as_one():
    with pytest.raises(
        PlanError, match="blocks has 1 pair of blocks that may go, and 1:2 repeated"
    ) as caught:
        groups_of(HUNYUAN | {"num_layers": 4}, "1:2")
    assert "with one alone there is no choice" in caught.value.hint


def test_groups_are_told_by_their_places():
    assert [group.told for group in groups_of(D28 | {"num_layers": 4}, ("1:3", "1:1"))] == ["0 to 2", "3"]
    assert [group.told for group in groups_of(HUNYUAN, "1:2")] == ["0, 1, 8, 9", "2, 3, 6, 7"]


def test_lists_have_groups_of_their_own():
    groups = groups_of(FLUX, "1:2")
    assert [(group.blocks, group.members) for group in groups] == [
        ("transformer_blocks", (0, 1)), ("transformer_blocks", (2, 3)),
        ("single_transformer_blocks", (0, 1)), ("single_transformer_blocks", (2, 3)),
        ("single_transformer_blocks", (4, 5)),
    ]  # fmt: skip
    only = groups_of(FLUX, {"single_transformer_blocks": ("1:4", "2:2")})
    assert kept_of(FLUX, only, [3, 0]) == {"single_transformer_blocks": (3, 4, 5)}


def test_blocks_in_pairs_go_in_pairs_and_the_middle_stays():
    groups = groups_of(HUNYUAN, "1:2")
    assert [group.units for group in groups] == [((0, 9), (1, 8)), ((2, 7), (3, 6))]
    kept = kept_of(HUNYUAN, groups, [1, 0])
    assert kept == {"blocks": (1, 2, 4, 5, 7, 8)} == checked(HUNYUAN, kept)
    assert matched(HUNYUAN, groups) == {"blocks": [(0, 1), (1, 3), (4, 7), (5, 9)]}


def test_matching_is_that_of_the_paper_and_needs_no_choice():
    halved = matched(D28, groups_of(D28, "1:2"))
    assert halved == {"transformer_blocks": [(i, 2 * i + 1) for i in range(14)]}
    pairs = matched(D28, groups_of(D28, D19))["transformer_blocks"]
    assert pairs == [(2, 3), (5, 7), (7, 11), (10, 15), (12, 19), (15, 23), (18, 27)]
    again = matched(D28 | {"num_layers": 14}, groups_of(D28 | {"num_layers": 14}, "1:2"))
    assert again == {"transformer_blocks": [(i, 2 * i + 1) for i in range(7)]}
