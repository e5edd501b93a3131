"""Plans of models whose blocks differ in size: from the smallest that may be left to the largest."""

from itertools import combinations, product

import compress
import pytest
from compress.cli import _render
from compress.cli._tables import Table
from compress.compressors.pruning.block_groups import groups_of
from compress.compressors.pruning.block_range import range_of_groups
from compress.errors import PlanError
from compress.models.open import read_spec
from compress.models.shallower import shallower_spec
from compress.recipes.schema import ModelRef

LIST = "transformer_blocks"
DEPTH, DUAL = 6, (0, 1, 4)


@pytest.fixture
def model(make_tiny):
    return make_tiny(
        "SD3Transformer2DModel", num_layers=DEPTH, dual_attention_layers=DUAL, qk_norm="rms_norm"
    )


@pytest.fixture
def planned(model, tmp_path):
    """Return `planned(*stages, require=None)`: the plan's document."""

    def plan(*stages, require=None):
        calibration = {"samples": 1, "steps": 1, "embeddings": str(tmp_path / "text.safetensors")}
        if any("tinyfusion" in stage for stage in stages):
            calibration["data"] = {"generate": 8}
        return compress.plan(
            {
                "model": str(model),
                "stages": list(stages),
                "calibration": calibration,
                "evaluate": {"fidelity": {"samples": 1, "steps": 1}},
                "require": require or {},
                "export": {"path": str(tmp_path / "out")},
            }
        )

    return plan


def sizes(model, kept):
    """Sizes of all models that may be left, by the bytes of their tensors."""
    spec = read_spec(ModelRef(id=str(model)))
    found = {}
    for places in kept:
        size = shallower_spec(spec, {LIST: places}).size()
        found[size.bytes] = size.to_json()
    return found


def pairs():
    """What may stay with 1:2."""
    return list(product((0, 1), (2, 3), (4, 5)))


def search(**keys):
    return {"tinyfusion": {"groups": "1:2", "steps": 4, "batch_size": 4, **keys}}


CASES = [
    (search(), pairs()),
    ({"depth": {"by": "sensitivity", "keep": 3}}, list(combinations(range(DEPTH), 3))),
    ({"depth": {"by": "random", "keep": 2}}, list(combinations(range(DEPTH), 2))),
    ({"depth": {"by": "shortgpt", "keep": 5}}, [k for k in combinations(range(DEPTH), 5) if 5 in k]),
]
"""Stage -> everything that it may leave."""


@pytest.mark.parametrize(("stage", "choices"), CASES)
def test_the_range_is_that_of_all_choices(stage, choices, planned, model):
    every = sizes(model, choices)
    document = planned(stage)
    (row,) = document["stages"]
    assert row["after"] == every[max(every)] and row["after_at_least"] == every[min(every)]
    assert len(every) > 1
    told = [note for note in row["notes"] if "blocks differ in size" in note]
    numbers = f"{every[min(every)]['parameters']:,} to {every[max(every)]['parameters']:,} parameters"
    assert len(told) == 1 and numbers in told[0]
    assert document["export"]["bytes_at_least"] < document["export"]["bytes"]


@pytest.mark.parametrize(
    "stage", [{"depth": {"by": "indices", "keep": [0, 2, 5]}}, {"depth": {"by": "oracle"}}]
)
def test_a_known_choice_has_one_size(stage, planned, model):
    document = planned(stage)
    (row,) = document["stages"]
    assert "after_at_least" not in row and "bytes_at_least" not in document["export"]
    assert not any("differ in size" in note for note in row["notes"])


def test_equal_blocks_have_one_size(make_tiny):
    spec = read_spec(ModelRef(id=str(make_tiny("SD3Transformer2DModel", num_layers=4))))
    most, least = range_of_groups(spec.config, groups_of(spec.config, "2:4"))
    assert most == least


def test_later_stages_carry_the_range_on(planned):
    quantize = {"rtn": {"weight_bits": 8}}
    first, second = planned(search(), quantize)["stages"]
    assert second["after_at_least"]["bytes"] < second["after"]["bytes"] < first["after"]["bytes"]
    assert second["after_at_least"]["macs"] == first["after_at_least"]["macs"]


def test_only_what_no_choice_reaches_is_refused(planned, model):
    every = sizes(model, pairs())
    least, most = every[min(every)], every[max(every)]
    planned(search(), require={"parameters": f"< {most['parameters']}"})
    planned(search(), require={"parameters": f"<= {least['parameters']}"})
    with pytest.raises(PlanError, match=r"require\.parameters: .* cannot be reached"):
        planned(search(), require={"parameters": f"< {int(0.9 * least['parameters'])}"})


def test_a_terminal_shows_the_range(planned):
    document = planned(search())
    shown = _render.plan(document)
    titles = [section.title for section in shown if isinstance(section, Table)]
    assert "before and after, at the least" in titles
    (table,) = (
        section for section in shown if isinstance(section, Table) and section.title == "planned stages"
    )
    assert " to " in table.rows[0][2] and " to " not in table.rows[0][1]
    assert "depending on the data" in shown[-1]
    document = planned({"depth": {"by": "oracle"}})
    assert not any(
        isinstance(part, Table) and "at the least" in part.title for part in _render.plan(document)
    )
