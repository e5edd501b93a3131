"""Several variants of one run: each measured, verified, judged and named by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from compress.errors import PlanError, UsageError, VerifyError
from compress.exporters.verify import verify_folder
from compress.pipeline import plan, run
from compress.progress import SilentProgress

OURS, TORCHAO, SDNQ = ({"format": name} for name in ("compress", "torchao", "sdnq"))
MEASURED = "fidelity under equal inputs"


class Recorder(SilentProgress):
    """Remembers the labels of all steps and the warnings."""

    def __init__(self):
        self.labels, self.warnings = [], []

    def start(self, label, total):
        self.labels.append(label)

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def recipe(tiny_dit, tmp_path):
    """Return `recipe(name=export settings, ..., changes={})` for a model whose licence is known."""
    (tiny_dit / "README.md").write_text("---\nlicense: mit\n---\n")

    def build(changes=None, **exports):
        return {
            "model": str(tiny_dit),
            "stages": [{"rtn": {"weight_bits": 8, "weight_symmetric": False}}],
            "calibration": {"samples": 1, "steps": 1},
            "evaluate": {"fidelity": {"samples": 2, "steps": 2}},
            "export": [{"path": str(tmp_path / name), **rest} for name, rest in exports.items()],
            **(changes or {}),
        }

    return build


@pytest.fixture
def outputs(tmp_path):
    """Return the names in the folder of the outputs, without the model and the work directory."""
    return lambda: sorted(
        path.name for path in tmp_path.iterdir() if path.name not in ("tiny-dit", "README.md", "work")
    )


def _report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_two_variants_of_one_run(recipe, outputs, tmp_path):
    progress = Recorder()
    document = run(recipe(ours=OURS, torchao=TORCHAO), work_dir=tmp_path / "work", progress=progress)
    assert list(document) == ["recipe", "model", "stages", "evaluation", "gates", "export", "environment"]
    assert [part["format"] for part in document["export"]] == ["compress", "torchao"]
    assert progress.labels.count("rtn") == 1 and progress.labels.count(MEASURED) == 2
    assert [warning for warning in progress.warnings if "copies" not in warning] == []
    for name, part, evaluation, gates in zip(
        ("ours", "torchao"), document["export"], document["evaluation"], document["gates"], strict=True
    ):
        folder = tmp_path / name
        assert verify_folder(folder)["verified"]
        own = _report(folder)
        assert (own["export"], own["evaluation"], own["gates"]) == (part, evaluation, gates)
        assert part["path"] == str(folder) and part["verified"] is True
        assert f"\n# {name}\n" in (folder / "README.md").read_text()
    assert document["evaluation"][0]["metrics"]["sqnr_db"] > document["evaluation"][1]["metrics"]["sqnr_db"]
    assert outputs() == ["ours", "torchao"]


@pytest.mark.slow
def test_a_gate_that_one_of_two_variants_misses(recipe, outputs, tmp_path):
    first = run(recipe(a=OURS, b=TORCHAO), work_dir=tmp_path / "work")
    better, worse = (evaluation["metrics"]["sqnr_db"] for evaluation in first["evaluation"])
    gate = {"require": {"sqnr_db": f">= {(better + worse) / 2}"}}
    with pytest.raises(VerifyError) as caught:
        run(recipe(gate, good=OURS, bad=TORCHAO), work_dir=tmp_path / "work")
    assert caught.value.message.startswith(f"{tmp_path / 'bad'}: sqnr_db is")
    assert str(tmp_path / "good") not in caught.value.message
    assert str(tmp_path / "bad.rejected") in caught.value.hint and str(tmp_path / "good") in caught.value.hint
    assert outputs() == ["a", "b", "bad.rejected", "good"]
    assert [_report(tmp_path / name)["gates"][0]["passed"] for name in ("good", "bad.rejected")] == [
        True,
        False,
    ]


@pytest.mark.slow
def test_variants_that_compute_the_same_are_measured_once(recipe, tmp_path):
    progress = Recorder()
    changes = {"stages": [{"rtn": {"weight_bits": 8}}]}
    exports = {"one": OURS, "two": SDNQ, "three": {"max_shard_size": 1_000_000}}
    document = run(recipe(changes, **exports), work_dir=tmp_path / "work", progress=progress)
    assert progress.labels.count(MEASURED) == 1
    one, two, three = (evaluation["metrics"] for evaluation in document["evaluation"])
    assert one["sqnr_db"] == two["sqnr_db"] == three["sqnr_db"]
    assert one["bytes"] == three["bytes"] != two["bytes"]
    assert "max_abs_error" in one and "max_abs_error" not in two


@pytest.mark.slow
def test_a_warning_of_one_variant_speaks_against_a_strict_run(recipe, outputs, tmp_path):
    exports = {"ours": OURS, "sdnq": SDNQ}
    changes = {"stages": [{"rtn": {"weight_bits": 8}}]}
    with pytest.raises(VerifyError, match="warning under --strict: sdnq: written and decoded"):
        run(recipe(changes, **exports), work_dir=tmp_path / "work", strict=True)
    assert outputs() == ["ours.rejected", "sdnq.rejected"]


@pytest.mark.slow
def test_an_unknown_licence_speaks_against_a_strict_run_once(recipe, tiny_dit, outputs, tmp_path):
    (tiny_dit / "README.md").unlink()
    with pytest.raises(VerifyError, match="licence is not known") as caught:
        run(recipe(a=OURS, b=OURS), work_dir=tmp_path / "work", strict=True)
    assert caught.value.message.count("licence is not known") == 2, "once for each of the two folders"
    assert outputs() == ["a.rejected", "b.rejected"]


@pytest.mark.slow
def test_an_error_in_the_last_variant_leaves_nothing(recipe, outputs, tmp_path, monkeypatch):
    from compress import variants

    def fails(*arguments, **options):
        if arguments[2] == "torchao":
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    write = variants.write
    monkeypatch.setattr(variants, "write", fails)
    with pytest.raises(OSError, match="No space"):
        run(recipe(ours=OURS, torchao=TORCHAO), work_dir=tmp_path / "work")
    assert outputs() == []
    monkeypatch.undo()
    document = run(recipe(ours=OURS, torchao=TORCHAO), work_dir=tmp_path / "work")
    assert document["stages"][0]["resumed"] is True and outputs() == ["ours", "torchao"]


def test_the_plan_lists_the_variants_and_holds_the_gates_against_each(recipe, tmp_path):
    changes = {"stages": [{"rtn": {"weight_bits": 4}}], "require": {"size_ratio": "<= 0.9"}}
    document = plan(recipe(changes, ours=OURS, torchao=TORCHAO))
    assert [(part["format"], part["path"]) for part in document["export"]] == [
        ("compress", str(tmp_path / "ours")),
        ("torchao", str(tmp_path / "torchao")),
    ]
    assert document["export"][0]["bytes"] < document["export"][1]["bytes"]
    # What packed integers take: torchao keeps 4 bits in an int8 container.
    changes["require"] = {"bytes": f"<= {document['stages'][0]['after']['bytes']}"}
    for carry_out in (plan, lambda value: run(value, work_dir=tmp_path / "work")):
        with pytest.raises(PlanError, match=r"bytes: .* cannot be reached by .*torchao \(torchao\)"):
            carry_out(recipe(changes, ours=OURS, torchao=TORCHAO))
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_run_killed_between_two_variants_is_finished_by_the_next(recipe, outputs, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(ours=OURS, torchao=TORCHAO)))
    command = [sys.executable, "-m", "compress", "run", "recipe.json", "--work-dir", "work", "--quiet"]
    process = subprocess.Popen(command, cwd=tmp_path)
    while not list(tmp_path.glob(".torchao.partial-*")):
        assert process.poll() is None, "it ended before the second variant was begun"
        time.sleep(0.02)
    process.kill()
    process.wait()
    (tmp_path / "recipe.json").rename(tmp_path / "work" / "recipe.json")
    assert {name.partition(".partial")[0] for name in outputs()} == {".ours", ".torchao"}
    command[4] = "work/recipe.json"
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert outputs() == ["ours", "torchao"]
    assert [_report(tmp_path / name)["stages"][0]["resumed"] for name in outputs()] == [True, True]


@pytest.mark.slow
def test_every_output_folder_is_checked_before_work(recipe, outputs, tmp_path):
    run(recipe(second=OURS), work_dir=tmp_path / "work")
    before = (tmp_path / "second" / "report.json").stat().st_ino
    replaced = {**OURS, "overwrite": True}
    with pytest.raises(UsageError, match="second: the output folder exists"):
        run(recipe(first=replaced, second=OURS), work_dir=tmp_path / "other")
    assert outputs() == ["second"] and not (tmp_path / "other").exists()
    run(recipe(first=OURS, second=replaced), work_dir=tmp_path / "work")
    assert outputs() == ["first", "second"]
    assert (tmp_path / "second" / "report.json").stat().st_ino != before
