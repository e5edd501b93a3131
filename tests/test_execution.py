import shutil

import pytest
from compress import execution, history, planning
from compress.errors import PlanError
from compress.models.open import open_model
from compress.models.origins import NAME, kept_blocks
from compress.models.shallower import keep_blocks
from compress.pipeline import plan, run
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from compress.recipes.schema import ModelRef

from .small_dits import LIST


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
    loaded = load_recipe(_recipe(tiny_dit, tmp_path, export=exports))
    recipe = loaded.recipe
    targets = [tmp_path / "a", tmp_path / "b"]
    free = shutil.disk_usage(tmp_path)

    def needed(loaded):
        monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: free._replace(free=0))
        with pytest.raises(PlanError, match="the run writes about") as caught:
            planning.check_plan(loaded, targets, tmp_path / "work")
        return int(caught.value.message.rpartition(" ")[2].replace(",", ""))

    spec = planning.read_spec(recipe.model)
    one, two = planning.plan_exports(loaded, spec, planning.plan_stages(spec, loaded))
    off = [{**part, "push": {**part["push"], "verify_remote": False}} for part in exports]
    unverified = load_recipe(_recipe(tiny_dit, tmp_path, export=off))
    # One of them at a time is on the disk.
    assert needed(loaded) - needed(unverified) == one.bytes == two.bytes > 0


def _written(tmp_path, model, stage):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {model}\nstages:\n  - {stage}\nexport: {{path: {tmp_path / 'out'}}}\n")
    return file


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("mixdq: {budget: {mean_bits: 1.0}}", "3:33: stages[0].mixdq.budget.mean_bits: 1 bits is less"),
        ("vidit_q: {bits: {budget: {ratio: 0.01}}}", "3:38: stages[0].vidit_q.bits.budget.ratio: 0.0"),
        ('mixdq: {budget: {mean_bits: 4}, fixed: {"a.*": 4}}', "3:37: stages[0].mixdq.fixed: pattern 'a.*'"),
        ("mixdq: {budget: {mean_bits: 4}, group_size: 48}", "3:5: stages[0].mixdq: transformer_blocks.0."),
        ("rtn: {weight_bits: 4, group_size: 48}", "3:5: stages[0].rtn: transformer_blocks.0."),
    ],
)
def test_what_a_stage_cannot_do_is_told_with_its_place(tiny_dit, tmp_path, stage, place):
    file = _written(tmp_path, tiny_dit, stage)
    with pytest.raises(PlanError) as planned:
        plan(file)
    assert planned.value.message.startswith(f"{file}:{place}")
    assert planned.value.message.count("stages[0]") == 1
    with pytest.raises(PlanError) as ran:
        run(file, work_dir=tmp_path / "work")
    assert (ran.value.message, ran.value.hint) == (planned.value.message, planned.value.hint)


MIXED = [{"mixdq": {"budget": {"mean_bits": 4.0}, "bits": [2, 4, 8]}}]
TWO_SAMPLES = {"samples": 2, "steps": 1}


def test_layers_at_all_bits_are_counted_on_the_disk_of_the_work_directory(tiny_dit, tmp_path, monkeypatch):
    loaded = load_recipe(_recipe(tiny_dit, tmp_path, stages=MIXED, calibration=TWO_SAMPLES))
    spec = planning.read_spec(loaded.recipe.model)
    (planned,) = planning.plan_stages(spec, loaded)
    assert any(f"about {planned.disk_bytes:,} bytes" in note for note in planned.notes)
    (written,) = planning.plan_exports(loaded, spec, [planned])
    needed = written.bytes + planned.after.bytes + planned.disk_bytes
    usage = shutil.disk_usage(tmp_path)
    for free in (needed, needed - 1):
        monkeypatch.setattr(planning.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free == needed:
            planning.check_plan(loaded, [tmp_path / "out"], tmp_path / "work")
            continue
        with pytest.raises(PlanError, match=f"the run writes about {needed:,}"):
            planning.check_plan(loaded, [tmp_path / "out"], tmp_path / "work")


def test_every_worker_is_counted_in_the_memory(tiny_dit, tmp_path, monkeypatch):
    loaded = load_recipe(_recipe(tiny_dit, tmp_path, stages=MIXED, calibration=TWO_SAMPLES))
    targets, work = [tmp_path / "out"], tmp_path / "work"

    def needed(workers):
        monkeypatch.setattr(planning.preflight, "total_memory_bytes", lambda: 1)
        with pytest.raises(PlanError, match="bytes of memory") as caught:
            planning.check_plan(loaded, targets, work, workers=workers)
        assert ("--workers" in caught.value.hint) is (workers > 1)
        return int(caught.value.message.partition("about ")[2].partition(" ")[0].replace(",", ""))

    one, two, three = map(needed, (1, 2, 3))
    spec = planning.read_spec(loaded.recipe.model)
    assert three - two == (two - one) / 2 > 4 * spec.size().bytes / spec.dtype.itemsize


def test_what_a_report_has_alone_stays_out_of_the_manifest_at_any_depth():
    details = {
        "classes": [{"name": "ff", "histogram": {"kept": [1]}, "members": [{"after": 2}]}],
        "seconds": 1,
    }
    kept = history.kept_in_history({**details, "inside": {"layers": [], "macs": [2, 1]}})
    assert kept == {"classes": [{"name": "ff", "members": [{"after": 2}]}], "inside": {"macs": [2, 1]}}


def test_a_corrected_file_of_origins_is_seen(make_tiny, tmp_path):
    model = open_model(ModelRef(id=str(make_tiny(num_layers=4, name="four"))), progress=SilentProgress())
    keep_blocks(model, {LIST: (0, 2)}, {"method": "test"})
    folder = tmp_path / "two"
    model.module.save_pretrained(folder)
    recipe = load_recipe(_recipe(folder, tmp_path)).recipe

    def keys(text):
        (folder / NAME).write_text(text) if text else (folder / NAME).unlink(missing_ok=True)
        found = open_model(recipe.model, progress=SilentProgress())
        return execution._stage_keys(recipe, found, "key", {})

    first = model.attachments[NAME]
    corrected = first.replace("[\n    0,\n    2\n   ]", "[\n    0,\n    3\n   ]")
    assert kept_blocks(first) == {LIST: (0, 2)} and kept_blocks(corrected) == {LIST: (0, 3)}
    without, before, after = (keys(text) for text in (None, first, corrected))
    assert before == keys(first) and without == keys(None)
    assert len({one[0] for one in (*without, *before, *after)}) == 3  # of the input
    assert len({one[1] for one in (*without, *before, *after)}) == 3
