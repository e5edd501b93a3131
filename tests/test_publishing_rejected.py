"""What becomes of a result that is refused: kept, where nothing foreign is, and never to be published."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from compress import publishing
from compress.errors import VerifyError
from compress.exporters.hub_bundle import read_report
from compress.exporters.verify import verify_folder
from compress.recipes.export import ExportSettings
from compress.variants import Variant

WARNING = "the licence is not known"
SECRET = "hf_" + "q" * 34


@pytest.fixture
def settle(exported):
    """End a strict run with a warning; its one result is a folder that verifies, to be named `out`."""
    (exported.parent / "new").mkdir()

    def end(*warnings):
        folder = Path(exported.rename(exported.parent / "new" / ".out.partial"))
        document = json.loads((folder / "report.json").read_text())
        variant = Variant(ExportSettings(path=exported.parent / "out"), folder, document, None)
        state = SimpleNamespace(
            strict=True,
            overwrite=None,
            progress=SimpleNamespace(messages=list(warnings)),
            work=SimpleNamespace(log=lambda *event, **fields: None),
        )
        return publishing.settle(state, [variant])

    return end


def test_a_refused_result_cannot_be_published_under_another_name(settle, exported):
    with pytest.raises(VerifyError, match=WARNING):
        settle(WARNING, f"no answer with {SECRET}")
    kept = exported.parent / "out.rejected"
    document = json.loads((kept / "report.json").read_text())
    assert document["export"]["rejected"][0] == f"warning under --strict: {WARNING}"
    assert len(document) == 7 and SECRET not in (kept / "report.json").read_text()
    renamed = kept.rename(exported.parent / "good")
    with pytest.raises(VerifyError, match=f"good: this result was rejected: .*{WARNING}"):
        read_report(renamed)
    with pytest.raises(VerifyError, match=f"the run rejected this result: .*{WARNING}"):
        verify_folder(renamed)


def test_a_result_that_holds_is_published_as_it_was(settle, exported):
    before = (exported / "report.json").read_bytes()
    settle()
    assert (exported.parent / "out" / "report.json").read_bytes() == before
    assert read_report(exported.parent / "out") and verify_folder(exported.parent / "out")


@pytest.mark.parametrize("foreign", ["file", "folder", "link"])
def test_what_is_foreign_costs_no_refused_result(settle, exported, foreign):
    taken = exported.parent / "out.rejected"
    if foreign == "link":
        taken.symlink_to(exported.parent / "absent")
    else:
        if foreign == "folder":
            taken.mkdir()
        (taken / "notes.txt" if foreign == "folder" else taken).write_text("mine")
    with pytest.raises(VerifyError, match=WARNING) as caught:
        settle(WARNING)
    assert caught.value.hint.endswith("out.rejected-2")
    assert (exported.parent / "out.rejected-2" / "report.json").is_file()
    assert taken.is_symlink() or taken.is_file() or [path.name for path in taken.iterdir()] == ["notes.txt"]
