"""Patterns are anchored: a name is matched whole or not at all."""

from __future__ import annotations

from compress.recipes.patterns import match, select, unmatched
from hypothesis import given
from hypothesis import strategies as st

NAMES = ["blocks.1.ff", "blocks.11.ff", "blocks.1.attn.to_q", "proj_out"]


def test_anchored():
    assert match("blocks.1.ff", "blocks.1.ff") and not match("blocks.1", "blocks.11.ff")
    assert match("blocks.1.*", "blocks.1.attn.to_q") and not match("blocks.1.*", "blocks.11.ff")
    assert match("*.ff", "blocks.11.ff") and not match("ff", "blocks.11.ff")
    assert match("*", "") and not match("", "a")


def test_nothing_but_the_star_is_special():
    assert not match("blocks.1.f?", "blocks.1.ff") and not match("blocks.[1].ff", "blocks.1.ff")
    assert not match("blocks.1.ff", "blocksx1.ff")


def test_select_gives_the_first_pattern_in_the_names_own_order():
    assert select(["*.ff", "blocks.*"], NAMES) == {
        "blocks.1.ff": "*.ff",
        "blocks.11.ff": "*.ff",
        "blocks.1.attn.to_q": "blocks.*",
    }


def test_unmatched():
    assert unmatched(["*.ff", "block.*", "proj_out"], iter(NAMES)) == ["block.*"]


@given(name=st.text(max_size=12), cut=st.integers(0, 12))
def test_a_star_stands_for_any_part(name, cut):
    head = name.replace("*", "")[:cut]
    whole = name.replace("*", "")
    assert match(head + "*", whole) and match("*" + whole[len(head) :], whole) and match(whole, whole)
