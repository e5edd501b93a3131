"""A mixture-of-experts checkpoint with fewer experts, made without opening the model.

What stays is read where it lies and written at once, a tensor at a time; of tensors that hold all experts
only the slices that stay are read. So a checkpoint of any size can be cut on a machine that could not hold
it: memory is that of the largest tensor written. The files are those that opening the model, removing the
experts and exporting it would give, byte for byte.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import ModelSpec
from ..models.checkpoint import Checkpoint, locate
from ..models.companions import companion_files
from ..models.expert_choice import checked_experts, fewer_experts
from ..models.open import spec_of
from ..models.scan import CHUNK_BYTES, count_not_finite, refuse_not_finite
from ..progress import Progress, step
from ..runtime.headers import ITEM_BYTES, TensorEntry
from ..runtime.load import read_tensor
from ..runtime.manifest import FILE_NAME, HistoryEntry, Manifest
from ..runtime.modules import name_of
from ..runtime.moe_names import Part, parts_of
from ..runtime.transformers_config import named_as_stored
from ..runtime.validate import CONFIG_NAME, LANGUAGE_WEIGHTS_NAME
from .compress_format import METADATA, transformers_config
from .formats import ExportInfo, config_text
from .stock import left_out, stock_way
from .writer import DEFAULT_SHARD_BYTES, StoredTensor, dtype_code, write_tensors

if TYPE_CHECKING:
    from ..recipes.schema import ModelRef

FORMAT = "compress"
_OF_A_MIXTURE = re.compile(r"^model\.layers\.(\d+)\.mlp\.(experts|gate|router)\.")


def cut_on_disk(
    ref: ModelRef,
    kept: Mapping[int, Sequence[int]],
    folder: Path,
    *,
    progress: Progress,
    active: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    history: Sequence[HistoryEntry] = (),
) -> ExportInfo:
    """Write a checkpoint without the other experts into `folder`, beside it what belongs to its model.

    Args:
        ref: the recipe's `model`.
        kept: decoder layer -> experts that stay; every layer with experts is named.
        folder: an existing folder; the caller makes it whole or absent (`runtime.atomic`).
        progress: gets one step, in bytes written.
        active: experts per token from now on; None: as many as before.
        max_shard_size: bytes of tensor data per file.
        history: of compress.json.

    Raises:
        PlanError: it is no mixture of experts, or what would be left could not be built; before anything
            but the config and the headers has been read.
        SourceError: missing, damaged, or not finite: naming file and tensor.
        HubError: the Hub or the network refused.
        OSError: the disk is full or refuses.
    """
    checkpoint = locate(ref)
    spec = spec_of(checkpoint, ref)
    chosen = checked_experts(spec.config, kept, active)
    left = spec.cut(spec.surgery, fewer_experts(spec.config, kept, active))
    source = _Source(checkpoint, chosen)
    tensors = list(source.stored(left))
    with step(progress, f"cutting {ref.id}", sum(tensor.bytes for tensor in tensors)):
        paths = write_tensors(
            folder,
            [_watched(tensor, progress) for tensor in tensors],
            max_shard_size=max_shard_size,
            metadata=METADATA,
            name=LANGUAGE_WEIGHTS_NAME,
        )
    size = sum(path.stat().st_size for path in paths)
    texts = {
        CONFIG_NAME: config_text(transformers_config(left.config, left.dtype)),
        FILE_NAME: Manifest(history=tuple(history)).to_json(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        paths.append(folder / name)
    for path in companion_files(checkpoint.folder):
        shutil.copyfile(path, folder / path.name)
        paths.append(folder / path.name)
    files = sorted(path.name for path in paths)
    ways = ["compress.load(path)", stock_way(checkpoint.class_name, name_of(left.dtype))]
    return ExportInfo(FORMAT, files, size, sum(tensor.bytes for tensor in tensors), ways)


@dataclass(frozen=True)
class _Source:
    """A checkpoint, and what of it stays.

    Attributes:
        kept: decoder layer -> experts, ascending.
    """

    checkpoint: Checkpoint
    kept: Mapping[int, tuple[int, ...]]

    def stored(self, left: ModelSpec) -> Iterator[StoredTensor]:
        """Yield what is to be written, under the names of the Hub; read when its turn comes.

        Args:
            left: of the model that is left.
        """
        class_name = self.checkpoint.class_name
        gone = left_out(left.config)
        for name, tensor in left.tensors.items():
            if name in gone:
                continue
            parts = parts_of(class_name, name, tensor.shape)
            for piece, part in parts.items() or [(name, None)]:
                shape = tensor.shape if part is None else part.shape(tensor.shape)
                read = partial(self._read, name, part, tensor.dtype)
                stored = named_as_stored(class_name, piece)
                yield StoredTensor(stored, dtype_code(tensor.dtype), shape, read)

    def _read(self, name: str, part: Part | None, dtype: torch.dtype) -> Tensor:
        """Read a whole tensor of what is left, or one expert's part of it.

        Args:
            name: of the tensor of the module that is left.
            part: of that module.
            dtype: to be written.
        """
        match = _OF_A_MIXTURE.match(name)
        if match is None or int(match[1]) not in self.kept:
            return _read_checked(name, self.checkpoint.headers[name]).to(dtype)
        experts = self.kept[int(match[1])]
        if part is not None:
            return self._part(replace(part, expert=experts[part.expert])).to(dtype)
        entry = self.checkpoint.headers[name]
        made = torch.empty((len(experts), *entry.shape[1:]), dtype=dtype)
        for place, expert in enumerate(experts):
            made[place] = _read_checked(name, _slice_of(entry, expert, None)).to(dtype)
        return made

    def _part(self, part: Part) -> Tensor:
        """Read one expert's part, stored by itself or within the fused tensor."""
        whole = self.checkpoint.headers.get(part.fused)
        if whole is not None:
            return _read_checked(part.fused, _slice_of(whole, part.expert, part.rows(whole.shape)))
        return _read_checked(part.name, self.checkpoint.headers[part.name])


def _slice_of(entry: TensorEntry, expert: int, rows: slice | None) -> TensorEntry:
    """Return where one expert of a tensor [experts, ...] lies, or some of its rows."""
    shape = entry.shape[1:]
    item = ITEM_BYTES[entry.dtype]
    start = entry.start + expert * prod(shape) * item
    if rows is not None:
        start += rows.start * prod(shape[1:]) * item
        shape = (rows.stop - rows.start, *shape[1:])
    return replace(entry, shape=shape, start=start, end=start + prod(shape) * item)


def _read_checked(name: str, entry: TensorEntry) -> Tensor:
    """Read a tensor and refuse NaN and Inf.

    Raises:
        SourceError: naming the file and the tensor.
    """
    try:
        tensor = read_tensor(entry)
    except OSError as error:
        raise SourceError(f"{entry.file}: cannot be read: {error.strerror or error}") from None
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    data = memoryview(array)
    starts = range(0, len(data), CHUNK_BYTES)
    count = sum(count_not_finite(data[start : start + CHUNK_BYTES], entry.dtype) for start in starts)
    refuse_not_finite(name, entry, count)
    return tensor


def _watched(tensor: StoredTensor, progress: Progress) -> StoredTensor:
    """Return the same tensor, which tells how far the writing is when it is read."""
    read = tensor.read
    if read is None:
        raise ValueError(f"{tensor.name} has no data")

    def told() -> Tensor:
        progress.advance(tensor.bytes, tensor.name)
        return read()

    return replace(tensor, read=told)
