"""What a plan refuses and promises of pruning: gates out of reach, padded exports, figures by real scores."""

from __future__ import annotations

import json
from functools import partial

import compress
import pytest
from compress import pipeline, planning
from compress.compressors.pruning.cutting import cut
from compress.compressors.pruning.graph import find_groups
from compress.compressors.pruning.groups import Selection
from compress.errors import PlanError
from compress.exporters.formats import as_shipped, write
from compress.models.open import open_model, read_spec
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe

MACS = 11_689_536
"""Of builtin:vit, as its card states them."""


@pytest.fixture
def recipe(tmp_path):
    """Return `make(stages, require, **export)`: a recipe on the built-in ViT."""

    def make(stages, require=None, **export):
        return load_recipe(
            {
                "model": "builtin:vit",
                "calibration": {"samples": 8, "batch_size": 8},
                "stages": stages,
                "evaluate": {"fidelity": {"samples": 8}},
                "require": require or {},
                "export": {"path": str(tmp_path / "out"), **export},
            }
        )

    return make


def _cut(**settings):
    return {"isomorphic": {"importance": "magnitude", "round_to": 4, **settings}}


HALF = _cut(target={"macs": 0.5})


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ({"tinyfusion": {"groups": "1:2"}}, "`groups` of tinyfusion"),
        ({"depth": {"by": "oracle", "keep": 0.5}}, "`keep` of depth"),
    ],
)
def test_a_gate_that_fewer_blocks_cannot_reach_names_the_key_of_the_stage(stage, key, tmp_path):
    calibration = {"data": {"generate": 8}} if "tinyfusion" in stage else {}
    loaded = load_recipe(
        {
            "model": "builtin:dit",
            "calibration": calibration,
            "stages": [stage],
            "require": {"parameters": "< 100"},
            "export": {"path": str(tmp_path / "out")},
        }
    )
    with pytest.raises(PlanError, match=r"require\.parameters: .* cannot be reached") as caught:
        compress.plan(loaded)
    assert f"remove more ({key})" in caught.value.hint and "isomorphic" not in caught.value.hint


@pytest.mark.parametrize(
    "gate", [{"macs": "<= 4e6"}, {"parameters": "< 2e5"}, {"size_ratio": "<= 0.3"}, {"bytes": "<= 400000"}]
)
def test_a_gate_that_pruning_cannot_reach_is_refused_by_plan_and_run(recipe, gate, tmp_path):
    loaded = recipe([HALF], gate)
    with pytest.raises(PlanError, match=f"require.{next(iter(gate))}: .* cannot be reached") as caught:
        compress.plan(loaded)
    assert "remove more (`target` or `ratios` of isomorphic)" in caught.value.hint
    assert "bits" not in caught.value.hint
    with pytest.raises(PlanError, match="cannot be reached"):
        compress.run(loaded, work_dir=tmp_path / "work")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("operator", "value"), [(">=", 1), ("==", 1), ("<=", MACS // 2)])
def test_other_comparisons_and_what_is_within_reach_are_left_to_the_measurement(recipe, operator, value):
    compress.plan(recipe([HALF], {"macs": f"{operator} {value}"}))


def test_what_no_stage_changes_has_no_room_and_says_what_would(tiny_dit, tmp_path):
    recipe = {
        "model": str(tiny_dit),
        "stages": [{"rtn": {"weight_bits": 8}}],
        "calibration": {"samples": 1, "steps": 1},
        "evaluate": {"fidelity": {"samples": 1, "steps": 1}},
        "export": {"path": str(tmp_path / "out")},
    }
    size = read_spec(load_recipe(recipe).recipe.model).size()
    exact = {"macs": f"<= {size.macs}", "parameters": f"<= {size.parameters}"}
    compress.plan({**recipe, "require": exact})
    with pytest.raises(PlanError, match=f"predicts {size.macs:,}") as caught:
        compress.plan({**recipe, "require": {"macs": f"< {size.macs}"}})
    assert "pruning stage" in caught.value.hint and "bits" not in caught.value.hint
    with pytest.raises(PlanError) as caught:
        compress.plan({**recipe, "require": {"bytes": "<= 1000"}})
    assert "fewer bits" in caught.value.hint and "isomorphic" not in caught.value.hint


def test_an_assumed_spread_leaves_more_room_than_an_aim(recipe):
    """What the target names is met whatever the spread is; the rest depends on it."""
    after = compress.plan(recipe([HALF]))["stages"][0]["after"]
    assert after["macs"] <= MACS / 2
    compress.plan(recipe([HALF], {"parameters": f"<= {0.95 * after['parameters']}"}))
    with pytest.raises(PlanError, match=r"require\.macs"):
        compress.plan(recipe([HALF], {"macs": f"<= {0.95 * after['macs']}"}))
    ratios = _cut(ratios={"width": 0.25, "ff": 0.25})
    after = compress.plan(recipe([ratios]))["stages"][0]["after"]
    compress.plan(recipe([ratios], {"macs": f"<= {0.95 * after['macs']}"}))


@pytest.mark.parametrize("padded", [False, True])
def test_with_scores_every_figure_is_that_of_what_would_be_written(recipe, padded, tmp_path):
    document = pipeline.preview(recipe([HALF], padded=padded))
    stage, export = document["stages"][0], document["export"]
    model = open_model(load_recipe(document["recipe"]).recipe.model, device="cpu", progress=SilentProgress())
    groups = find_groups(model)
    cut(model, groups, Selection.parse(json.dumps(stage["details"]["selection"])), attn_scale="preserve")
    assert stage["after"] == model.size().to_json()
    assert not any("evenly" in note for note in stage["notes"])
    shipped = as_shipped(model, "compress", padded=padded)
    (tmp_path / "written").mkdir()
    assert export["bytes"] == write(shipped, tmp_path / "written", "compress").bytes
    if padded:
        (tmp_path / "plain").mkdir()
        plain = write(model, tmp_path / "plain", "compress").bytes
        assert export["bytes_unpadded"] == plain < export["bytes"] == export["bytes_at_most"]


def test_with_scores_a_gate_is_held_to_what_would_be_written(recipe):
    make = partial(recipe, [_cut(ratios={"width": 0.25, "ff": 0.25})])
    parameters = pipeline.preview(make())["stages"][0]["after"]["parameters"]
    pipeline.preview(make({"parameters": f"<= {parameters}"}))
    with pytest.raises(PlanError, match=f"predicts {parameters:,}"):
        pipeline.preview(make({"parameters": f"< {parameters}"}))


def test_a_padded_export_is_planned_between_two_sizes(recipe, tmp_path, monkeypatch):
    loaded = recipe([HALF], padded=True)
    export = compress.plan(loaded)["export"]
    assert export["bytes_unpadded"] < export["bytes"] < export["bytes_at_most"]
    real = pipeline.preview(loaded)["export"]["bytes"]
    assert export["bytes"] < real <= export["bytes_at_most"]
    # The disk must have room for the largest.
    monkeypatch.setattr(
        planning.shutil, "disk_usage", lambda _: type("Usage", (), {"free": export["bytes_at_most"]})
    )
    with pytest.raises(PlanError, match="the run writes about"):
        planning.check_plan(loaded, [tmp_path / "out"], tmp_path / "work")
