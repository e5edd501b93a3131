"""What a card is about: a report, seen from where its reader will find the checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from ..models.source_card import snapshot_of
from ..runtime.fetch import BUILTIN_PREFIX
from .layer_table import label_of, mixed_label_of


@dataclass(frozen=True)
class Subject:
    """A report and the place of its checkpoint.

    Attributes:
        document: the report.
        place: Hub id; None: the folder that the report names.
        revision: branch, tag or commit of `place`; None: its default branch.
    """

    document: Mapping[str, Any]
    place: str | None = None
    revision: str | None = None

    @property
    def model(self) -> Mapping[str, Any]:
        """The report's `model`."""
        found: Mapping[str, Any] = self.document["model"]
        return found

    @property
    def export(self) -> Mapping[str, Any]:
        """The report's `export`."""
        found: Mapping[str, Any] = self.document["export"]
        return found

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The report's measured metrics."""
        found: Mapping[str, Any] = self.document["evaluation"]["metrics"]
        return found

    @property
    def linears(self) -> Sequence[Mapping[str, Any]]:
        """The report's rows of linear layers."""
        found: Sequence[Mapping[str, Any]] = self.document["evaluation"].get("linears", ())
        return found

    @cached_property
    def label(self) -> str | None:
        """Short name of the scheme that most weights have, None where nothing is quantized."""
        return label_of(self.linears)

    @cached_property
    def mixed_label(self) -> str | None:
        """Short name by the mean of the weights' bits where they were chosen per layer, else None."""
        return mixed_label_of(self.document)

    @property
    def folder(self) -> str:
        """The folder as a reader would type it; an absolute path says nothing to others."""
        path = PurePath(self.export["path"])
        return path.name if path.is_absolute() else path.as_posix()

    @property
    def name(self) -> str:
        """What the card is headed with."""
        return PurePath(self.place or self.folder).name

    @property
    def is_adapter(self) -> bool:
        """Whether it is loaded onto the original, and holds no weights of a model."""
        return self.export.get("kv_cache") == "adapter"

    @property
    def target(self) -> str:
        """The checkpoint as an argument of a command."""
        if self.place is None:
            return shlex.quote(self.folder)
        return shlex.quote(f"{self.place}@{self.revision}" if self.revision else self.place)

    @property
    def base_model(self) -> str | None:
        """Hub id of the original; None for a folder or a built-in model."""
        found = self.model.get("base_model")
        if found is None and self.model.get("revision") is not None:  # only the Hub has commits
            found = self.model["id"]
        return found if isinstance(found, str) else None

    @property
    def source(self) -> str:
        """The original's name; of a folder its last part, because the rest belongs to one machine."""
        identifier = str(self.model["id"])
        if identifier.startswith(BUILTIN_PREFIX):
            return identifier
        return self.base_model or PurePath(identifier).name or "a folder"

    @property
    def is_local(self) -> bool:
        """Whether the original is a folder that nobody else has by its name."""
        return self.base_model is None and not str(self.model["id"]).startswith(BUILTIN_PREFIX)

    @property
    def here(self) -> str:
        """What the reader has before them."""
        return "this repository" if self.place else "this folder"

    @property
    def source_revision(self) -> str | None:
        """Commit of the original on the Hub."""
        revision = self.model.get("revision")
        if revision is None and self.base_model is not None:
            found = snapshot_of(PurePath(self.model["id"]))
            revision = found[1] if found else None
        return revision

    @property
    def original(self) -> str:
        """The original as an argument of a command."""
        return shlex.quote(self.source)

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return int(self.metrics["bytes"])
