import shutil

import pytest
from compress import execution
from compress.errors import PlanError
from compress.pipeline import plan, run
from compress.recipes.loader import load_recipe


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


def test_the_download_that_verifies_a_push_is_counted(tiny_dit, tmp_path, monkeypatch):
    push = {"repo": "org/x", "verify_remote": True}
    exports = [{"path": str(tmp_path / name), "push": {**push, "repo": f"org/{name}"}} for name in "ab"]
    recipe = load_recipe(_recipe(tiny_dit, tmp_path, export=exports)).recipe
    targets = [tmp_path / "a", tmp_path / "b"]
    free = shutil.disk_usage(tmp_path)

    def needed(recipe):
        monkeypatch.setattr(execution.shutil, "disk_usage", lambda _: free._replace(free=0))
        with pytest.raises(PlanError, match="the run writes about") as caught:
            execution.check_plan(recipe, targets, tmp_path / "work")
        return int(caught.value.message.rpartition(" ")[2].replace(",", ""))

    spec = execution.read_spec(recipe.model)
    one, two = execution.check_size_gates(recipe, spec, execution.plan_stages(spec, recipe)[-1].spec)
    off = [{**part, "push": {**part["push"], "verify_remote": False}} for part in exports]
    unverified = load_recipe(_recipe(tiny_dit, tmp_path, export=off)).recipe
    # One of them at a time is on the disk.
    assert needed(recipe) - needed(unverified) == one == two > 0
