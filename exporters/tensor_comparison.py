"""Whether a checkpoint with fewer experts holds the very tensors of the one it was cut from. Torch-free.

Config, names, shapes, types and every byte are compared, in a fresh process that knows the two folders and
which experts were to stay, and nothing of how the cutting went. A few megabytes are in memory at a time.

    python -P -m compress.exporters.tensor_comparison < request.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CompressError, SourceError
from ..models.checkpoint import Checkpoint, locate
from ..models.expert_choice import fewer_experts
from ..models.scan import read_exactly
from ..models.shapes import stays_in_float32
from ..recipes.schema import ModelRef
from ..runtime.headers import ITEM_BYTES, TensorEntry
from ..runtime.language_config import without_code
from ..runtime.moe_names import part_of
from ..runtime.transformers_config import implied_copies

_CHUNK_ITEMS = 2**20
_OF_A_MIXTURE = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:experts|gate|router)\..+")
_OF_STORAGE = frozenset({"dtype", "torch_dtype", "architectures", "_name_or_path", "transformers_version"})
_MOST_NAMED = 3

Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        tensors: that were compared.
        bytes: of them, as written.
        differences: what is otherwise than it should be, in a few words each; empty: nothing is.
    """

    tensors: int
    bytes: int
    differences: tuple[str, ...]


def compare(
    source: Path,
    written: Path,
    kept: Mapping[int, Sequence[int]],
    *,
    active: int | None,
    dtype: str,
    advance: Advance = lambda size, name: None,
) -> Comparison:
    """Hold a written folder against its source, tensor by tensor.

    Args:
        source: folder of the component that was cut.
        written: folder of what is left.
        kept: decoder layer -> experts that were to stay.
        active: experts per token that were wanted; None: as many as before.
        dtype: safetensors code that the weights were to be written in, such as "BF16".
        advance: called with the bytes and the name of each tensor that was compared.

    Raises:
        SourceError: one of the folders is damaged, or names and shapes of its tensors do not follow from
            its config.
    """
    before, after = locate(ModelRef(id=str(source))), locate(ModelRef(id=str(written)))
    wrong = _other_keys(fewer_experts(before.config, kept, active), after.config)
    if wrong:
        return Comparison(0, 0, tuple(f"config.json says otherwise of {key}" for key in wrong[:_MOST_NAMED]))
    origin = _Origin(before, {layer: tuple(sorted(experts)) for layer, experts in kept.items()})
    differences: list[str] = []
    for name, entry in after.headers.items():
        code = "F32" if stays_in_float32(name) else dtype
        if entry.dtype != code:
            differences.append(f"tensor {name!r} is stored as {entry.dtype}, not as {code}")
        elif not same_values(entry, origin.of(name)):
            differences.append(f"tensor {name!r} differs from the source's")
        advance(entry.bytes, name)
    return Comparison(len(after.headers), after.bytes, tuple(differences))


def check_copies(checkpoint: Checkpoint) -> None:
    """Refuse tensors that the config calls one and that are stored twice, differently.

    Raises:
        SourceError: naming them.
    """
    for copy, first in implied_copies(checkpoint.config).items():
        stored = checkpoint.headers.get(copy)
        if stored is not None and not same_values(stored, [checkpoint.headers[first]]):
            raise SourceError(
                f"{checkpoint.folder}: tensor {copy!r} differs from {first!r}, and the config says that they"
                " are one",
                hint="set tie_word_embeddings to false in its config.json if both are meant",
            )


@dataclass(frozen=True)
class _Origin:
    """Where in the source the tensors of what is left lie.

    Attributes:
        kept: decoder layer -> experts, ascending.
    """

    source: Checkpoint
    kept: Mapping[int, tuple[int, ...]]

    def of(self, name: str) -> list[TensorEntry]:
        """Return the places, in order, whose values together are those of the tensor `name`."""
        match = _OF_A_MIXTURE.fullmatch(name)
        experts = None if match is None else self.kept.get(int(match[1]))
        headers = self.source.headers
        if experts is None:
            return [headers[name]]
        part = part_of(name)
        if part is None:
            return [_slice(headers[name], expert) for expert in experts]
        moved = replace(part, expert=experts[part.expert])
        if moved.name in headers:
            return [headers[moved.name]]
        whole = headers[part.fused]
        return [_slice(whole, moved.expert, moved.rows(whole.shape))]


def _slice(entry: TensorEntry, index: int, rows: slice | None = None) -> TensorEntry:
    """Return where one index of the first axis lies, or some rows of that, as a flat tensor."""
    size = entry.bytes // entry.shape[0]
    start, end = entry.start + index * size, entry.start + (index + 1) * size
    if rows is not None:
        row = size // entry.shape[1]
        start, end = start + rows.start * row, start + rows.stop * row
    shape = ((end - start) // ITEM_BYTES[entry.dtype],)
    return replace(entry, shape=shape, start=start, end=end)


def _other_keys(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the keys of a config that do not say what they should; how weights are stored is no matter."""
    wanted = without_code(expected)
    keys = (wanted.keys() | found.keys()) - _OF_STORAGE
    return sorted(key for key in keys if wanted.get(key) != found.get(key))


def same_values(written: TensorEntry, origins: Sequence[TensorEntry]) -> bool:
    """Tell whether a stored tensor has the bits of others, one after the other, in its own type."""
    if prod(written.shape) != sum(prod(origin.shape) for origin in origins):
        return False
    with written.file.open("rb", buffering=0) as made:
        made.seek(written.start)
        for origin in origins:
            for data in _chunks(origin):
                expected = _converted(data, origin.dtype, written.dtype)
                found = bytearray(len(expected))
                read_exactly(made, memoryview(found), written.file)
                if found != expected:
                    return False
    return True


def _chunks(entry: TensorEntry) -> Iterator[bytearray]:
    with entry.file.open("rb", buffering=0) as handle:
        handle.seek(entry.start)
        left = entry.bytes
        while left:
            data = bytearray(min(left, _CHUNK_ITEMS * ITEM_BYTES[entry.dtype]))
            read_exactly(handle, memoryview(data), entry.file)
            left -= len(data)
            yield data


def _converted(data: bytearray, dtype: str, target: str) -> bytearray:
    """Return elements in another type, rounded as torch rounds."""
    if dtype == target:
        return data
    import torch

    from ..runtime.stored_tensors import TORCH_DTYPES

    values = torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).to(TORCH_DTYPES[target])
    array: Any = values.view(torch.uint8).numpy()
    return bytearray(memoryview(array))


def main() -> None:
    """Answer the request on stdin: a JSON line per tensor, and one with the comparison at the end."""
    request = json.load(sys.stdin)

    def tell(**line: Any) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    kept = {int(layer): experts for layer, experts in request["kept"].items()}
    try:
        found = compare(
            Path(request["source"]), Path(request["written"]), kept, active=request["active"],
            dtype=request["dtype"], advance=lambda size, name: tell(advance=size, name=name),
        )  # fmt: skip
    except CompressError as error:
        tell(tensors=0, bytes=0, differences=[error.message])
        return
    tell(tensors=found.tensors, bytes=found.bytes, differences=list(found.differences))


if __name__ == "__main__":
    main()
