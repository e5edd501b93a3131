"""Two folders of one checkpoint, each run in a fresh process: they must give the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompressError
from ..models.registry import family_for
from ..progress import Progress, step
from ..runtime.first_token import put_first
from ..runtime.kv.adapter import base_folder, is_adapter, open_adapter
from ..runtime.kv.assembled import open_whole
from ..runtime.library_sections import export_format
from ..runtime.load import read_tensor, skeleton
from ..runtime.modules import dtype_of
from ..runtime.validate import StoredCheckpoint
from .decoding import decoding_of
from .fresh_process import Answer, ask_fresh_process, largest_difference, request_of, ways_of

_BATCH, _SEED = 2, 0


@dataclass(frozen=True)
class Comparison:
    """What two fresh processes computed.

    Attributes:
        ways: way of loading -> the largest absolute difference of the outputs, None where there is none.
        failure: what is wrong with the other folder, in one sentence; None where nothing is.
        notes: what could not be compared.
    """

    ways: Mapping[str, float | None]
    failure: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


class _Like(nn.Module):
    """Config and type of a model, for drawing its inputs without its weights."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.reference = nn.Parameter(torch.empty(1, dtype=dtype))


def compare_folders(
    folder: Path, other: Path, *, progress: Progress, device: str = "cpu", threads: int | None = None
) -> Comparison:
    """Load both folders in fresh processes every way that their format has, and compare outputs.

    Args:
        folder: the checkpoint as it was exported.
        other: a copy of it, such as a download.
        progress: gets one step.
        device: of both processes, such as the one of the run; where it is not there, the CPU.
        threads: CPU threads of their arithmetic; None: as many as this process uses.
    """
    try:
        base = _base(folder)
    except CompressError as error:
        return Comparison({}, notes=(f"its hashes match; it was not run: {error.message}",))
    try:
        stored, copy = open_whole(folder, base), open_whole(other, base)
    except CompressError as error:
        return Comparison({}, f"the folder does not open: {error.message}")
    if (stored.class_name, stored.quant_method) != (copy.class_name, copy.quant_method):
        return Comparison({}, f"holds a {copy.class_name} in another format")
    format_ = export_format(stored)
    ours_alone = stored.own_code or base is not None
    ways, _ = ways_of(stored.class_name, stored.dtype, format_, ours_alone=ours_alone)
    if device.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"
    inputs = _inputs(stored)
    cache, drawn = stored.manifest.kv_cache, torch.Generator().manual_seed(_SEED)
    decoding = decoding_of(cache, stored.config, _BATCH, drawn)
    with step(progress, "run in fresh processes", 2) as bar:
        answers = []
        for path in (folder, other):
            request = request_of(
                path, stored.class_name, format_, ways, dtype=stored.dtype, device=device, seed=_SEED,
                threads=threads, decoding=decoding, base=base,
            )  # fmt: skip
            answers.append(ask_fresh_process(request, inputs))
            bar.advance()
    if answers[0].missing:
        names = ", ".join(answers[0].missing)
        return Comparison({}, notes=(f"its hashes match; it was not run: {names} is not installed",))
    return _judge(ways, *answers)


def _base(folder: Path) -> Path | None:
    """Return the folder of the original of an adapter; None of a whole checkpoint.

    Raises:
        SourceError: it is not on this machine any more.
        HubError: it could not be fetched.
    """
    return base_folder(open_adapter(folder)) if is_adapter(folder) else None


def _inputs(stored: StoredCheckpoint) -> dict[str, Any]:
    """Draw the inputs of one forward."""
    dtype = dtype_of(stored.dtype)
    like = _Like(skeleton(stored, dtype).config, dtype)
    generator = torch.Generator().manual_seed(_SEED)
    inputs = family_for(stored.class_name).example_inputs(like, _BATCH, generator)
    names = (f"{name}.first_token_input" for name in stored.manifest.quantization)
    entry = next((stored.tensors[name] for name in names if name in stored.tensors), None)
    return put_first(None if entry is None else read_tensor(entry), inputs)


def _judge(ways: list[str], ours: Answer, theirs: Answer) -> Comparison:
    """Hold the outputs of the copy against those of the folder."""
    found: dict[str, float | None] = {}
    failures = []
    for way in ways:
        expected, output = ours.outputs.get(way), theirs.outputs.get(way)
        found[way] = None if expected is None or output is None else largest_difference(output, expected)
        if expected is None:
            failures.append(f"the local folder does not load the {way!r} way: {ours.errors[way]}")
        elif output is None:
            failures.append(f"does not load the {way!r} way: {theirs.errors[way]}")
        elif not torch.equal(output, expected):
            size = "in shape or by values that are not finite"
            if found[way] is not None:
                size = f"by up to {found[way]:.3g}"
            failures.append(f"loaded the {way!r} way, its outputs differ from the local folder's {size}")
        elif not _same_decoded(ours.decoded.get(way), theirs.decoded.get(way)):
            failures.append(f"loaded the {way!r} way, it decodes otherwise through the compressed cache")
    return Comparison(found, "; ".join(failures) or None)


def _same_decoded(expected: Tensor | None, decoded: Tensor | None) -> bool:
    """Compare what was decoded through a compressed cache; None where none is."""
    if expected is None or decoded is None:
        return expected is decoded
    return torch.equal(decoded, expected)
