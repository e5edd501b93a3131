"""Text as sequences of token ids, for language models: a file, the checkpoint's tokenizer, equal lengths.

A file's documents are tokenized as the tokenizer does it, marks at their beginning included, joined, and
cut into sequences that begin with the same marks. Which of them are calibrated on is drawn by seed from
one end of a permutation; measured is on others, drawn from its other end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from .inputs import text_file
from .seeds import generator_for

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

MAX_TEXT_BYTES = 64 * 2**20
"""A result keeps a copy of its calibration text, so a larger one is refused."""

_JSON_LINES = ".jsonl"
_KEY = "text"


@dataclass(frozen=True)
class Sequences:
    """All sequences of a text.

    Attributes:
        ids: [sequences, length] int64.
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
        return self.ids[self.order[:count]]

    def last(self, count: int, apart_from: int) -> Tensor:
        """Return the sequences to measure on: [count, length] int64.

        Args:
            count: how many.
            apart_from: how many are calibrated on; none of these is returned.

        Raises:
            SourceError: the text is too short for both.
        """
        self._check(count, apart_from)
        return self.ids[self.order[len(self.order) - count :]]

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
    tokenizer = _tokenizer(model.source.folder)
    prefix = _ids(tokenizer, "", file)
    stream: list[int] = []
    for document in _documents(file):
        stream += _ids(tokenizer, document, file)
    payload = settings.length - len(prefix)
    if payload < 1:
        raise SourceError(f"{file}: the tokenizer begins every text with {len(prefix)} tokens of its own")
    vocabulary = int(model.config["vocab_size"])
    if stream and max(stream) >= vocabulary:
        raise SourceError(
            f"{model.source.folder}: the tokenizer gives the id {max(stream)}, the model knows {vocabulary}",
            hint="tokenizer and weights do not belong together",
        )
    count = len(stream) // payload
    cut = torch.tensor(stream[: count * payload], dtype=torch.int64).view(count, payload)
    marks = torch.tensor(prefix, dtype=torch.int64).expand(count, len(prefix))
    order = torch.randperm(count, generator=generator_for(seed, "text"))
    return Sequences(torch.cat([marks, cut], dim=1), order, len(prefix), file)


def _tokenizer(folder: Path) -> Any:
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


def _ids(tokenizer: Any, text: str, file: Path) -> list[int]:
    ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    if not isinstance(ids, list) or not all(isinstance(item, int) and item >= 0 for item in ids):
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
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError(f"{file}: not UTF-8 text", hint="save it as UTF-8") from None
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from None
    if file.suffix != _JSON_LINES:
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _text_of(line, f"{file}:{number}")


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise SourceError(f"{where}: not JSON", hint="a .jsonl file has one JSON object a line") from None
    text = value.get(_KEY) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise SourceError(f"{where}: no text under the key {_KEY!r}")
    return text
