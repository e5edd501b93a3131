"""A command line to call in-process, its three streams apart; documents to render."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from compress.cli._output import Output
from compress.cli.main import invoke

DATA = Path(__file__).parent / "data"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Call `compress ARGS` in an empty folder and return its exit code and both streams."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, terminal: bool = False) -> Result:
        stream = Terminal if terminal else io.StringIO
        out, err = stream(), stream()
        code = invoke(list(arguments), Output(out, err))
        captured = capsys.readouterr()  # help pages are typer's own
        return Result(code, out.getvalue() + captured.out, err.getvalue() + captured.err)

    return run


@pytest.fixture
def report():
    return json.loads((DATA / "report.json").read_text())


@pytest.fixture
def plan_document():
    return json.loads((DATA / "plan.json").read_text())


@pytest.fixture
def fake_pipeline(monkeypatch):
    """Put a module in the pipeline's place, so that the commands are tested without a model."""
    import sys
    from types import ModuleType

    import compress

    module = ModuleType("compress.pipeline")
    monkeypatch.setitem(sys.modules, "compress.pipeline", module)
    monkeypatch.setattr(compress, "pipeline", module, raising=False)
    return module
