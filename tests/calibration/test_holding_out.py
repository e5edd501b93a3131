"""Items are set apart from the end of an order, equal ones together."""

from __future__ import annotations

import pytest
from compress.calibration.holding_out import hold_out


@pytest.mark.parametrize(
    ("contents", "wanted", "chosen"),
    [
        ("abcde", 2, {3, 4}),
        ("abcdd", 2, {3, 4}),
        ("abddd", 2, {0, 1}),  # three equal ones are too many, so others go
        ("aabbb", 1, {0, 1}),  # all are too many: the smallest group
        ("abc", 0, set()),
        ("", 3, set()),
    ],
)
def test_what_is_set_apart(contents, wanted, chosen):
    assert hold_out(range(len(contents)), contents, wanted) == chosen


def test_only_of_what_is_offered():
    assert hold_out([4, 0], "abcda", 2) == {0, 4}
    assert hold_out([2, 3], "abcda", 1) == {3}
