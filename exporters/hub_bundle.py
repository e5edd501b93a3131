"""What a push sends: the files of an exported folder, with the card as it reads in the repository.

The user's folder stays as it is. Where the card changes, the report that is sent lists the new one; both
are kept in memory, everything else is read from the folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from ..errors import SourceError, UsageError, VerifyError
from ..recipes.export import REJECTED, PushSettings
from ..recipes.secrets import holds_secret
from ..runtime.hashes import file_sha256
from ..runtime.validate import read_json
from .recorded_recipe import RECIPE_NAME, check_recipe
from .verify import MAX_REPORT_BYTES, REPORT_NAME, is_kept, recorded_device

CARD_NAME = "README.md"  # what the Hub shows
_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, IndexError)
_TEXTS = (".json", ".jsonl", ".jinja", ".md", ".py", ".yaml", ".txt")


@dataclass(frozen=True)
class PushedFile:
    """One file of a bundle.

    Attributes:
        name: below the repository's root.
        size_bytes: its size.
        sha256: of its content.
        content: the file on the disk, or the content itself.
        kept: the repository's own licence, which no run wrote.
    """

    name: str
    size_bytes: int
    sha256: str
    content: Path | bytes
    kept: bool = False

    @classmethod
    def of(cls, name: str, content: bytes, *, kept: bool = False) -> PushedFile:
        """Describe content that is in memory."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content, kept)

    @cached_property
    def git_oid(self) -> str:
        """The SHA-1 that git gives the content."""
        digest = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        digest.update(self.content if isinstance(self.content, bytes) else self.content.read_bytes())
        return digest.hexdigest()

    def row(self) -> dict[str, Any]:
        """Return its row in the report's `export.files`."""
        row = {"name": self.name, "bytes": self.size_bytes, "sha256": self.sha256}
        return row | {"kept": True} if self.kept else row


@dataclass(frozen=True)
class Bundle:
    """What a repository holds after a push.

    Attributes:
        folder: the exported folder.
        document: the report as it is sent.
        files: by name, the report included.
    """

    folder: Path
    document: dict[str, Any]
    files: dict[str, PushedFile]

    @property
    def report(self) -> bytes:
        """The report as it is sent."""
        content = self.files[REPORT_NAME].content
        return content if isinstance(content, bytes) else content.read_bytes()


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of an exported folder that may be published.

    Raises:
        SourceError: there is no folder, or it holds no report of a run.
        VerifyError: it was rejected, was not verified, a gate failed, or its recipe.yaml is another
            recipe than its report's.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder", hint="name a folder that `compress run` wrote")
    path = folder / REPORT_NAME
    for name in (REPORT_NAME, RECIPE_NAME):
        if not (folder / name).is_file():
            raise SourceError(f"{folder}: holds no {name}", hint="name a folder that `compress run` wrote")
    document = read_json(path, MAX_REPORT_BYTES)
    try:
        _check_shape(document)
        failed = [str(row["metric"]) for row in document["gates"] if row["passed"] is not True]
        verified = document["export"]["verified"] is True
    except _DAMAGE as error:
        raise _not_a_report(path, error) from None
    hint = "nothing was pushed; run the recipe again until its result is accepted"
    rejected = document["export"].get("rejected")
    if rejected or folder.name.endswith(REJECTED):
        why = f": {'; '.join(map(str, rejected))}" if isinstance(rejected, list) else ""
        raise VerifyError(f"{folder}: this result was rejected{why}", hint=hint)
    if failed:
        raise VerifyError(f"{folder}: the gate {failed[0]} of its report failed", hint=hint)
    if not verified:
        raise VerifyError(f"{folder}: its report says that it was not verified", hint=hint)
    try:
        check_recipe(folder, document)
    except VerifyError as error:
        raise VerifyError(f"{folder}: {error.message}", hint=hint) from None
    return document


def _check_shape(document: Mapping[str, Any]) -> None:
    """Look at what is read after something has been sent; whatever is missing raises one of `_DAMAGE`."""
    for row in document["export"]["files"]:
        PurePath(row["name"]), row["bytes"] + 0, bytes.fromhex(row["sha256"])
    for row in document["gates"]:
        row["metric"], row["expected"], row["measured"]
    for stage in document["stages"]:
        stage["method"]
    document["recipe"], document["model"]["id"], document["export"]["format"], document["export"]["bytes"] + 0
    document["environment"]["versions"].get("compress")
    recorded_device(document)


def _not_a_report(path: Path, error: Exception) -> SourceError:
    what = f"{type(error).__name__}: {error}"
    return SourceError(f"{path}: is not the report of a run ({what})", hint="export the folder again")


def bundle(folder: Path, settings: PushSettings, kept: Mapping[str, bytes]) -> Bundle:
    """Put together what is sent.

    Args:
        folder: exported and verified.
        settings: where it goes; the card says how to load it from there.
        kept: files of the repository that stay although the folder does not have them, such as a
            licence: the report lists them as `kept`, so that a download is as whole as the folder.

    Raises:
        SourceError, VerifyError: as `read_report`.
        UsageError: a text among the files holds an access token.
    """
    document = copy.deepcopy(read_report(folder))
    rows = {row["name"]: row for row in document["export"]["files"]}
    files = {
        name: PushedFile(name, row["bytes"], row["sha256"], folder / name, is_kept(row))
        for name, row in rows.items()
    }
    changed = {
        name: PushedFile.of(name, content, kept=True) for name, content in kept.items() if name not in files
    }
    card = PushedFile.of(CARD_NAME, _card(folder, document, settings).encode())
    if CARD_NAME not in files or files[CARD_NAME].sha256 != card.sha256:
        changed[CARD_NAME] = card
    report = folder / REPORT_NAME
    if changed:
        files |= changed
        document["export"]["files"] = [files[name].row() for name in sorted(files)]
        files[REPORT_NAME] = PushedFile.of(REPORT_NAME, (json.dumps(document, indent=1) + "\n").encode())
    else:
        files[REPORT_NAME] = PushedFile(REPORT_NAME, report.stat().st_size, file_sha256(report), report)
    _refuse_secrets(files)
    return Bundle(folder, document, files)


def _card(folder: Path, document: dict[str, Any], settings: PushSettings) -> str:
    """Render the card for the repository."""
    # Here, because they import torch, and a push that is refused should not wait for it.
    from .card import render_card
    from .figures import figures_in

    figures = figures_in(folder)
    recipe_text = (folder / RECIPE_NAME).read_text(encoding="utf-8")
    try:
        return render_card(document, figures, recipe_text, place=settings.repo, revision=settings.revision)
    except _DAMAGE as error:
        raise _not_a_report(folder / REPORT_NAME, error) from None


def _refuse_secrets(files: Mapping[str, PushedFile]) -> None:
    for file in files.values():
        if Path(file.name).suffix.lower() not in ("", *_TEXTS):
            continue
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        if holds_secret(content.decode("utf-8", "replace")):
            raise UsageError(
                f"{file.name} holds an access token; nothing was pushed",
                hint="take it out of the recipe, revoke it, and run the recipe again",
            )
