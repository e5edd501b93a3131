"""What an individual is worth: the open model, shown as the individual would leave it, answers its items.

In a process of its own the same is done to a model that is opened there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ....calibration.answer_scores import Score, Scorer
from ....calibration.answers import Item
from ....calibration.content import hash_weights
from ....errors import StageError
from ....models.base import OpenModel
from ....recipes.experts import FitnessSettings
from .candidate import Candidates
from .genome import Individual
from .layer_groups import LayerGroup

VERSION = 1
"""Raise it when the same items and settings give other scores."""


class Judge:
    """Scores individuals on some items.

    Args:
        scorer: of the open model, with the items; by itself it scores the model as it is.
        candidates: of the same model; several where individuals have their layers in other groups.
    """

    def __init__(self, scorer: Scorer, *candidates: Candidates) -> None:
        self.scorer = scorer
        self._candidates = {one.groups: one for one in candidates}

    def score(self, individual: Individual) -> Score:
        """Return everything that was measured of an individual."""
        with self._candidates[len(individual.router)].shown(individual):
            return self.scorer.score()

    def __call__(self, individual: Individual) -> float:
        """Return the fitness of an individual, in points."""
        return self.score(individual).points


@dataclass(frozen=True)
class JudgingJob:
    """How another process comes to a `Judge`; picklable.

    Attributes:
        opener: opens the model.
        weights: hash of the weights that it must have.
        groups: of layers.
        active: experts per token; None: as many as before.
        items: that are answered.
        settings: how answers are judged.
        name: of the items, for messages.
    """

    opener: Callable[[], OpenModel]
    weights: str
    groups: tuple[LayerGroup, ...]
    active: int | None
    items: Sequence[Item]
    settings: FitnessSettings
    name: str = "fitness"

    def open(self) -> Judge:
        """Open the model and prepare the items.

        Raises:
            StageError: the model is not the one that is searched.
        """
        model = self.opener()
        if hash_weights(model.module) != self.weights:
            raise StageError(
                "the model opened for a worker is not the one that is searched: its weights differ",
                hint="search in one process",
            )
        candidates = Candidates(model, self.groups, self.active)
        return Judge(Scorer(model, self.items, self.settings), candidates)
