"""One decision: scores of the model as it is now, and what stays; kept on disk before a weight is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibration.objectives import Objective
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress
from ...recipes.pruning import IsomorphicSettings
from ...runtime.atomic import atomic_file
from .classes import classes
from .competition import check_shares
from .gradients import Gradients, accumulate
from .groups import Group, Selection
from .scopes import Scope
from .scores import scored_tensors
from .scores import scores as score
from .selection import ranked, realise, widths_at
from .target import Cost, Counter, Search, limits_of
from .widths import Widths

_BINS = 32
_LIST_OF_NUMBERS = re.compile(r"\[\s*(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s*\]")


@dataclass(frozen=True)
class Moment:
    """Where in an iterative schedule a decision stands.

    Attributes:
        index: of the step, from 0.
        count: of all steps.
        initial: sizes before the first step.
        original: what the model took before any stage; shares of a target are of this.
    """

    index: int
    count: int
    initial: Widths
    original: Cost

    @property
    def last(self) -> bool:
        """Whether no step follows."""
        return self.index + 1 == self.count

    @property
    def part(self) -> float:
        """How much of the shares is removed after this step, 0-1."""
        return (self.index + 1) / self.count


@dataclass(frozen=True)
class Decision:
    """What stays after a step.

    Attributes:
        selection: counted in the model before the step.
        loss: mean over the calibration samples before the step; None where none was computed.
        loss_name: which one.
        samples: that the scores are of; 0 for magnitude.
        histograms: class -> scores of its channels, of those that stay and of those that go.
        target: what was asked and what is reached; None without a target.
    """

    selection: Selection
    loss: float | None
    loss_name: str | None
    samples: int
    histograms: Mapping[str, dict[str, Any]]
    target: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self), "selection": self.selection.to_json()}

    @classmethod
    def read(cls, path: Path) -> Decision | None:
        """Read what an earlier run decided; None where it had not come so far."""
        if not path.is_file():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "selection": Selection.parse(json.dumps(data["selection"]))})

    def write(self, path: Path) -> None:
        """Keep it; the file is whole or absent."""
        write_json(path, self.to_json())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON value in which every list of numbers takes one line; whole or absent."""
    with atomic_file(path) as temporary:
        temporary.write_text(readable_json(value), encoding="utf-8")


def readable_json(value: Mapping[str, Any]) -> str:
    """Return a JSON text in which every list of numbers takes one line."""
    text = json.dumps(value, indent=1, allow_nan=False)
    return _LIST_OF_NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


@dataclass(frozen=True)
class Scored:
    """Scores of all groups, and what they come from.

    Attributes:
        scores: group -> [size] float32.
        gradients: None for magnitude.
    """

    scores: Mapping[str, Tensor]
    gradients: Gradients | None


def score_groups(
    model: OpenModel,
    groups: Sequence[Group],
    settings: IsomorphicSettings,
    objective: Objective | None,
    folder: Path | None,
    progress: Progress,
) -> Scored:
    """Score the groups of the model as it is now.

    Args:
        model: with its weights.
        groups: of the same.
        settings: of the stage.
        objective: whose gradient is taken; None for magnitude.
        folder: keeps gradients summed so far; None: nowhere.
        progress: sees the parts.

    Raises:
        StageError: see `accumulate`.
    """
    gradients = None
    if settings.importance == "taylor":
        assert objective is not None
        gradients = accumulate(model, objective, scored_tensors(groups), folder=folder, progress=progress)
    found = score(
        groups, model.module, gradients, importance=settings.importance, normalizer=settings.normalizer
    )
    return Scored(found, gradients)


def find_widths(
    groups: Sequence[Group],
    scopes: Sequence[Scope],
    spec: ModelSpec,
    settings: IsomorphicSettings,
    moment: Moment,
) -> tuple[Widths, dict[str, Any] | None]:
    """Return the sizes after a step, and what was asked and reached of the target.

    Args:
        groups: of the model as it is now.
        scopes: of the same, ranked.
        spec: of the same.
        settings: of the stage.
        moment: the step.

    Raises:
        PlanError: a share or the target cannot be reached, or asks for nothing.
    """
    scale, found, limits = 1.0, None, {}
    if settings.target is None:
        if moment.index == 0:
            check_shares(scopes)
    else:
        limits = limits_of(settings.target, moment.original)
        search = Search(groups, scopes, settings, Counter(spec, groups).cost, limits)
        found = search.find(strict=moment.index == 0)
        scale = found.scale
    if found is not None and moment.last:
        assert settings.target is not None
        return found.widths, found.to_json(settings.target, limits)
    final = widths_at(groups, scopes, settings, lambda scope: scope.total(scale))
    if moment.last:
        return final, None
    partly = widths_at(
        groups, scopes, settings, lambda scope: scope.total(scale * moment.part), rounding=False
    )
    # A layer that ends whole, or wider for its rounding, must not have lost by then what it keeps.
    return partly.at_least(final if found is None else found.widths), None


def decide(
    model: OpenModel,
    groups: Sequence[Group],
    scored: Scored,
    settings: IsomorphicSettings,
    moment: Moment,
    samples: int,
) -> Decision:
    """Decide what stays after a step; nothing is changed.

    Args:
        model: as it is now.
        groups: of the same.
        scored: of the same.
        settings: of the stage.
        moment: the step.
        samples: of the calibration.

    Raises:
        PlanError: see `find_widths` and `selection.realise`.
    """
    scopes = ranked(groups, scored.scores, settings, moment.initial)
    widths, target = find_widths(groups, scopes, model.dense(), settings, moment)
    if moment.index == 0 and not moment.last:
        # One step may be too small for any layer; all of them together may not.
        at_once = replace(moment, count=1)
        realise(
            groups, scored.scores, find_widths(groups, scopes, model.dense(), settings, at_once)[0], settings
        )
    selection = realise(groups, scored.scores, widths, settings, required=moment.count == 1)
    gradients = scored.gradients
    return Decision(
        selection=selection,
        loss=None if gradients is None else gradients.loss,
        loss_name=None if gradients is None else loss_name(model, settings),
        samples=0 if gradients is None else samples,
        histograms={
            name: histogram(members, scored.scores, selection)
            for name, members in classes(groups, settings.ranking).items()
        },
        target=target,
    )


def loss_name(model: OpenModel, settings: IsomorphicSettings) -> str:
    """Return the name of the loss whose gradients score a model."""
    return settings.loss or ("cross_entropy" if model.family.task == "classify" else "denoising")


def histogram(members: Sequence[Group], scores: Mapping[str, Tensor], selection: Selection) -> dict[str, Any]:
    """Return how the scores of a class spread: edges of equal bins, and how many stay and go in each."""
    values = torch.cat([scores[group.name].double() for group in members])
    stays = torch.cat(
        [
            selection.mask(group.name)
            if group.name in selection.kept
            else torch.ones(group.size, dtype=torch.bool)
            for group in members
        ]
    )
    low, high = float(values.min()), float(values.max())
    edges = torch.linspace(low, high if high > low else low + 1.0, _BINS + 1, dtype=torch.float64)
    places = torch.bucketize(values, edges[1:-1], right=True)
    counted = {
        name: torch.bincount(places[chosen], minlength=_BINS).tolist()
        for name, chosen in (("kept", stays), ("removed", ~stays))
    }
    return {"edges": [float(f"{edge:.6g}") for edge in edges.tolist()], **counted}


def cost_of(spec: ModelSpec) -> Cost:
    """Return what a model takes."""
    size = spec.size()
    return Cost(size.macs, size.parameters, size.bytes)
