"""What the steps of one run hand to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .progress import Progress
from .recipes.loader import LoadedRecipe
from .recipes.schema import Recipe
from .recipes.workers import Workers
from .report import Started
from .workdir import WorkDirectory

if TYPE_CHECKING:
    from torch import Tensor

    from .models.base import OpenModel


class Warnings:
    """A `Progress` that passes everything on and remembers the warnings, for `strict`."""

    def __init__(self, inner: Progress) -> None:
        self.messages: list[str] = []
        self.start, self.advance = inner.start, inner.advance
        self.finish, self.note = inner.finish, inner.note
        self._inner = inner

    def warn(self, message: str) -> None:
        """Remember a warning and pass it on; once, also where every variant gives it."""
        if message not in self.messages:
            self.messages.append(message)
            self._inner.warn(message)


@dataclass
class Run:
    """One run: what it was asked for, and where it works.

    Attributes:
        overwrite: replace output folders that compress wrote; None: as each export says.
        recorded_recipe: what the reports give as `recipe`; None: the recipe itself.
        workers: processes that a stage may use, or a Ray cluster.
        recorded_speed: what the report says of speed instead of measuring it: no time comes again, and
            everything else of a reproduced folder should; None: it is measured, if the recipe asks for it.
    """

    loaded: LoadedRecipe
    work: WorkDirectory
    progress: Warnings
    fresh: bool
    overwrite: bool | None
    strict: bool
    recorded_recipe: dict[str, Any] | None = None
    workers: Workers = 1
    recorded_speed: dict[str, Any] | None = None
    started: Started = field(default_factory=Started)

    @property
    def recipe(self) -> Recipe:
        """The validated recipe."""
        return self.loaded.recipe


@dataclass(frozen=True)
class Product:
    """What the stages made: the same for every variant that is exported.

    Attributes:
        model: after its last stage.
        described: the report's `model`.
        stages: the report's `stages`.
        device: that the run used.
        samples: what to call a denoiser between two stages -> its samples then; see `Interim.samples`.
    """

    model: OpenModel
    described: dict[str, Any]
    stages: list[dict[str, Any]]
    device: str
    samples: Mapping[str, Tensor]
