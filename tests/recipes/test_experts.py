"""Settings of expert pruning: what contradicts itself, or would have no effect, is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from compress.errors import PlanError
from compress.recipes.experts import EepSettings
from compress.recipes.schema import settings_schema
from pydantic import ValidationError


def read(**keys):
    """Return settings as a recipe gives them."""
    return EepSettings.model_validate_json(json.dumps(keys), strict=True)


def test_defaults_are_the_published_ones():
    found = read(keep_experts=4)
    assert found.model_dump(include={
        "init_random", "prune_evals", "total_evals", "mut_row", "mut_entry", "mut_sigma", "group_flag",
        "crossover", "front_prob", "norm_prob", "parent_gap", "cross_gap", "cross_rank", "dev_top",
    }) == {
        "init_random": 31, "prune_evals": 100, "total_evals": 400, "mut_row": 0.15, "mut_entry": 0.25,
        "mut_sigma": 0.065, "group_flag": 0.25, "crossover": 0.3, "front_prob": 0.6, "norm_prob": 0.1,
        "parent_gap": 3.0, "cross_gap": 1.0, "cross_rank": 6, "dev_top": 20,
    }  # fmt: skip
    assert found.seed_heuristics
    assert (found.router, found.export, found.groups, found.lag) == ("onehot", "stock", "per_layer", 1)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"keep_experts": 4, "active_experts": 4},
        {"keep_experts": 0.5, "groups": 4},
        {"active_experts": 1, "total_evals": 50},
        {"keep_experts": 4, "total_evals": 100, "mut_row": 0.3},
        {"keep_experts": 4, "router": "free", "export": "stock-projected"},
        {"keep_experts": 2, "splits": {"train": 64, "dev": "dev.jsonl", "test": 100}, "dev_top": 5},
        {"experts": {"0": [3, 1], "2": [0, 7]}, "active_experts": 2},
        {"keep_experts": 2, "fitness": {"by": "choices", "data": "x.jsonl"}, "init_random": 97},
        {"keep_experts": 2, "seed_heuristics": False, "init_random": 100},
    ],
)
def test_what_is_read_is_written_and_read_again(keys):
    found = read(**keys)
    assert EepSettings.model_validate_json(found.model_dump_json(), strict=True) == found


def test_given_experts_have_layers_as_numbers():
    found = read(experts={"0": [3, 1], "12": [0, 7]})
    assert found.experts == {0: (3, 1), 12: (0, 7)}
    assert EepSettings(experts={0: (3, 1), 12: (0, 7)}) == found
    assert not found.merges


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep_experts": 0}, "at least one expert stays"),
        ({"keep_experts": 1.5}, "1.5 is no share between 0 and 1"),
        ({"keep_experts": 0.0}, "0.0 is no share between 0 and 1"),
        ({"keep_experts": 2, "active_experts": 3}, "active_experts 3 is more than keep_experts 2"),
        ({"keep_experts": 2, "prune_evals": 33}, "33 is less than the 34 first individuals"),
        ({"keep_experts": 2, "init_random": 98}, "100 is less than the 101 first individuals"),
        ({"keep_experts": 2, "total_evals": 99}, "total_evals 99 is less than prune_evals 100"),
        ({"mut_row": 0.2}, "mut_row has no effect without keep_experts"),
        ({"init_random": 5}, "init_random has no effect without keep_experts"),
        ({"seed_heuristics": False}, "seed_heuristics has no effect without keep_experts"),
        (
            {"keep_experts": 2, "total_evals": 100, "mut_sigma": 0.1},
            "mut_sigma has no effect with total_evals",
        ),
        (
            {"keep_experts": 2, "total_evals": 100, "router": "free", "export": "custom"},
            "router has no effect",
        ),
        ({"keep_experts": 2, "router": "free"}, "export: stock cannot hold router: free"),
        ({"keep_experts": 2, "export": "custom"}, "export: custom has no effect with router: onehot"),
        ({"keep_experts": 2, "dev_top": 5}, "dev_top has no effect without splits.dev"),
        (
            {"fitness": {"data": "a"}, "splits": {"train": "b", "test": "c"}},
            "fitness.data has no effect where every split is a file",
        ),
        ({"fitness": {"by": "loss", "tie_break": 0.1}}, "tie_break has no effect with by: loss"),
        ({"fitness": {"by": "choices", "new_tokens": 8}}, "new_tokens has no effect with by: choices"),
        ({"experts": {}}, "name the layers"),
        ({"experts": {"0": []}}, "of layer 0 are not distinct experts"),
        ({"experts": {"4": [1, 1]}}, "[1, 1] of layer 4 are not distinct experts"),
        ({"experts": {"-1": [1, 2]}}, "experts"),
        ({"experts": {"first": [1, 2]}}, "valid integer"),
        ({"experts": {"0": [1, -2]}}, "greater than or equal to 0"),
        ({"experts": {"0": [1, 2], "1": [3]}}, "layers keep 1 to 2 experts, not equally many"),
        ({"experts": {"0": [1, 2]}, "active_experts": 3}, "more than the 2 that stay"),
        ({"experts": {"0": [1, 2]}, "keep_experts": 2}, "keep_experts has no effect with experts"),
        ({"experts": {"0": [1, 2]}, "groups": 4}, "groups has no effect with experts"),
        ({"experts": {"0": [1, 2]}, "seed": 1}, "seed has no effect with experts"),
        ({"groups": 0}, "greater than or equal to 1"),
        ({"groups": "per_block"}, "per_layer"),
        ({"mut_entry": 0.0}, "greater than 0"),
        ({"group_flag": 1.5}, "less than or equal to 1"),
        ({"lag": 0}, "greater than or equal to 1"),
        ({"splits": {"train": 0}}, "greater than or equal to 1"),
        ({"population": 5}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(ValidationError) as caught:
        read(**keys)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "experts", "kept"),
    [
        ({"keep_experts": 4}, 8, 4),
        ({"keep_experts": 8}, 8, 8),
        ({"keep_experts": 0.5}, 60, 30),
        ({"keep_experts": 0.1}, 60, 6),
        ({"keep_experts": 0.7}, 10, 7),
        ({}, 64, 64),
        ({"experts": {"0": [1, 2, 3]}}, 8, 3),
    ],
)
def test_how_many_experts_stay(keys, experts, kept):
    assert read(**keys).kept(experts) == kept


@pytest.mark.parametrize(
    ("keys", "experts", "message"),
    [
        ({"keep_experts": 0.3}, 8, "keep_experts: 0.3 of 8 experts is 2.4, no whole number"),
        ({"keep_experts": 0.01}, 8, "keep_experts: 0.01 of 8 experts is 0.08, no whole number"),
        ({"keep_experts": 9}, 8, "keep_experts: 9 are to stay, but a layer has 8"),
        ({"keep_experts": 0.5, "active_experts": 5}, 8, "active_experts: 5 of 4 experts"),
        ({"active_experts": 9}, 8, "active_experts: 9 of 8 experts"),
    ],
)
def test_counts_that_do_not_fit_a_model_are_refused(keys, experts, message):
    with pytest.raises(PlanError) as caught:
        read(**keys).kept(experts)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "merges"),
    [
        ({}, True),
        ({"keep_experts": 4}, True),
        ({"keep_experts": 4, "total_evals": 100}, False),
        ({"total_evals": 50}, True),
    ],
)
def test_what_merges(keys, merges):
    assert read(**keys).merges is merges


def test_every_key_is_described_in_the_schema():
    schema = settings_schema(EepSettings)
    for name, entry in schema["properties"].items():
        assert entry.get("description"), name
        for inner, below in entry.get("properties", {}).items():
            assert below.get("description"), f"{name}.{inner}"
    assert {"fitness", "splits", "groups", "experts"} <= set(schema["properties"])


def test_the_settings_load_no_torch():
    program = "import sys, compress.recipes.experts; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
