"""Several recipes, several exports, pushes and `--reproduce`, as the command line shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compress.cli import _render, _runs
from compress.errors import HubError, InterruptedPush, SourceError, VerifyError

RECIPE = "model: builtin:dit\nstages: [rtn: {{}}]\nexport: {{path: {path}}}\n"
PUSH = {
    "repo": "org/x", "revision": "main", "commit": "c" * 40, "url": "http://hub/org/x", "private": True,
    "tag": "v1", "pull_request": None, "files_sent": 3, "up_to_date": False, "verified": True,
}  # fmt: skip


@pytest.fixture
def recipes(call):
    """Write `a.yaml`, `b.yaml` and `c.yaml`, each with a folder of its own."""
    for name in "abc":
        Path(f"{name}.yaml").write_text(RECIPE.format(path=f"out/{name}"))


@pytest.fixture
def endings(fake_pipeline, report):
    """Let each recipe end with a report, or with the error put here under its export's name."""
    told = {}

    def run(loaded, *, progress, **options):
        path = loaded.recipe.export[0].path
        progress.start("work", None)
        progress.finish()
        told.setdefault("order", []).append(path.name)
        if path.name in told:
            raise told[path.name]
        return {**report, "export": {**report["export"], "path": str(path)}}

    fake_pipeline.run = run
    return told


def test_all_are_carried_out_in_order(call, recipes, endings):
    result = call("run", "b.yaml", "a.yaml", "--json")
    assert result.code == 0 and endings["order"] == ["b", "a"]
    runs = result.json["runs"]
    assert [(row["recipe"], row["exit_code"]) for row in runs] == [("b.yaml", 0), ("a.yaml", 0)]
    assert runs[0]["report"]["export"]["path"] == "out/b" and "error" not in runs[0]
    assert "[1/2] b.yaml" in result.err and "[2/2] a.yaml" in result.err


def test_a_failure_does_not_stop_the_next_and_the_worst_code_counts(call, recipes, endings):
    endings["a"] = VerifyError("sqnr_db is 1, required >= 2")
    endings["b"] = SourceError("damaged")
    result = call("run", "a.yaml", "b.yaml", "c.yaml", "--json")
    assert result.code == 6 and endings["order"] == ["a", "b", "c"]
    assert [row["exit_code"] for row in result.json["runs"]] == [6, 4, 0]
    assert result.json["runs"][1]["error"]["message"] == "damaged"
    shown = call("run", "a.yaml", "b.yaml", "c.yaml")
    last = shown.out.split("recipes\n")[1].splitlines()
    assert last[1].split() == ["a.yaml", "exit", "code", "6:", "VerifyError"]
    assert last[3].split() == ["c.yaml", "done", "out/c"]
    assert shown.err.count("error: ") == 2


def test_an_interruption_stops_at_once(call, recipes, endings):
    endings["b"] = KeyboardInterrupt()
    result = call("run", "a.yaml", "b.yaml", "c.yaml", "--json")
    assert result.code == 130 and endings["order"] == ["a", "b"]
    assert [row["exit_code"] for row in result.json["runs"]] == [0, 130, None]
    assert result.json["runs"][2]["report"] is None
    assert "not started" in call("run", "a.yaml", "b.yaml", "c.yaml").out


@pytest.mark.parametrize(
    ("codes", "code"), [([], 0), ([0, 4, 2], 4), ([7, 1, 6], 1), ([1, 130], 130), ([0, 0], 0)]
)
def test_worst(codes, code):
    assert _runs.worst(codes) == code


def test_nothing_starts_where_one_cannot_be_read(call, recipes, endings):
    Path("b.yaml").write_text("model: x\n")
    result = call("run", "a.yaml", "b.yaml", "absent.yaml", "--json")
    assert result.code == 2 and "order" not in endings
    assert [row["exit_code"] for row in result.json["runs"]] == [None, 2, 2]
    assert result.json["runs"][1]["error"]["file"] == "b.yaml"
    assert result.err.count("error: ") == 2, "every wrong recipe is told at once"


@pytest.mark.parametrize("path", ["out/a", "out/a/inner", "out", "out/../out/a"])
def test_results_in_each_others_way_are_refused(call, recipes, endings, path):
    Path("b.yaml").write_text(RECIPE.format(path=path))
    result = call("run", "a.yaml", "b.yaml")
    assert result.code == 2 and "order" not in endings
    assert "b.yaml and a.yaml: " in result.err and "lie within each other" in result.err


def test_one_repository_for_two_recipes_is_refused(call, recipes, endings):
    for name in "ab":
        Path(f"{name}.yaml").write_text(RECIPE.format(path=f"out/{name}, push: org/x"))
    result = call("run", "a.yaml", "b.yaml")
    assert result.code == 2 and "org/x is already the repository" in result.err


def test_options_hold_for_all(call, recipes, fake_pipeline, report):
    seen = []

    def run(loaded, **options):
        seen.append(
            (loaded.recipe.seed, loaded.recipe.model.id, loaded.recipe.stages[0].settings.weight_bits)
        )
        return report

    fake_pipeline.run = run
    options = ["--seed", "5", "--model", "m/n", "--set", "stages.0.rtn.weight_bits=4"]
    assert call("run", "a.yaml", "b.yaml", *options).code == 0
    assert seen == [(5, "m/n", 4)] * 2


def test_outputs_and_summary_of_several(call, recipes, endings, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    endings["a"] = HubError("the Hub\nrefused", hint="try again")
    assert call("run", "a.yaml", "b.yaml").code == 7
    found = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert found["exit_code"] == "7" and found["path"] == "out/b"
    assert (found["verified"], found["gates_passed"]) == ("false", "false"), "one recipe gave no result"
    assert [row["recipe"] for row in json.loads(found["results"])] == ["b.yaml"]
    summary = (tmp_path / "summary.md").read_text()
    assert "## compress: a FAILED\n\nexit code 7: the Hub\nrefused\n\nhint: try again" in summary
    assert summary.index("a FAILED") < summary.index("## compress: b\n") < summary.index("all recipes")
    assert "| b.yaml | done | out/b |" in summary


def test_a_recipe_that_cannot_be_read_gives_outputs_too(call, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    assert call("run", "absent.yaml").code == 2
    assert (tmp_path / "outputs").read_text() == "exit_code=2\nresults=[]\n"


def variants(report, paths=("out/x", "out/y")):
    """Return the report of a recipe with a list of exports."""
    exports = [{**report["export"], "path": path} for path in paths]
    exports[0]["push"] = PUSH
    failed = [{**row, "passed": False} for row in report["gates"]]
    return {**report, "evaluation": [report["evaluation"]] * 2, "gates": [[], failed], "export": exports}


def test_several_exports_of_one_recipe(call, fake_pipeline, report, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    document = variants(report)
    fake_pipeline.run = lambda loaded, **options: document
    result = call("run", "dit_w4a8")
    assert result.code == 0
    assert result.out.count("before and after") == 1
    assert result.out.index("out/x  (") < result.out.index("http://hub/org/x") < result.out.index("out/y  (")
    assert result.err == f"next: compress verify org/x --revision {'c' * 40}\n"
    found = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert found["gates_passed"] == "false" and found["repo"] == "org/x" and found["commit"] == "c" * 40
    rows = json.loads(found["results"])
    assert [(row["path"], row["gates_passed"], row["url"]) for row in rows] == [
        ("out/x", True, "http://hub/org/x"), ("out/y", False, ""),
    ]  # fmt: skip
    assert call("run", "dit_w4a8", "--json").json == document


def test_what_a_push_shows(report):
    (table,) = _render.pushed(PUSH)
    assert dict(table.rows) == {
        "repository": "org/x", "visibility": "private", "revision": "main", "commit": "c" * 40, "tag": "v1",
        "files sent": "3", "downloaded and verified again": "yes",
    }  # fmt: skip
    (table,) = _render.pushed({**PUSH, "up_to_date": True, "verified": False, "pull_request": "http://pr"})
    shown = dict(table.rows)
    assert shown["files sent"] == "none: up to date" and shown["pull request"] == "http://pr"
    assert shown["downloaded and verified again"] == "no"
    assert _render.pushed(None) == []
    assert _render.pushed({**PUSH, "notes": ["it stays public"]})[1] == "note: it stays public"


def test_push_passes_on_where_it_went(call, fake_pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    fake_pipeline.push = lambda folder, settings, **options: {"push": PUSH}
    assert call("push", "out/x", "org/x").code == 0
    assert dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines()) == {
        "exit_code": "0",
        **{key: PUSH[key] for key in ("repo", "revision", "commit", "url", "tag")},
    }
    assert "## compress push: org/x" in (tmp_path / "summary.md").read_text()


def test_a_failed_push_tells_later_steps_too(call, fake_pipeline, monkeypatch, tmp_path):
    def push(folder, settings, *, progress):
        raise HubError("org/name: refused", hint="ask")

    fake_pipeline.push = push
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "absent" / "summary"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    result = call("push", "out/x", "org/name")
    assert result.code == 7 and "the job summary is incomplete" in result.err
    assert "exit_code=7\n" in (tmp_path / "outputs").read_text()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    assert call("push", "out/x", "org/name").code == 7
    summary = (tmp_path / "summary").read_text()
    assert "FAILED" in summary and "org/name: refused" in summary and "hint: ask" in summary


@pytest.mark.parametrize(("words", "private"), [([], {}), (["--private"], {True}), (["--public"], {False})])
def test_who_may_see_a_push(call, fake_pipeline, words, private):
    seen = []
    fake_pipeline.push = lambda folder, settings, **options: seen.append(settings) or {"push": PUSH}
    assert call("push", "out/x", "org/x", *words).code == 0
    (settings,) = seen
    assert ({settings.private} if "private" in settings.model_fields_set else {}) == private


@pytest.mark.parametrize(("kind", "code"), [(VerifyError, 6), (HubError, 7), (InterruptedPush, 130)])
def test_a_push_that_fails_after_its_commit_passes_the_commit_on(
    call, fake_pipeline, monkeypatch, tmp_path, kind, code
):
    def push(folder, settings, *, progress):
        raise kind("org/x: pushed as c, but not tagged", hint="again", push={**PUSH, "tag": None})

    fake_pipeline.push = push
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    result = call("push", "out/x", "org/x", "--json")
    assert result.code == code
    assert result.json["error"]["push"] == {**PUSH, "tag": None} and "pushed" not in result.json["error"]
    found = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert (found["exit_code"], found["commit"], found["tag"]) == (str(code), PUSH["commit"], "")


def test_push_and_its_check_reach_the_recipe(call, recipes, fake_pipeline, report):
    seen = []

    def run(loaded, **options):
        seen.append(loaded.recipe.export[0].push)
        return report

    fake_pipeline.run = run
    assert call("run", "a.yaml", "--push", "org/x@next").code == 0
    assert call("run", "a.yaml", "--push", "org/x", "--no-verify-remote").code == 0
    first, second = seen
    assert (first.repo, first.revision, first.verify_remote) == ("org/x", "next", True)
    assert (second.repo, second.revision, second.verify_remote) == ("org/x", None, False)


def test_good_folders_are_shown_beside_a_refused_one(call, fake_pipeline, report):
    Path("x.yaml").write_text(
        "model: builtin:dit\nstages: [rtn: {}]\nexport: [{path: out/x}, {path: out/y, format: dequantized}]\n"
    )

    def run(loaded, **options):
        for name in ("x", "y.rejected"):
            Path("out", name).mkdir(parents=True, exist_ok=True)
            Path("out", name, "report.json").write_text(json.dumps(report))
        raise VerifyError("out/y: sqnr_db is 21.25, required >= 30")

    def rejects(loaded, **options):
        raise VerifyError("out/y: sqnr_db is 21.25, required >= 30")

    fake_pipeline.run = run
    result = call("run", "x.yaml")
    assert result.code == 6 and "out/x  (" in result.out and "out/y.rejected  (" in result.out
    Path("out/y.rejected").rename("out/y.rejected-2")
    Path("out/y.rejected").write_text("of somebody else")
    fake_pipeline.run = rejects
    assert "out/y.rejected-2  (" in call("run", "x.yaml").out


@pytest.mark.parametrize(("kind", "code"), [(HubError, 7), (VerifyError, 6), (InterruptedPush, 130)])
def test_what_was_pushed_before_a_failure_is_passed_on(
    call, fake_pipeline, report, monkeypatch, tmp_path, kind, code
):
    Path("x.yaml").write_text(
        "model: builtin:dit\nstages: [rtn: {}]\n"
        "export: [{path: out/x, push: org/x}, {path: out/y, format: dequantized, push: org/y}]\n"
    )

    def run(loaded, *, progress, **options):
        progress.start("work", None)
        progress.finish()
        for name in "xy":
            Path("out", name).mkdir(parents=True, exist_ok=True)
            Path("out", name, "report.json").write_text(json.dumps(report))
        error = kind("out/y is finished but was not pushed", hint="push it by: compress push out/y org/y")
        error.pushed = {"out/x": PUSH}
        raise error

    fake_pipeline.run = run
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    result = call("run", "x.yaml", "--json")
    assert result.code == code
    assert result.json["error"]["pushed"] == [{"path": "out/x", **PUSH}]
    assert result.json["error"]["hint"] == "push it by: compress push out/y org/y"
    found = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert (found["repo"], found["commit"], found["url"]) == ("org/x", "c" * 40, "http://hub/org/x")
    assert [row["commit"] for row in json.loads(found["results"])] == ["c" * 40, ""]
    summary = (tmp_path / "summary.md").read_text()
    assert "## compress: x FAILED" in summary and "http://hub/org/x" in summary


def test_reproduce(call, fake_pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    row = {"name": "config.json", "expected": "aa", "measured": "aa", "equal": True}
    document = {"folder": "out/x", "reproduced": True, "files": [row], "differences": ["another processor"]}
    seen = {}

    def reproduce(target, *, work_dir, progress):
        seen.update(target=target, work_dir=work_dir)
        return document

    fake_pipeline.reproduce = reproduce
    result = call("run", "--reproduce", "out/x", "--work-dir", "w")
    assert result.code == 0 and seen == {"target": "out/x", "work_dir": Path("w")}
    assert "config.json" in result.out and "note: another processor" in result.out
    assert result.out.endswith("out/x: reproduced\n")
    assert call("run", "--reproduce", "out/x", "--json").json == document

    def differing(target, *, work_dir, progress):
        error = VerifyError("out/x: config.json differs")
        error.result = {**document, "reproduced": False, "files": [{**row, "equal": False}]}
        raise error

    fake_pipeline.reproduce = differing
    result = call("run", "--reproduce", "out/x")
    assert result.code == 6 and "FAILED" in result.out and "out/x: reproduced" not in result.out
    assert call("run", "--reproduce", "out/x", "--json").json["error"]["exit_code"] == 6
    lines = (tmp_path / "outputs").read_text().splitlines()
    assert lines == ["reproduced=true"] * 2 + ["reproduced=false"] * 2
