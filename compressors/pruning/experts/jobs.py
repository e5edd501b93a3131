"""What is handed to workers, and what a worker is, whatever carries it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .genome import Individual

Evaluate = Callable[[Individual], float]
"""Returns the fitness of an individual, in points."""
HINT = "the finished evaluations are kept: run again; take fewer workers if memory ran out"
"""What to do where a worker dies."""


class Job(Protocol):
    """What is evaluated; picklable.

    Attributes:
        name: completes "a process that measures ...", for messages.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see above

    def open(self) -> Evaluate:
        """Open the model, in the worker; the result gives the fitness of an individual in points."""


class Evaluator(Protocol):
    """A worker as its thread of this process sees it."""

    def ready(self) -> None:
        """Wait until the model is open."""

    def ask(self, individual: Individual) -> float:
        """Wait for the fitness of an individual."""

    def end(self) -> None:
        """End the worker, whatever it is doing; who waits for it gets an error."""
