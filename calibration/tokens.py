"""Text as sequences of token ids, for language models: a file, the checkpoint's tokenizer, equal lengths.

A file's documents are tokenized as the tokenizer does it, marks at their beginning included, joined, and
cut into sequences that begin with the same marks. Which of them are calibrated on is drawn by seed from
one end of a permutation; measured is on others, drawn from its other end.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from .inputs import text_file
from .pieces import check_whole, pieces_of
from .seeds import generator_for

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

MAX_TEXT_BYTES = 64 * 2**20
"""A result keeps a copy of its calibration text, so a larger one is refused."""

_PIECE = 2**18
"""Characters that a tokenizer gets at a time: it needs more than a hundred bytes for each."""

_JSON_LINES = ".jsonl"
_KEY = "text"
_SAMPLE = "a"


@dataclass(frozen=True)
class Sequences:
    """All sequences of a text.

    Attributes:
        ids: [sequences, length] int32.
        order: a permutation of them.
        prefix: leading ids of every sequence that the tokenizer puts there.
        file: where the text came from.
    """

    ids: Tensor
    order: Tensor
    prefix: int
    file: Path

    def first(self, count: int) -> Tensor:
        """Return the sequences to calibrate on: [count, length] int64.

        Raises:
            SourceError: the text is too short.
        """
        self._check(count, 0)
        return self.ids[self.order[:count]].long()

    def last(self, count: int, apart_from: int) -> Tensor:
        """Return the sequences to measure on: [count, length] int64.

        Args:
            count: how many.
            apart_from: how many are calibrated on; none of these is returned.

        Raises:
            SourceError: the text is too short for both.
        """
        self._check(count, apart_from)
        return self.ids[self.order[len(self.order) - count :]].long()

    def _check(self, count: int, others: int) -> None:
        if count + others > len(self.ids):
            wanted = f"{count} sequences" + (f" besides the {others} of calibration" if others else "")
            raise SourceError(
                f"{self.file}: the text makes {len(self.ids)} sequences of {self.ids.shape[1]} tokens;"
                f" {wanted} are asked for",
                hint="give a longer text, or lower samples or calibration.length",
            )


def sequences_of(model: OpenModel, settings: CalibrationSettings, seed: int) -> Sequences:
    """Tokenize the calibration text of a language model.

    Args:
        model: whose checkpoint folder holds the tokenizer and, perhaps, a text of its own.
        settings: `text` and `length`.
        seed: of the run; decides the order.

    Raises:
        SourceError: no text or tokenizer, or one that cannot be read or does not fit the model.
    """
    file = text_file(settings, model.source.folder)
    if file is None:
        raise SourceError(
            f"{model.source.id}: a language model is calibrated on a text, and none is named",
            hint="add `text: FILE.txt` (or .jsonl) to calibration",
        )
    tokenizer = tokenizer_of(model.source.folder)
    front, back = marks_of(tokenizer, file)
    payload = settings.length - len(front)
    if payload < 1:
        raise SourceError(f"{file}: the tokenizer begins every text with {len(front)} tokens of its own")
    stream = array("i")
    for document in _documents(file):
        stream.extend(_encoded(tokenizer, document, front, back, file))
    tokens = torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0, dtype=torch.int32)
    vocabulary = int(model.config["vocab_size"])
    largest = int(tokens.max()) if stream else 0
    if largest >= vocabulary:
        raise SourceError(
            f"{model.source.folder}: the tokenizer gives the id {largest}, the model knows {vocabulary}",
            hint="tokenizer and weights do not belong together",
        )
    count = len(tokens) // payload
    cut = tokens[: count * payload].view(count, payload)
    marks = torch.tensor(front, dtype=torch.int32).expand(count, len(front))
    order = torch.randperm(count, generator=generator_for(seed, "text"))
    return Sequences(torch.cat([marks, cut], dim=1), order, len(front), file)


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        SourceError: it has none, or one that cannot be read.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # Whatever the libraries below raise for a damaged file: they have no common type for it.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{folder}: the tokenizer cannot be read: {reason}",
            hint="a language model's folder needs its tokenizer files, such as tokenizer.json",
        ) from error


def marks_of(tokenizer: Any, file: Path | str) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind every text."""
    marked, empty = ids_of(tokenizer, _SAMPLE, file), ids_of(tokenizer, "", file)
    pairs = zip(marked, empty, strict=False)
    front = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(marked), len(empty)))
    text = len(ids_of(tokenizer, _SAMPLE, file, marks=False))
    return marked[:front], marked[front + text :]


def _encoded(tokenizer: Any, text: str, front: list[int], back: list[int], file: Path) -> Iterator[int]:
    """Tokenize a document; a long one in pieces, between which a word may be cut otherwise than within."""
    if len(text) <= _PIECE:
        yield from ids_of(tokenizer, text, file)
        return
    yield from front
    for piece in pieces_of(text, _PIECE):
        yield from ids_of(tokenizer, piece, file, marks=False)
    yield from back


def ids_of(tokenizer: Any, text: str, file: Path | str, *, marks: bool = True) -> list[int]:
    """Return the ids of a text.

    Args:
        tokenizer: of the checkpoint.
        text: of any length that the tokenizer takes.
        file: where it comes from, for the message.
        marks: put before and behind it what the tokenizer puts there.

    Raises:
        SourceError: the tokenizer gives something else.
    """
    ids = tokenizer(text, add_special_tokens=marks, verbose=False)["input_ids"]
    if not isinstance(ids, list) or not all(isinstance(item, int) and 0 <= item < 2**31 for item in ids):
        raise SourceError(f"{file}: the tokenizer gives no ids for it")
    return ids


def _documents(file: Path) -> Iterator[str]:
    try:
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise SourceError(
                f"{file}: {size} bytes; a calibration text has at most {MAX_TEXT_BYTES}",
                hint="take a part of it: a result keeps a copy",
            )
        if file.suffix.lower() == _JSON_LINES:
            yield from _lines(file)
        else:
            yield file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError(f"{file}: not UTF-8 text", hint="save it as UTF-8") from None
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from None


def _lines(file: Path) -> Iterator[str]:
    """Yield the text of every line. Only a newline ends one: JSON may hold what else breaks lines."""
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _text_of(line, f"{file}:{number}")


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise SourceError(f"{where}: not JSON", hint="a .jsonl file has one JSON object a line") from None
    text = value.get(_KEY) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise SourceError(f"{where}: no text under the key {_KEY!r}")
    return check_whole(text, f"{where}: {_KEY}")
