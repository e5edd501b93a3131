"""Settings of the compressed cache: what contradicts itself, or would have no effect, is refused."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from compress.errors import RecipeError
from compress.recipes.kv_cache import CskvSettings
from compress.recipes.loader import load_recipe
from compress.recipes.schema import settings_schema
from pydantic import ValidationError


def read(**keys):
    """Return settings as a recipe gives them."""
    return CskvSettings.model_validate_json(json.dumps(keys), strict=True)


def test_defaults():
    found = read()
    assert (found.removed, found.init, found.steps, found.window, found.mode) == (
        0.8,
        "whiten",
        0,
        32,
        "sliding",
    )
    assert (found.alpha, found.lr, found.batch_tokens, found.bits) == (0.5, 5e-5, 1024, None)
    assert (found.phase, found.families) == ("plan", {"llm", "moe"})


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"removed": 0.5},
        {"removed": 0, "bits": 4},
        {"removed": {"k": 0.75, "v": 0.25}},
        {"removed": {"k": 0.75, "v": 0}, "ranks": "channels", "allocate": "energy"},
        {"init": "asvd", "alpha": 0.25},
        {"init": "random", "steps": 10},
        {"steps": 10, "lr": 1e-3, "batch_tokens": 33},
        {"steps": 10, "bits": 2, "qat": False, "batch_tokens": 33},
        {"steps": 10, "bits": 2, "qat": True, "batch_tokens": 96, "key_group": 48},
        {"mode": "block", "window": 7},
        {"mode": "block", "window": 16, "bits": 4},
        {"mode": "block", "window": 16, "bits": 4, "key_group": 16},
        {"window": 0},
    ],
)
def test_what_is_read_is_written_and_read_again(keys):
    found = read(**keys)
    assert CskvSettings.model_validate_json(found.model_dump_json(), strict=True) == found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"removed": 1.0}, "less than 1"),
        ({"removed": -0.1}, "greater than or equal to 0"),
        ({"removed": {"k": 1.0, "v": 0.5}}, "less than 1"),
        ({"removed": {"k": 0.5}}, "Field required"),
        ({"removed": {"k": 0.5, "v": 0.5, "q": 0.5}}, "Extra inputs"),
        ({"removed": "80 %"}, "removed"),
        ({"removed": True}, "removed"),
        ({"removed": 0.0}, "nothing is removed"),
        ({"removed": {"k": 0.0, "v": 0.0}}, "nothing is removed"),
        ({"window": -1}, "greater than or equal to 0"),
        ({"bits": 3}, "2 or 4"),
        ({"init": "svd", "alpha": 0.25}, "alpha has no effect with init: svd"),
        ({"alpha": 0.25}, "alpha has no effect with init: whiten"),
        ({"lr": 1e-3}, "lr has no effect without steps"),
        ({"batch_tokens": 32}, "batch_tokens has no effect without steps"),
        ({"qat": True, "bits": 4}, "qat has no effect without steps"),
        ({"qat": False, "steps": 4}, "qat has no effect without bits"),
        ({"key_group": 16}, "key_group has no effect without bits"),
        ({"init": "random"}, "init: random without steps is noise"),
        ({"mode": "block", "window": 0}, "mode: block needs a window of at least one token"),
        ({"mode": "block", "window": 16, "bits": 4, "key_group": 32}, "key_group 32 is not the window of 16"),
        ({"mode": "block", "window": 5000, "bits": 4}, "at most 4096 tokens"),
        ({"steps": 5, "bits": 4, "batch_tokens": 1000}, "1000 is no multiple of the 32 tokens"),
        ({"steps": 5, "bits": 4, "mode": "block", "window": 48}, "1024 is no multiple of the 48 tokens"),
    ],
)
def test_what_contradicts_itself_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        read(**keys)


def test_a_number_is_a_total_of_which_keys_keep_three_eighths():
    assert read(removed=0.5).kept == (Fraction(3, 8), Fraction(5, 8))
    assert read(removed=0.75).kept == (Fraction(3, 16), Fraction(5, 16))  # the best published split at 75 %
    assert read(removed=0.8).kept == (Fraction(15, 100), Fraction(25, 100))
    assert read(removed=0.1).kept == (Fraction(8, 10), 1)  # values cannot keep more than all
    assert read(removed={"k": 0.9, "v": 0.7}).kept == (Fraction(1, 10), Fraction(3, 10))
    assert read(removed=0.5).is_total
    assert not read(removed={"k": 0.5, "v": 0.5}).is_total


def test_tokens_that_share_a_scale():
    assert read().tokens_per_scale == 32
    assert read(bits=4, window=8).tokens_per_scale == 32
    assert read(bits=4, key_group=64).tokens_per_scale == 64
    assert read(bits=4, mode="block", window=48).tokens_per_scale == 48
    assert read(mode="block", window=5000).tokens_per_scale == 32  # nothing is rounded


def test_training_rounds_where_bits_are_given_and_it_is_not_told_otherwise():
    assert read(steps=1, bits=4).trains_through_rounding
    assert read(steps=1, bits=4, qat=True).trains_through_rounding
    assert not read(steps=1, bits=4, qat=False).trains_through_rounding
    assert not read(steps=1).trains_through_rounding
    assert not read(bits=4).trains_through_rounding


def test_every_key_is_described():
    schema = settings_schema(CskvSettings)
    assert all("description" in row for row in schema["properties"].values())


def test_a_recipe_tells_the_place_of_a_wrong_share(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: builtin:stories\nstages:\n  - cskv:\n      removed: {k: 1.5, v: 0.5}\nexport: {path: out}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.line == 4
    assert "stages[0].cskv.removed.k: 1.5 is not less than 1" in str(caught.value)
