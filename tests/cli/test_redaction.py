"""What passes the sink or the guarded streams leaves without tokens, and streams stay what they were."""

from __future__ import annotations

import io
import json
import sys

import pytest
from compress.cli._errors import classify
from compress.cli._output import Output
from compress.cli._redaction import RedactedStream, guard_streams
from compress.cli._tables import Table
from compress.errors import RecipeError
from compress.recipes.secrets import redacted

from .conftest import Terminal

TOKEN = "hf_" + "PlAnTeD" * 6


@pytest.fixture(params=[io.StringIO, Terminal])
def streams(request):
    return request.param(), request.param()


@pytest.mark.parametrize(("as_json", "debug"), [(False, False), (True, False), (False, True)])
def test_nothing_leaves_the_sink_with_a_token(streams, as_json, debug):
    out, err = streams
    sink = Output(out, err).configure(as_json=as_json, debug=debug)
    document = {"path": f"out/{TOKEN}", "rows": [TOKEN, {TOKEN: (TOKEN, 1.0)}]}
    long = "x" * 68 + "=" + TOKEN  # a terminal of 80 columns folds it in the middle of the token
    sink.result(document, [Table(TOKEN, ["a", "b"], [[long, TOKEN], ["b", long]]), f"line {TOKEN}"])
    for say in (sink.message, sink.hint, sink.warning):
        say(f"said {long}")
    error = RecipeError(f"bad {TOKEN}", file=f"{TOKEN}.yaml", line=1, column=2, hint=f"not {TOKEN}")
    sink.failure(classify(error, started=False), error)
    with sink.progress() as progress:
        progress.start(f"step {TOKEN}", 2)
        progress.advance(detail=long)
        progress.note(f"note {long}")
        progress.warn(f"warning {long}")
        progress.finish()
    text = out.getvalue() + err.getvalue()
    flat = "".join(character for character in text if character.isalnum() or character == "_")
    assert TOKEN not in flat and "PlAnTeDPlAnTeD" not in flat
    assert text.count("***") >= 8


def test_values_keep_their_form():
    value = {"a": [1, None, True, 0.5, TOKEN], TOKEN: ({"b": f"x {TOKEN}"},)}
    assert redacted(value) == {"a": [1, None, True, 0.5, "***"], "***": [{"b": "x ***"}]}


def test_json_stays_json():
    out = io.StringIO()
    Output(out, io.StringIO()).document({"url": f"https://user:{TOKEN}@host/x?token={TOKEN}&b=1"})
    assert TOKEN not in out.getvalue()
    assert json.loads(out.getvalue())["url"].startswith("https://***@host/x?token=***")


def test_a_guarded_stream_is_the_stream(tmp_path):
    with (tmp_path / "file").open("w", encoding="utf-8") as inner:
        stream = RedactedStream(inner)
        assert stream.write(f"a {TOKEN} b\n") == len(f"a {TOKEN} b\n")
        stream.writelines([f"{TOKEN}\n", "c\n"])
        print("printed", TOKEN, file=stream, flush=True)
        assert stream.fileno() == inner.fileno() and stream.encoding == "utf-8"
        assert not stream.isatty() and stream.writable() and not stream.closed
        with pytest.raises(AttributeError):
            _ = stream.no_such_thing
    assert (tmp_path / "file").read_text() == "a *** b\n***\nc\nprinted ***\n"
    assert RedactedStream(Terminal()).isatty()


def test_rich_draws_on_a_guarded_terminal():
    from rich.console import Console

    inner = Terminal()
    console = Console(file=RedactedStream(inner))
    assert console.is_terminal
    console.print(f"token {TOKEN}", style="bold red", highlight=False)
    assert "***" in inner.getvalue() and TOKEN not in inner.getvalue() and "\x1b[" in inner.getvalue()


def test_streams_are_guarded_once(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw, or where it was closed
    guard_streams()
    first = sys.stdout
    guard_streams()
    assert sys.stdout is first and sys.stderr is None
    print(TOKEN)
    assert out.getvalue() == "***\n"


def test_libraries_are_redacted_while_bars_are_drawn(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    guard_streams()
    with Output().progress() as progress:
        progress.start("work", 1)
        sys.stderr.write(f"a library says {'x' * 60}={TOKEN}\n")
        progress.finish()
    text = "".join(character for character in out.getvalue() + err.getvalue() if character.isalnum())
    assert "alibrarysays" in text and "PlAnTeDPlAnTeD" not in text
