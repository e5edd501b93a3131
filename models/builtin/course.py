"""How far the training of a built-in model is, and what is told of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Course:
    """A training that is bounded by the clock or by steps.

    Attributes:
        limit_steps: optimizer steps; None: the clock bounds it.
        limit_seconds: wall time, where no steps bound it.
        steps: optimizer steps done.
        history: what is written to `training.json`.
    """

    limit_steps: int | None
    limit_seconds: float
    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.steps / self.limit_steps if self.limit_steps else self.seconds / self.limit_seconds

    def note(self, **means: float) -> None:
        """Keep mean values by name, such as a loss."""
        row = {"step": self.steps, "seconds": round(self.seconds)}
        self.history.append(row | {name: round(value, 4) for name, value in means.items()})
