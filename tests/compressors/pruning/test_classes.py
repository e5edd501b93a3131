"""Who competes with whom."""

from __future__ import annotations

import pytest
from compress.compressors.pruning.classes import classes
from compress.compressors.pruning.graph import find_groups


def counts(groups, ranking):
    return {name: len(members) for name, members in classes(groups, ranking).items()}


def test_vit(prunable):
    groups = find_groups(prunable("ViTForImageClassification"))
    assert counts(groups, "isomorphic") == {"width": 1, "attention": 3, "ff": 3}


def test_shifted_windows_compete_with_others(prunable):
    groups = find_groups(prunable("SwinForImageClassification"))
    found = classes(groups, "isomorphic")
    assert {name: len(members) for name, members in found.items()} == {
        "width.0": 1, "attention": 4, "ff": 4, "width.1": 1,
    }  # fmt: skip
    assert {group.size for group in found["attention"]} == {16, 32}


def test_convnext_blocks_of_all_widths_compete(prunable):
    groups = find_groups(prunable("ConvNextForImageClassification"))
    found = classes(groups, "isomorphic")
    assert [group.size for group in found["ff"]] == [64, 96, 96, 128, 128, 128, 160]
    assert [name for name in found if name != "ff"] == ["width.0", "width.1", "width.2", "width.3"]


def test_dit(prunable):
    """Block 0's embedder also serves the head, which is no reason for a class of its own."""
    groups = find_groups(prunable("DiTTransformer2DModel"))
    assert counts(groups, "isomorphic") == {"attention": 2, "ff": 2}


@pytest.mark.parametrize("class_name", ["ConvNextForImageClassification", "SwinForImageClassification"])
def test_rankings_of_the_baselines(prunable, class_name):
    groups = find_groups(prunable(class_name))
    local, together = classes(groups, "local"), classes(groups, "global")
    assert local == {group.name: [group] for group in groups}
    assert list(together) == list(dict.fromkeys(group.kind for group in groups))
    for ranking in ("isomorphic", "global", "local"):
        members = [group for found in classes(groups, ranking).values() for group in found]
        assert sorted(group.name for group in members) == sorted(group.name for group in groups)
