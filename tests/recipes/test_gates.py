"""Gates: parsing, comparing, writing back."""

from __future__ import annotations

import math

import pytest
from compress.recipes.gates import METRICS, NEEDS, Gate
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError


@pytest.mark.parametrize(
    ("text", "below", "equal", "above"),
    [
        ("<= 0.35", True, True, False),
        ("<.35", True, False, False),
        (">= 3.5e-1", False, True, True),
        (" > +0.35 ", False, False, True),
        ("==0.35", False, True, False),
    ],
)
def test_comparisons(text, below, equal, above):
    gate = Gate.parse(text)
    assert (gate.holds(0.3), gate.holds(0.35), gate.holds(0.4)) == (below, equal, above)
    assert not gate.holds(math.nan)


@pytest.mark.parametrize(
    "text", ["0.35", "<= ", "=< 3", "<= nan", "<= 1e999", "3 <=", "<= 0.3 0.4", "!= 3", ""]
)
def test_what_is_no_comparison(text):
    with pytest.raises(ValueError, match="not a comparison"):
        Gate.parse(text)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (None, r"null is not a comparison; leave the gate out .*--set require=\{\}"),
        (5, "write one such as '<= 5'"),
        (0.01, "write one such as '<= 0.01'"),
        ([1], "write one such as '<= 0.35'"),
        (True, "write one such as '<= 0.35'"),
    ],
)
def test_what_is_no_text_is_told_what_to_write(value, hint):
    with pytest.raises(ValidationError, match=hint):
        TypeAdapter(Gate).validate_python(value)


@given(sign=st.sampled_from(["<=", ">=", "<", ">", "=="]), value=st.integers(-(10**9), 10**9))
def test_text_and_back(sign, value):
    gate = Gate(sign, value / 1000)
    assert Gate.parse(str(gate)) == gate


def test_every_metric_is_described():
    assert all(text and not text.endswith(".") for text in METRICS.values())
    parts = {"fidelity", "quality", "answers", "speed", "decoding", "decoding.passkey"}
    assert set(NEEDS) <= set(METRICS) and set(NEEDS.values()) == parts
