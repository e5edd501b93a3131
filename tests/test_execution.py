import pytest
from compress.errors import PlanError
from compress.pipeline import plan, run


def _recipe(model, tmp_path, **changes):
    return {
        "model": str(model),
        "stages": [{"rtn": {"weight_bits": 4}}],
        "calibration": {"samples": 1, "steps": 1},
        "evaluate": {"fidelity": {"samples": 1, "steps": 1}},
        "export": {"path": str(tmp_path / "out")},
        **changes,
    }


@pytest.mark.parametrize("gate", [{"size_ratio": "<= 0.1"}, {"bytes": "< 1000"}, {"bits_per_weight": "<= 2"}])
def test_a_size_out_of_reach_is_refused_by_plan_and_run(tiny_dit, tmp_path, gate):
    recipe = _recipe(tiny_dit, tmp_path, require=gate)
    name = next(iter(gate))
    with pytest.raises(PlanError, match=f"{name}.*cannot be reached; the plan predicts"):
        plan(recipe)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PlanError, match="cannot be reached"):
        run(recipe, work_dir=tmp_path / "work")
    assert sorted(tmp_path.iterdir()) == before


def test_a_size_within_reach_is_planned(tiny_dit, tmp_path):
    document = plan(_recipe(tiny_dit, tmp_path, require={"size_ratio": "<= 0.9"}))
    assert list(document) == ["recipe", "model", "stages", "export"]
    assert document["stages"][0]["after"]["bytes"] < document["stages"][0]["before"]["bytes"]
