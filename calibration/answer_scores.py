"""How well a language model answers, on items whose answers are known (`answers`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import SourceError
from ..models.base import OpenModel
from .answer_text import generated, stops_of
from .answer_tokens import Padded, Row, Texts, padded, parts_of
from .answers import Item

if TYPE_CHECKING:
    from ..recipes.experts import FitnessSettings

FAILED = -math.inf
"""Points of a model that gives something else than numbers."""


@dataclass(frozen=True)
class Score:
    """How well a model does.

    Attributes:
        points: what a search compares: the accuracy times 100, less the loss times the tie break; of `loss`,
            minus the loss times 100. Minus infinity for a model that failed.
        accuracy: 0 to 1; None where it is judged by the loss alone, or failed.
        loss: mean of a token of the (right) answers, in nats; None where it is not asked for, or failed.
        count: items.
        variance: of what an item adds to the accuracy, times the number of items; None as the accuracy.
    """

    points: float
    accuracy: float | None
    loss: float | None
    count: int
    variance: float | None = None

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy, were other items of this kind drawn; None where there is no accuracy."""
        return None if self.variance is None else math.sqrt(self.variance / self.count)

    def to_json(self) -> dict[str, float | int | None]:
        """Return the report's form; the points of a model that failed are null."""
        return {
            "points": self.points if math.isfinite(self.points) else None,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "loss": self.loss,
            "count": self.count,
        }


class Scorer:
    """Items that a model is asked again and again while it changes.

    Args:
        model: a language model; its folder holds the tokenizer.
        items: at least one, read for this kind of judgement.
        settings: what it is judged by, and how many rows are computed together.

    Raises:
        ValueError: there are no items.
        SourceError: no tokenizer, one that does not fit the model, or an item that is too long for it.
    """

    def __init__(self, model: OpenModel, items: Sequence[Item], settings: FitnessSettings) -> None:
        if not items:
            raise ValueError("there are no items to score")
        self._module: Any = model.module
        self._items, self._settings = tuple(items), settings
        self._device = next(model.module.parameters()).device
        self._texts = Texts(model)
        choices = settings.by == "choices"
        self._by_item = [self._texts.rows(item, every=choices) for item in self._items]
        self._rows = [row for rows in self._by_item for row in rows]
        self._firsts = [0, *accumulate(len(rows) for rows in self._by_item)][:-1]
        self._batches = [_Batch.of(self._rows, part, self._device) for part in self._parts(self._rows)]
        self._right = torch.tensor(
            [
                first + (item.right or 0 if choices else 0)
                for first, item in zip(self._firsts, self._items, strict=True)
            ]
        )
        self._questions: list[Padded] = []
        if settings.by == "exact_match":
            self._stops = stops_of(self._module, self._texts)
            self._questions = self._asked()

    @torch.no_grad()
    def score(self) -> Score:
        """Return how well the module does as it is now; neither it nor a random state is changed."""
        by, count = self._settings.by, len(self._items)
        loss: float | None = None
        if by != "exact_match" or self._settings.tie_break:
            forced = self._forced()
            loss = forced.loss(self._right)
            if not forced.finite:
                return Score(FAILED, None, None, count)
            if by == "loss":
                return Score(-100.0 * loss, None, loss, count)
            if by == "tokens":
                return self._accurate(*_ratio(forced.hits, forced.lengths), loss)
            if by == "choices":
                return self._accurate(*_share(self._chosen(forced)), loss)
        right = self._exact()
        return Score(FAILED, None, None, count) if right is None else self._accurate(*_share(right), loss)

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments of plain forwards over the items, prompt with (right) answer.

        Every item is in one row of one of them: `input_ids` and `attention_mask` [rows, tokens] int64 on the
        module's device, padded at the right, and `use_cache`.
        """
        rows = [self._rows[place].ids for place in self._right.tolist()]
        for part in parts_of([len(row) for row in rows], self._settings.batch_size):
            batch = padded(rows, part, self._device)
            yield {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}

    def _parts(self, rows: Sequence[Row]) -> list[list[int]]:
        return parts_of([len(row.ids) for row in rows], self._settings.batch_size)

    def _asked(self) -> list[Padded]:
        prompts = [row.ids[: row.prompt] for row in self._rows]
        empty = next((item for prompt, item in zip(prompts, self._items, strict=True) if not prompt), None)
        if empty is not None:
            raise SourceError(f"{empty.place}: prompt: has no token, and nothing is generated from nothing")
        parts = parts_of([len(prompt) for prompt in prompts], self._settings.batch_size)
        return [padded(prompts, part, self._device, left=True) for part in parts]

    def _accurate(self, accuracy: float, variance: float, loss: float | None) -> Score:
        points = 100.0 * accuracy
        if loss is not None:
            points -= self._settings.tie_break * loss
        return Score(points, accuracy, loss, len(self._items), variance)

    def _exact(self) -> list[bool] | None:
        """Return whether every item's generated text is its answer; None of a model that failed."""
        right = [False] * len(self._items)
        for batch in self._questions:
            texts = generated(self._module, self._texts, batch, self._stops, self._settings.new_tokens)
            if texts is None:
                return None
            for place, text in zip(batch.places, texts, strict=True):
                right[place] = text.strip() == self._items[place].answer.strip()
        return right

    def _forced(self) -> _Forced:
        """Return the sums of every row, in the rows' order."""
        sums = torch.zeros(3, len(self._rows), dtype=torch.float64)
        # All of them are computed before the first one is waited for.
        parts = [batch.sums(self._module) for batch in self._batches]
        for batch, part in zip(self._batches, parts, strict=True):
            sums[:, batch.places] = part.cpu()
        return _Forced(*sums)

    def _chosen(self, forced: _Forced) -> list[bool]:
        """Return whether the right choice of every item is its most likely one; the first of equal ones."""
        likely = (-forced.losses).tolist()
        spans = [
            likely[first : first + len(rows)] for first, rows in zip(self._firsts, self._by_item, strict=True)
        ]
        return [span.index(max(span)) == item.right for span, item in zip(spans, self._items, strict=True)]


@dataclass(frozen=True)
class _Forced:
    """What the answers' tokens come to where the right ones before them are given: [rows] float64.

    Attributes:
        losses: summed over the tokens of an answer.
        hits: tokens that are the model's first choice.
        lengths: tokens.
    """

    losses: Tensor
    hits: Tensor
    lengths: Tensor

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.losses).all())

    def loss(self, rows: Tensor) -> float:
        """Return the mean of a token of some rows."""
        return float(self.losses[rows].sum() / self.lengths[rows].sum())


@dataclass(frozen=True)
class _Batch:
    """Prompts with answers, and where logits are looked at.

    Attributes:
        places: of the rows among all.
        call: keyword arguments of the forward.
        wanted: [rows, positions] bool: the next token there is one of an answer's.
        targets: [rows, positions] int64: that token.
    """

    places: list[int]
    call: dict[str, Any]
    wanted: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], places: list[int], device: torch.device) -> _Batch:
        batch = padded([row.ids for row in rows], places, torch.device("cpu"))
        wanted = torch.zeros_like(batch.ids, dtype=torch.bool)
        for at, place in enumerate(places):
            # Nothing comes before the first token of all, so it is not judged.
            wanted[at, max(rows[place].prompt, 1) - 1 : len(rows[place].ids) - 1] = True
        positions = wanted.any(dim=0).nonzero()[:, 0]
        targets = batch.ids.roll(-1, dims=1)[:, positions]
        call = {
            "input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device), "use_cache": False,
            "logits_to_keep": positions.to(device),
        }  # fmt: skip
        return cls(places, call, wanted[:, positions].to(device), targets.to(device))

    def sums(self, module: Any) -> Tensor:
        """Return [3, rows] float64: losses, hits and lengths."""
        logits = module(**self.call).logits[self.wanted].float()
        targets = self.targets[self.wanted]
        found = torch.zeros(3, *self.wanted.shape, dtype=torch.float64, device=logits.device)
        found[0, self.wanted] = functional.cross_entropy(logits, targets, reduction="none").double()
        found[1, self.wanted] = (logits.argmax(dim=-1) == targets).double()
        found[2] = self.wanted
        return found.sum(dim=2)


def _share(right: Sequence[bool]) -> tuple[float, float]:
    """Return the share of items that are right, and the variance of an item."""
    share = sum(right) / len(right)
    return share, share * (1.0 - share)


def _ratio(hits: Tensor, lengths: Tensor) -> tuple[float, float]:
    """Return the share of tokens that are right, and the variance of what an item adds to it.

    Tokens of one answer go together, so items are what is independent; longer ones count more.
    """
    share = float(hits.sum() / lengths.sum())
    added = (hits - share * lengths) / lengths.mean()
    return share, float((added**2).mean())
