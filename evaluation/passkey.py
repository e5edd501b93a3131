"""Can a model find a number again that a long text hides?

A text of a few sentences that repeat themselves has one more sentence somewhere, with a number in it. The
text is read in one pass; the question for the number, and the answer, go through the cache token by token
or at once, so what the cache keeps of the text is all that there is to find it in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.seeds import generator_for
from ..calibration.tokens import ids_of, marks_of, tokenizer_of
from ..errors import SourceError
from ..models.base import OpenModel
from ..progress import Progress, track
from ..recipes.decoding import MOST_ANSWER, PasskeySettings
from ..runtime.kv.attach import kv_scheme_of, new_cache
from .evaluator import Evaluation
from .watched import device_of

_BEGINNING = "One number is written down somewhere in this text. Keep it in mind until the end."
_FILLER = (
    "A narrow road follows the river.",
    "The mill on the other side has been quiet for years.",
    "Two boats lie under the bridge, and nobody is in a hurry.",
    "When the wind turns, the bells of the next village can be heard.",
)
_HIDDEN = "The number to keep in mind is {number}. Once more: it is {number}."
_QUESTION = " Which number was to be kept in mind? The number to keep in mind is"
_DIGITS = 5
NOT_FOUND = "the original finds none of the hidden numbers, so nothing can be said of the result"


@dataclass(frozen=True)
class Hidden:
    """One text with its question.

    Attributes:
        text, question: token ids.
        number: what is hidden.
        length: of both in tokens, as asked for; they have as many or a few less.
    """

    text: list[int]
    question: list[int]
    number: str
    length: int


def passkeys(model: OpenModel, settings: PasskeySettings, seed: int) -> list[Hidden]:
    """Return the texts: of every length as many, the number once at every depth.

    Args:
        model: with its tokenizer.
        settings: lengths, and how many texts of each.
        seed: of the run; decides the numbers.

    Raises:
        SourceError: no tokenizer, or a length that has no room for beginning, number and question.
    """
    folder = model.source.folder
    tokenizer = tokenizer_of(folder)
    front, _ = marks_of(tokenizer, folder)

    def ids(text: str) -> list[int]:
        return ids_of(tokenizer, text, folder, marks=False)

    question, found = ids(_QUESTION), []
    for length in settings.lengths:
        room = length - len(front) - len(question)
        for place in range(settings.samples):
            number = _number(seed, length, place)
            text = _filled(ids, number, (place + 0.5) / settings.samples, room)
            if len(text) > room:
                raise SourceError(
                    f"evaluate.decoding.passkey.lengths: {length} tokens have no room for a text that hides"
                    f" a number; {length + len(text) - room} are needed",
                    hint="raise the length",
                )
            found.append(Hidden([*front, *text], question, number, length))
    return found


def _number(seed: int, length: int, place: int) -> str:
    generator = generator_for(seed, "passkey", length, place)
    return str(int(torch.randint(10 ** (_DIGITS - 1), 10**_DIGITS, (1,), generator=generator)))


def _filled(ids: Callable[[str], list[int]], number: str, depth: float, room: int) -> list[int]:
    """Return the longest text of at most `room` tokens; the shortest of all where none has so few."""

    def fits(count: int) -> bool:
        return len(ids(_text(number, depth, count))) <= room

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return ids(_text(number, depth, low))


def _text(number: str, depth: float, count: int) -> str:
    """Return a text of `count` sentences, with the number after this share of them."""
    filler = [_FILLER[place % len(_FILLER)] for place in range(count)]
    before = round(depth * count)
    return " ".join([_BEGINNING, *filler[:before], _HIDDEN.format(number=number), *filler[before:]])


def find(model: OpenModel, hidden: list[Hidden], progress: Progress) -> list[dict[str, Any]]:
    """Ask for every number; return rows with `length`, `samples` and how many were `found`."""
    import transformers

    module, device = model.module, device_of(model)
    tokenizer = tokenizer_of(model.source.folder)
    compressed = kv_scheme_of(module) is not None
    rows: dict[int, dict[str, Any]] = {}
    for item in track(progress, "hidden numbers", hidden, len(hidden)):
        cache = new_cache(module) if compressed else transformers.DynamicCache(config=module.config)
        text, question = (torch.tensor([ids], device=device) for ids in (item.text, item.question))
        row = rows.setdefault(item.length, {"length": item.length, "samples": 0, "found": 0})
        row["samples"] += 1
        row["found"] += _is_found(_answer(module, text, question, cache), tokenizer, item.number)
    return list(rows.values())


@torch.no_grad()
def _answer(module: nn.Module, text: Tensor, question: Tensor, cache: Any) -> Iterator[int]:
    """Yield the tokens that follow, the likeliest each time."""
    module(input_ids=text, past_key_values=cache, use_cache=True)
    given = question
    for _ in range(MOST_ANSWER):
        logits = module(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1]
        given = logits.argmax(dim=-1, keepdim=True)
        yield int(given)


def _is_found(answer: Iterator[int], tokenizer: Any, number: str) -> bool:
    """Tell whether the first number of an answer is the hidden one; no more of it is asked for than that."""
    ids: list[int] = []
    for token in answer:
        ids.append(token)
        said = re.search(r"\d+", tokenizer.decode(ids))
        if said and (len(said[0]) >= len(number) or not number.startswith(said[0])):
            return said[0] == number
    return False


def add_passkey(
    model: OpenModel,
    settings: PasskeySettings,
    before: list[dict[str, Any]],
    seed: int,
    result: Evaluation,
    progress: Progress,
) -> None:
    """Ask the result what the original was asked, and add both to the evaluation.

    Args:
        model: after the stages, with a compressed cache.
        settings: as for the original.
        before: the original's rows.
        seed: of the run.
        result: gets metrics and details; where the original finds nothing, its own share alone.
        progress: told about it.
    """
    original = _share(before)
    result.metrics["passkey_original"] = original
    result.details["decoding"]["passkey"] = {"original": before}
    if original == 0.0:
        result.details["decoding"]["passkey"]["note"] = NOT_FOUND
        progress.note(NOT_FOUND)
        return
    after = find(model, passkeys(model, settings, seed), progress)
    result.metrics["passkey"] = _share(after)
    result.metrics["passkey_drop"] = round(original - _share(after), 6)
    result.details["decoding"]["passkey"]["compressed"] = after


def _share(rows: list[dict[str, Any]]) -> float:
    return round(sum(row["found"] for row in rows) / sum(row["samples"] for row in rows), 6)
