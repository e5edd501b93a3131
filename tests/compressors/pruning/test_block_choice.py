"""Which blocks stay by a rule: counts, pairs, halves, lists of one's own."""

from math import comb

import pytest
from compress.compressors.pruning.block_choice import (
    draws,
    indices,
    lowest,
    oracle,
    possible,
    units_to_remove,
)
from compress.errors import PlanError
from compress.recipes.depth import DepthSettings
from pydantic import ValidationError

D28 = {"_class_name": "DiTTransformer2DModel", "num_layers": 28}
FLUX = {"_class_name": "FluxTransformer2DModel", "num_layers": 4, "num_single_layers": 6}
HUNYUAN = {"_class_name": "HunyuanDiT2DModel", "num_layers": 10}
LIST, SINGLE = "transformer_blocks", "single_transformer_blocks"


def _settings(by="sensitivity", **keys):
    return DepthSettings.model_validate({"by": by, **keys})


def test_oracle_is_that_of_the_paper():
    kept = oracle(D28, _settings("oracle"))
    assert kept == {LIST: (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27)}
    assert oracle(FLUX, _settings("oracle")) == {LIST: (0, 3), SINGLE: (0, 2, 5)}
    for config, keep in ((D28, 13), (D28 | {"num_layers": 7}, 0.5), (HUNYUAN, 0.6)):
        with pytest.raises(PlanError, match="half of an even number"):
            oracle(config, _settings("oracle", keep=keep))


def test_the_least_go_and_of_equals_the_last():
    scores = {LIST: [5.0, 1.0, 3.0, 1.0]}
    config = D28 | {"num_layers": 4}
    assert lowest(config, _settings(keep=3), scores, set()) == {LIST: (0, 1, 2)}
    assert lowest(config, _settings(keep=2), scores, set()) == {LIST: (0, 2)}
    assert lowest(config, _settings(keep=2), scores, {(LIST, 3)}) == {LIST: (0, 3)}
    with pytest.raises(PlanError, match=r"3 of transformer_blocks .* 2 of 4 must stay"):
        lowest(config, _settings(keep=1), scores, {(LIST, 1), (LIST, 3)})


def test_pairs_go_together_and_the_middle_stays():
    scores = {"blocks": [9.0, 1, 9, 4, 0, 0, 4, 0, 9, 9]}
    assert lowest(HUNYUAN, _settings(keep=6), scores, set()) == {"blocks": (0, 1, 4, 5, 8, 9)}
    units, gone = units_to_remove(HUNYUAN, _settings(keep=0.4))["blocks"]
    assert units == [(0, 9), (1, 8), (2, 7), (3, 6)] and gone == 3
    with pytest.raises(PlanError, match="they go in pairs"):
        units_to_remove(HUNYUAN, _settings(keep=5))


@pytest.mark.parametrize(
    ("config", "keep", "message"),
    [
        (D28, 29, "29 blocks of transformer_blocks are asked for, and the model has 28"),
        (D28, 28, "every block stays"),
        (D28, {"blocks": 3}, "the model has no blocks"),
        (FLUX, 3, "2 lists of blocks, and one count"),
    ],
)
def test_counts_that_do_not_fit_are_refused(config, keep, message):
    with pytest.raises(PlanError, match=message):
        units_to_remove(config, _settings(keep=keep))


def test_lists_of_ones_own():
    assert indices(D28, _settings("indices", keep=[27, 0, 3])) == {LIST: (0, 3, 27)}
    chosen = indices(FLUX, _settings("indices", keep={SINGLE: [1, 2]}))
    assert chosen == {SINGLE: (1, 2)}
    with pytest.raises(PlanError, match="0 to 27"):
        indices(D28, _settings("indices", keep=[28]))


def test_draws_are_seeded_and_of_one_size():
    settings = _settings("random", keep=14, draws=20)
    first = draws(D28, settings, 3, {(LIST, 0)})
    assert first == draws(D28, settings, 3, {(LIST, 0)}) != draws(D28, settings, 4, {(LIST, 0)})
    assert all(len(kept[LIST]) == 14 and kept[LIST][0] == 0 for kept in first)
    assert len({kept[LIST] for kept in first}) == 20
    assert possible(D28, settings, {(LIST, 0)}) == comb(27, 14)


@pytest.mark.parametrize(
    ("config", "keep", "pinned", "count"),
    [
        (D28 | {"num_layers": 4}, 2, set(), 6),
        (D28 | {"num_layers": 4}, 2, {(LIST, 3)}, 3),
        (FLUX, 0.5, set(), 6 * 20),
        (FLUX, {SINGLE: 4}, set(), 15),
        (HUNYUAN, 6, set(), 6),
    ],
)
def test_of_few_choices_each_is_there_once(config, keep, pinned, count):
    settings = _settings("random", keep=keep, draws=count)
    found = draws(config, settings, 0, pinned)
    assert len(found) == count == possible(config, settings, pinned)
    assert len({tuple(kept.items()) for kept in found}) == count
    assert all(place in kept[name] for kept in found for name, place in pinned)
    assert {tuple(map(len, kept.values())) for kept in found} == {tuple(map(len, found[0].values()))}
    # Where fewer are asked for, they are drawn, from among the same.
    others = draws(config, _settings("random", keep=keep, draws=max(3, count - 1)), 0, pinned)
    assert {tuple(kept.items()) for kept in others} <= {tuple(kept.items()) for kept in found}


def test_choices_of_which_there_are_none_are_refused():
    with pytest.raises(PlanError, match="3 of 4 must stay"):
        draws(D28 | {"num_layers": 4}, _settings("random", keep=2), 0, {(LIST, 0), (LIST, 1), (LIST, 2)})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"by": "indices"}, "a list of places"),
        ({"by": "oracle", "keep": [1, 2]}, "a count or a share"),
        ({"by": "oracle", "keep": 1.5}, "no share"),
        ({"by": "oracle", "keep": 0}, "at least one"),
        ({"by": "shortgpt", "keep": True}, "a valid integer"),
        ({"by": "shortgpt", "keep": {LIST: True}}, "a valid integer"),
        ({"by": "indices", "keep": [0, True]}, "a valid integer"),
        ({"by": "shortgpt", "keep": float("nan")}, "finite number"),
        ({"by": "oracle", "draws": 10}, "draws has no effect"),
        ({"by": "shortgpt", "pick": "middle"}, "pick has no effect"),
    ],
)
def test_settings_that_say_nothing_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        DepthSettings.model_validate(keys)
