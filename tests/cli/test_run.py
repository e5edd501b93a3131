"""`run`, `plan`, `evaluate`, `verify`, `inspect`: options passed on, results shown, endings told."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from compress.errors import HubError, PlanError, SourceError, StageError, VerifyError
from safetensors import SafetensorError


def working(report, seen=None):
    """Return a `pipeline.run` that reports some progress and gives `report`."""

    def run(loaded, *, progress, **options):
        if seen is not None:
            seen.update(options, loaded=loaded)
        progress.start("calibrate", 2)
        progress.advance(detail="blocks.0")
        progress.warn("something to look at")
        progress.finish()
        return report

    return run


def failing(error, *, started=True):
    def run(loaded, *, progress, **options):
        if started:
            progress.start("work", None)
        raise error

    return run


def test_run_on_plain_streams(call, fake_pipeline, report):
    seen = {}
    fake_pipeline.run = working(report, seen)
    result = call("run", "dit_w4a8", "--set", "stages.0.vidit_q.weight_bits=6", "--seed", "4", "--fresh")
    assert result.code == 0
    assert seen["loaded"].recipe.seed == 4 and seen["loaded"].recipe.stages[0].settings.weight_bits == 6
    assert (seen["fresh"], seen["overwrite"], seen["strict"]) == (True, None, False)
    assert seen["work_dir"] == Path(".compress")
    lines = result.err.splitlines()
    assert lines[0] == "calibrate ..." and lines[1] == "warning: something to look at"
    assert lines[2].startswith("calibrate: done in ") and lines[3] == "next: compress inspect out/x"
    for text in (
        "5.6 MB",
        "1.68 MB",
        "0.300 x",
        "reused",
        "1 min 15 s",
        "passed",
        "FAILED",
        "<= 0.35",
        "out/x",
    ):
        assert text in result.out, text
    assert "\x1b" not in result.out + result.err


def test_run_passes_its_options_on(call, fake_pipeline, report):
    seen = {}
    fake_pipeline.run = working(report, seen)
    options = [
        "--overwrite",
        "--strict",
        "--work-dir",
        "w",
        "--model",
        "m/n",
        "--output",
        "o/p",
        "--device",
        "cpu",
        "--quiet",
    ]
    result = call("run", "dit_w4a8", *options)
    recipe = seen["loaded"].recipe
    assert (seen["overwrite"], seen["strict"], seen["work_dir"]) == (True, True, Path("w"))
    assert (recipe.model.id, str(recipe.export[0].path), recipe.device) == ("m/n", "o/p", "cpu")
    assert (result.out, result.err) == ("", "warning: something to look at\n")


def test_run_as_json_prints_one_document(call, fake_pipeline, report):
    fake_pipeline.run = working(report)
    result = call("run", "dit_w4a8", "--json")
    assert result.json == report and "calibrate ..." in result.err


def test_json_holds_no_infinities(call, fake_pipeline, report):
    report["evaluation"]["metrics"]["sqnr_db"] = float("inf")
    fake_pipeline.run = working(report)
    assert call("run", "dit_w4a8", "--json").json["evaluation"]["metrics"]["sqnr_db"] is None


def test_run_on_a_terminal(call, fake_pipeline, report):
    fake_pipeline.run = working(report)
    result = call("run", "dit_w4a8", terminal=True)
    assert result.code == 0 and "before and after" in result.out and "\x1b[" in result.out
    assert "calibrate" in result.err and "something to look at" in result.err


def test_github_files_are_written(call, fake_pipeline, report, monkeypatch, tmp_path):
    summary, outputs = tmp_path / "summary.md", tmp_path / "outputs"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_OUTPUT", str(outputs))
    fake_pipeline.run = working(report)
    assert call("run", "dit_w4a8").code == 0
    text = summary.read_text()
    assert (
        text.startswith("before\n## compress: dit_w4a8\n")
        and "| size_ratio | <= 0.35 | 0.3 | passed |" in text
    )
    found = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    (row,) = json.loads(found.pop("results"))
    assert row["recipe"] == "dit_w4a8" and row["path"] == "out/x" and row["sqnr_db"] == 21.25
    assert found == {
        "exit_code": "0",
        **dict.fromkeys(("repo", "revision", "commit", "url", "tag"), ""),
        "path": "out/x",
        "report": "out/x/report.json",
        "format": "compress",
        "bytes": "1700000",
        "verified": "true",
        "gates_passed": "false",
        "size_ratio": "0.3",
        "sqnr_db": "21.25",
    }


# error, whether work had begun, exit code, what is said, what the hint says
ENDINGS = [
    (KeyboardInterrupt(), True, 130, "interrupted", "continues where this run stopped"),
    (KeyboardInterrupt(), False, 130, "interrupted", None),
    (
        OSError(errno.ENOSPC, "No space left on device", "w/x"),
        True,
        5,
        "w/x: the disk is full",
        "continues where",
    ),
    (OSError(errno.ENOSPC, "No space left on device"), False, 3, "the disk is full", "another disk"),
    (OSError(errno.EFBIG, "File too large", "w/x"), True, 5, "w/x: would be larger", "ulimit -f"),
    (OSError(errno.EFBIG, "File too large"), False, 3, "a file: would be larger", "ulimit -f"),
    (
        SafetensorError("I/O error: File too large (os error 27)"),
        True,
        5,
        "would be larger",
        "continues where",
    ),
    (
        SafetensorError("I/O error: No space left (os error 28)"),
        True,
        5,
        "the disk is full",
        "continues where",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "o"), False, 3, "o: not permitted", "--output"),
    (PermissionError(errno.EACCES, "Permission denied", "o"), True, 5, "o: not permitted", "continues where"),
    (MemoryError(), True, 5, "out of memory", "batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), True, 5, "out of memory", "batch_size"),
    (ConnectionError("refused"), False, 7, "the network or the Hub refused: refused", "--model"),
    (TimeoutError("late"), False, 7, "late", "network"),
    (PlanError("too large", hint="use less"), False, 3, "too large", "use less"),
    (SourceError("damaged"), False, 4, "damaged", None),
    (StageError("diverged"), True, 5, "diverged", None),
    (VerifyError("gate"), True, 6, "gate", None),
    (HubError("no"), True, 7, "no", None),
]


@pytest.mark.parametrize(("error", "started", "code", "message", "hint"), ENDINGS)
def test_endings(call, fake_pipeline, error, started, code, message, hint):
    fake_pipeline.run = failing(error, started=started)
    result = call("run", "dit_w4a8", "--json")
    assert result.code == code
    failure = result.json["error"]
    assert failure["exit_code"] == code and message in failure["message"]
    assert (hint in failure["hint"]) if hint else failure["hint"] is None
    assert "Traceback" not in result.err
    assert list(Path().iterdir()) == []


def test_a_defect_leaves_one_line_and_a_log(call, fake_pipeline):
    fake_pipeline.run = failing(ZeroDivisionError("by zero\nsecond line"))
    result = call("run", "dit_w4a8")
    assert result.code == 1 and result.out == ""
    error = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "a defect of compress: ZeroDivisionError: by zero" in error[0]
    log = Path(error[0].split("the traceback is in ")[1].rstrip(")"))
    assert "ZeroDivisionError: by zero" in log.read_text() and "Traceback" in log.read_text()
    log.unlink()
    Path(".compress").mkdir()
    result = call("run", "dit_w4a8", "--debug")
    assert "Traceback" in result.err and "/.compress/logs/compress-" in result.err
    assert "run again with --debug" not in result.err


def test_a_refused_result_is_shown_but_its_report_of_an_earlier_run_is_not(call, fake_pipeline, report):
    folder = Path("out/y.rejected")

    def run(loaded, *, progress, **options):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(report))
        raise VerifyError("sqnr_db is 21.25, required >= 30", hint=f"kept in {folder}")

    fake_pipeline.run = run
    result = call("run", "dit_w4a8", "--output", "out/y")
    assert result.code == 6 and "FAILED" in result.out and "error: sqnr_db is 21.25" in result.err
    assert call("run", "dit_w4a8", "--output", "out/y", "--json").json["error"]["exit_code"] == 6
    os.utime(folder / "report.json", (1, 1))
    fake_pipeline.run = failing(VerifyError("the folder does not load"))
    assert call("run", "dit_w4a8", "--output", "out/y").out == ""


def test_plan(call, fake_pipeline, plan_document):
    fake_pipeline.plan = lambda loaded, *, progress: plan_document
    result = call("plan", "dit_xl_w4a8")
    assert result.code == 0
    for text in ("675.1 M", "118.7 G", "1.35 GB", "541 MB", "3.2 GB", "note: vidit_q: 3 layers stay"):
        assert text in result.out, text
    assert result.err == "next: compress run dit_xl_w4a8\n"
    assert call("plan", "dit_xl_w4a8", "--json").json == plan_document
    plan_document["export"] = [
        {"path": "out/a", "format": "compress", "bytes": 2_000_000},
        {"path": "out/b", "format": "torchao", "bytes": 3_000_000},
    ]
    result = call("plan", "dit_xl_w4a8")
    assert "of out/a (compress): 2 MB" in result.out and "of out/b (torchao): 3 MB" in result.out


def test_evaluate(call, fake_pipeline, report):
    seen = {}

    def evaluate(folder, *, recipe, progress):
        seen.update(folder=folder, recipe=recipe)
        return {key: report[key] for key in ("evaluation", "gates")}

    fake_pipeline.evaluate = evaluate
    result = call("evaluate", "out/x")
    assert seen == {"folder": "out/x", "recipe": None}
    assert result.code == 6 and "21.25" in result.out and "gates not passed: sqnr_db" in result.err
    assert call("evaluate", "out/x", "--json").json["error"]["exit_code"] == 6
    report["gates"] = report["gates"][:1]
    result = call("evaluate", "out/x", "--recipe", "dit_w8a8", "--json")
    assert result.code == 0 and result.json["evaluation"]["metrics"]["sqnr_db"] == 21.25
    assert seen["recipe"].recipe.stages[0].settings.weight_bits == 8


def test_folders_that_are_not_there(call):
    assert call("verify", "nowhere").code == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_in_a_real_process(tmp_path, number):
    program = """
import sys, time
from types import ModuleType
import compress
module = ModuleType("compress.pipeline")
def run(loaded, *, progress, **options):
    progress.start("work", None)
    time.sleep(60)
module.run = run
sys.modules["compress.pipeline"] = compress.pipeline = module
from compress.cli.main import main
sys.argv = ["compress", "run", "dit_w4a8"]
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the signal, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr.readline() == "work ...\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    assert err == "error: interrupted\n  hint: the same command continues where this run stopped\n"
