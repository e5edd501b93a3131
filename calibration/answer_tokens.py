"""Items as token ids, in padded batches.

The tokens of a prompt are the same whatever follows it: an answer has those that the whole text has behind
the prompt's own, or, where the tokenizer joins the two at their seam, the tokens of its text alone. What a
tokenizer puts before a text stands before every prompt; what it puts behind a text is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from .answers import Item
from .tokens import ids_of, marks_of, tokenizer_of


@dataclass(frozen=True)
class Row:
    """A prompt with one answer.

    Attributes:
        ids: of both.
        prompt: how many of them are the prompt's, with what the tokenizer puts before it.
    """

    ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Padded:
    """Rows of one forward.

    Attributes:
        places: of the rows among all.
        ids, mask: [rows, tokens] int64; the mask is 0 where nothing is.
    """

    places: list[int]
    ids: Tensor
    mask: Tensor


class Texts:
    """The tokenizer of a model, and what the model takes.

    Args:
        model: a language model.

    Raises:
        SourceError: its folder has no tokenizer.
    """

    def __init__(self, model: OpenModel) -> None:
        self.folder = model.source.folder
        self.tokenizer = tokenizer_of(self.folder)
        self._front, _ = marks_of(self.tokenizer, self.folder)
        self._vocabulary = int(model.config["vocab_size"])
        self.positions = int(model.config.get("max_position_embeddings") or 2**24)

    def rows(self, item: Item, *, every: bool) -> list[Row]:
        """Return an item's rows: of its answer, or of every choice, in their order.

        Raises:
            SourceError: an answer without tokens, or of which nothing comes before the only one; ids that the
                model does not know; or more tokens than it takes.
        """
        prompt = self._ids(item.prompt, item.place)
        texts = item.choices if every else (item.answer,)
        return [self._row(item, prompt, text) for text in texts]

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _row(self, item: Item, prompt: list[int], text: str) -> Row:
        both = self._ids(item.prompt + text, item.place)
        joined = both[: len(prompt)] == prompt and len(both) > len(prompt)
        answer = both[len(prompt) :] if joined else self._ids(text, item.place)
        ids, start = [*self._front, *prompt, *answer], len(self._front) + len(prompt)
        if not answer or len(ids) < 2:
            raise SourceError(
                f"{item.place}: the tokenizer makes {len(answer)} token of {text[:40]!r}, with {start} before"
                " it; a model is judged by a token that follows another",
                hint="give the item a longer prompt or answer",
            )
        if len(ids) > self.positions:
            raise SourceError(
                f"{item.place}: prompt and answer have {len(ids)} tokens; the model takes {self.positions}",
                hint="shorten the item, or leave it out",
            )
        return Row(ids, start)

    def _ids(self, text: str, place: str) -> list[int]:
        ids = ids_of(self.tokenizer, text, place, marks=False)
        largest = max([*self._front, *ids], default=0)
        if largest >= self._vocabulary:
            raise SourceError(
                f"{self.folder}: the tokenizer gives the id {largest}, the model knows {self._vocabulary}",
                hint="tokenizer and weights do not belong together",
            )
        return ids


def parts_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Deal rows out to batches, so that rows of about one length come together.

    Args:
        lengths: of the rows.
        size: of a batch at most.

    Returns:
        The places of the rows of every batch, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(
    rows: Sequence[Sequence[int]], places: list[int], device: torch.device, *, left: bool = False
) -> Padded:
    """Put rows of a batch beside each other.

    Args:
        rows: ids of all rows.
        places: of those of this batch.
        device: where the tensors go.
        left: fill up before the ids, as generation needs it, and not behind them.
    """
    width = max(len(rows[place]) for place in places)
    ids = torch.zeros(len(places), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for at, place in enumerate(places):
        length = len(rows[place])
        span = slice(width - length, width) if left else slice(0, length)
        ids[at, span] = torch.tensor(rows[place], dtype=torch.int64)
        mask[at, span] = 1
    return Padded(places, ids.to(device), mask.to(device))
