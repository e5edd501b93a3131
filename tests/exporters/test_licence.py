"""The source's licence texts lie in the export; an unknown licence is warned about."""

from __future__ import annotations

import pytest
from compress.errors import UsageError
from compress.exporters import hub_bundle
from compress.exporters.licence import copy_licence, name_of
from compress.models.base import Source
from compress.models.open import read_spec
from compress.models.source_card import SourceCard
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef


class Recorder(SilentProgress):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


def test_texts_are_copied_and_a_known_licence_is_not_warned_about(tiny_dit, tmp_path):
    (tiny_dit / "README.md").write_text("---\nlicense: mit\n---\n")
    (tiny_dit / "LICENSE.txt").write_bytes("MIT ©\n".encode())
    (tiny_dit / "NOTICE").write_text("by us\n")
    out = tmp_path / "out"
    out.mkdir()
    progress = Recorder()
    source = read_spec(ModelRef(id=str(tiny_dit))).source
    assert copy_licence(source, out, progress) == ["LICENSE.txt", "NOTICE"]
    assert (out / "LICENSE.txt").read_bytes() == "MIT ©\n".encode()
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE.txt", "NOTICE"]
    assert progress.warnings == []


def test_an_unknown_licence_is_warned_about_without_the_path(tiny_dit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    progress = Recorder()
    assert copy_licence(read_spec(ModelRef(id=str(tiny_dit))).source, out, progress) == []
    assert len(progress.warnings) == 1
    assert progress.warnings[0].startswith("tiny-dit: the licence is not known")
    assert "README.md" in progress.warnings[0]
    assert str(tmp_path) not in progress.warnings[0]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (("builtin:dit", None, SourceCard()), "builtin:dit"),
        (("org/name", "0" * 40, SourceCard(base_model="org/name")), "org/name"),
        (("/x/models--a--b/snapshots/c", None, SourceCard(base_model="a/b")), "a/b"),
        (("some/where/model", None, SourceCard()), "folder"),
    ],
)
def test_the_name_is_one_that_others_know(tmp_path, source, name):
    identifier, revision, card = source
    (tmp_path / "folder").mkdir()
    assert name_of(Source(identifier, tmp_path / "folder", revision, card=card)) == name


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.TXT", "recipe.yaml"])
def test_a_token_in_a_licence_text_is_not_pushed(name):
    file = hub_bundle.PushedFile.of(name, b"by hf_" + b"a1" * 17)
    with pytest.raises(UsageError, match=f"{name} holds an access token"):
        hub_bundle._refuse_secrets({name: file})
