"""What a recipe says of decoding: measured without a word where a cache is compressed, refused elsewhere."""

from __future__ import annotations

import pytest
from compress.errors import RecipeError
from compress.recipes.decoding import DecodingSettings
from compress.recipes.loader import load_recipe

CSKV = {"cskv": {"removed": {"k": 0.5, "v": 0.5}}}
RTN = {"rtn": {}}


def loaded(stage, **keys):
    recipe = {"model": "builtin:stories", "stages": [stage], "export": {"path": "o"}, **keys}
    return load_recipe(recipe).recipe


def refused(stage, **keys):
    with pytest.raises(RecipeError) as caught:
        loaded(stage, **keys)
    return caught.value


def test_without_a_word_it_is_measured_where_it_says_something():
    assert loaded(CSKV).evaluate.decoding == DecodingSettings()
    assert loaded(CSKV, evaluate={"fidelity": None}).evaluate.decoding is None
    assert loaded(CSKV, evaluate={"decoding": None}).evaluate.decoding is None
    assert loaded(RTN).evaluate.decoding is None
    assert loaded(RTN, evaluate={"decoding": None}).evaluate.decoding is None


@pytest.mark.parametrize("evaluate", [{}, {"decoding": None}, {"decoding": {"prompt": 5}}])
def test_the_resolved_recipe_says_the_same_again(evaluate):
    once = loaded(CSKV, evaluate=evaluate)
    again = load_recipe(once.model_dump(mode="json")).recipe
    assert again.evaluate == once.evaluate
    assert again.model_dump(mode="json") == once.model_dump(mode="json")


def test_two_recipes_do_not_share_what_was_decided_for_one():
    assert loaded(CSKV).evaluate.decoding is not None
    assert loaded(RTN).evaluate.decoding is None


@pytest.mark.parametrize(
    ("stage", "keys", "message", "hint"),
    [
        (RTN, {"evaluate": {"decoding": {}}}, "no stage compresses", "add a stage `cskv`"),
        (CSKV, {"evaluate": {"decoding": {}, "fidelity": None}}, "which is off", "add `fidelity: {}`"),
        (CSKV, {"evaluate": {"decoding": {"samples": 17}}}, "has 16", "raise fidelity.samples"),
        (CSKV, {"evaluate": {"decoding": {"prompt": 255}}}, "a sequence has 256", "lower prompt"),
        (RTN, {"require": {"decode_kl": "<= 1"}}, "evaluate.decoding is off", "add a stage `cskv`"),
        (
            CSKV,
            {"require": {"decode_kl": "<= 1"}, "evaluate": {"decoding": None}},
            "evaluate.decoding is off",
            "add `decoding: {}`",
        ),
        (
            CSKV,
            {"require": {"passkey": ">= 1"}},
            "evaluate.decoding.passkey is off",
            "add `decoding: {passkey: {}}`",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(stage, keys, message, hint):
    error = refused(stage, **keys)
    assert message in error.message and hint in error.hint


def test_a_gate_on_what_is_measured_is_none_to_refuse():
    assert loaded(CSKV, require={"decode_perplexity_increase": "<= 0.1"}).require
    asked = {"decoding": {"passkey": {"samples": 2, "lengths": [128]}}}
    assert loaded(CSKV, require={"passkey_drop": "<= 0.1"}, evaluate=asked).require


def test_short_sequences_have_a_shorter_prompt():
    assert DecodingSettings().prompt_tokens(256) == 32 and DecodingSettings().prompt_tokens(10) == 5
    assert DecodingSettings(prompt=7).prompt_tokens(10) == 7
    assert loaded(CSKV, calibration={"length": 8}).evaluate.decoding is not None


@pytest.mark.parametrize("name", ["sqnr_db", "kl", "perplexity", "perplexity_increase"])
def test_gates_that_cannot_fail_are_refused(name):
    recipe = {
        "model": "builtin:stories", "stages": [{"cskv": {}}], "require": {name: "<= 1"},
        "export": {"path": "out/x"},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=f"{name} cannot fail"):
        load_recipe(recipe)
    load_recipe({**recipe, "stages": [{"rtn": {}}, {"cskv": {}}]})
    load_recipe({**recipe, "export": {"path": "out/x", "format": "bitsandbytes-nf4"}})
