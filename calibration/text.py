"""Calibration sequences of a language model: on disk, keyed by content, replayed at will."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import StageError
from ..models.base import OpenModel
from ..models.companions import companion_files
from ..progress import Progress, step
from ..runtime.atomic import atomic_file
from ..runtime.hashes import digest, file_sha256
from .base import Observer
from .content import content_key, is_intact, read_index, recording_folder, write_index
from .inputs import by_content, text_file
from .replay import replay
from .tokens import sequences_of

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKENS_FILE = "tokens.safetensors"


@dataclass(frozen=True)
class TextCalibration:
    """Sequences of token ids on disk. Implements `calibration.base.Calibration`.

    Attributes:
        seed: of the choice of sequences, and of the run.
        key: content hash of everything that they depend on.
        file: holds `input_ids` [samples, length] int64.
        samples: how many sequences there are.
        batch_size: sequences of one forward.
        keeper: keeps a temporary folder alive as long as this object; None where the cache is the user's.
    """

    seed: int
    key: str
    file: Path
    samples: int
    batch_size: int
    keeper: Any = None

    def ids(self) -> Tensor:
        """Return all sequences: [samples, length] int64."""
        return load_file(self.file)["input_ids"]

    def calls(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments of every forward, on the CPU."""
        for rows in self.ids().split(self.batch_size):
            yield {"input_ids": rows, "use_cache": False}

    def count(self) -> int:
        """Return how many forwards there are."""
        return -(-self.samples // self.batch_size)

    def observe(self, model: OpenModel, names: Sequence[str], observer: Observer, progress: Progress) -> None:
        """Run all sequences through `model.module` as it is now; see `calibration.base.Calibration`.

        There are no timesteps: the observer gets zeros. Hooks are removed however this ends.

        Raises:
            StageError: a name is no module, or was never reached.
        """

        def timesteps(call: dict[str, Any]) -> Tensor:
            ids: Tensor = call["input_ids"]
            return torch.zeros(len(ids), device=ids.device)

        replay(model, names, observer, self.calls(), self.count(), timesteps, progress, kind="forward")


@dataclass(frozen=True)
class NoText:
    """Stands for a calibration where no stage looks at text. Implements `calibration.base.Calibration`."""

    seed: int
    key: str = "no text"
    samples: int = 0

    def observe(self, model: OpenModel, names: Sequence[str], observer: Observer, progress: Progress) -> None:
        """Refuse.

        Raises:
            StageError: there is nothing to replay.
        """
        raise StageError("there is no text to calibrate on", hint="add `calibration: {text: FILE.txt}`")


@dataclass(frozen=True)
class TextCalls:
    """Some of the sequences, one a call: what a sensitivity is measured on.

    Attributes:
        calibration: where they are; the folder stays where it is as long as this is used.
        samples: how many; None: all from `start` on.
        start: the first one.
    """

    calibration: TextCalibration
    samples: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or (self.samples is not None and self.samples < 1):
            raise ValueError(f"samples {self.samples} from {self.start} on are none")

    def __getstate__(self) -> dict[str, Any]:
        # The keeper of a temporary folder belongs to this process alone.
        return {**self.__dict__, "calibration": replace(self.calibration, keeper=None)}

    @property
    def seed(self) -> int:
        """Seed of the choice."""
        return self.calibration.seed

    @property
    def key(self) -> str:
        """Content hash of the sequences and of the choice."""
        content = [self.calibration.key, "text", self.samples, self.start]
        return digest(content)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the calls in their order."""
        ids = self.calibration.ids()
        stop = len(ids) if self.samples is None else self.start + self.samples
        for row in ids[self.start : stop]:
            yield {"input_ids": row[None], "use_cache": False}


def record_text(
    model: OpenModel,
    settings: CalibrationSettings,
    *,
    seed: int,
    cache: Path | None,
    progress: Progress,
    fresh: bool = False,
) -> TextCalibration:
    """Choose the calibration sequences, or find those of an earlier run.

    Args:
        model: a language model before any stage.
        settings: `text`, `samples`, `length`, `batch_size`.
        seed: of the run.
        cache: folder that keeps recordings by content hash; None keeps nothing.
        progress: told about it.
        fresh: choose anew also where a choice is kept.

    Raises:
        SourceError: see `tokens.sequences_of`; or the text is too short.
    """
    key = text_key(model, settings, seed)
    folder, keeper = recording_folder(cache, key)
    file, index = folder / TOKENS_FILE, folder / INDEX_FILE
    kept = (read_index(index) or {}).get(TOKENS_FILE)
    if fresh or not is_intact(file, kept):
        with step(progress, "reading the calibration text"):
            ids = sequences_of(model, settings, seed).first(settings.samples)
        with atomic_file(file) as temporary:
            save_file({"input_ids": ids.contiguous()}, temporary)
            written = file_sha256(temporary)
        write_index(index, {TOKENS_FILE: written})
    return TextCalibration(seed, key, file, settings.samples, settings.batch_size, keeper)


def text_key(model: OpenModel, settings: CalibrationSettings, seed: int) -> str:
    """Return the content hash of everything that sequences of a text depend on, 64 hexadecimal digits.

    The text and the tokenizer count by their content, not by their place.

    Raises:
        SourceError: the text cannot be read.
    """
    folder = model.source.folder
    named = settings.model_copy(update={"text": text_file(settings, folder)})
    tokenizer = {path.name: file_sha256(path) for path in companion_files(folder)}
    content = {
        "format": FORMAT_VERSION, "calibration": by_content(named), "seed": seed, "tokenizer": tokenizer,
        "transformers": version("transformers"), "tokenizers": version("tokenizers"),
    }  # fmt: skip
    return content_key(model, content)
