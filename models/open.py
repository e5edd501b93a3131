"""From a checkpoint to what the house works on: `ModelSpec` (shapes) and `OpenModel` (weights)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SourceError, UsageError
from ..progress import Progress, step
from ..runtime.moe_tensors import place_stored
from ..runtime.stored_tensors import TORCH_DTYPES
from .base import Family, ModelSpec, OpenModel, Source, count_parameters, tensor_specs
from .building import empty_module
from .checkpoint import Checkpoint, locate, read_json
from .headers import TensorHeader, by_file
from .inherited import inherited
from .origins import NAME as DEPTH_FILE
from .registry import family_for
from .scan import CHUNK_BYTES, count_not_finite, read_exactly, refuse_not_finite
from .shapes import expected_shapes, stays_in_float32

if TYPE_CHECKING:
    from ..recipes.schema import ModelRef

_WORKING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEFAULT_DTYPE = torch.bfloat16  # of a model known by its config alone: what checkpoints mostly are


def read_spec(ref: ModelRef) -> ModelSpec:
    """Read configs and safetensors headers; no tensor data, and from the Hub no weights at all.

    Where there are no weights the shapes follow from the config, in `ref.dtype` or bfloat16.

    Raises:
        SourceError: missing, damaged, unsafe, or of a kind that is not supported.
        HubError: the Hub or the network refused.
    """
    return spec_of(locate(ref, weights=False), ref)


def open_model(
    ref: ModelRef, *, device: str = "cpu", progress: Progress, checkpoint: Checkpoint | None = None
) -> OpenModel:
    """Read a checkpoint into its stock module, in evaluation mode and without gradients.

    Every weight file is read once, front to back: its bytes are hashed, tested for NaN and Inf and
    placed in memory of their own (aligned, not mapped). Copies that the family shares by
    construction are compared; where they differ they count as tensors of their own.

    Args:
        ref: the recipe's `model`.
        device: torch device of the module.
        progress: gets one step, in bytes.
        checkpoint: what `locate(ref)` or `preflight(ref)` returned, where that has been done.

    Raises:
        SourceError: naming the file or tensor that is missing, damaged or not finite.
        HubError: the Hub or the network refused.
        UsageError: there is no such device.
    """
    target = _device(device)
    checkpoint = checkpoint or locate(ref)
    spec = spec_of(checkpoint, ref)
    module = empty_module(spec.family, spec.config)
    hashes: dict[str, str] = {}
    with step(progress, f"reading {ref.id}", checkpoint.bytes):
        for path, group in by_file(dict(checkpoint.headers)):
            hashes[path.name] = _read_file(path, group, module, spec.dtype, progress)
    _tie(module, spec)
    shared = _equal_copies(module, spec, progress)
    module = module.to(target).eval().requires_grad_(False)
    source = replace(spec.source, hashes=hashes)
    shapes = {name: tensor.shape for name, tensor in spec.tensors.items()}
    spec = spec.evolve(source=source, shared=shared, parameters=count_parameters(spec.config, shapes, shared))
    return _opened(checkpoint, spec, module)


def open_outline(ref: ModelRef) -> OpenModel:
    """Return a checkpoint without its weights: all is known of it but tensor data, which are on `meta`.

    Args:
        ref: a model; from the Hub only configs are fetched.

    Raises:
        SourceError: missing, damaged, unsafe, or of a kind that is not supported.
        HubError: the Hub or the network refused.
    """
    checkpoint = locate(ref, weights=False)
    spec = spec_of(checkpoint, ref)
    return _opened(checkpoint, spec, empty_module(spec.family, spec.config).eval().requires_grad_(False))


def _opened(checkpoint: Checkpoint, spec: ModelSpec, module: nn.Module) -> OpenModel:
    source = spec.source
    return OpenModel(
        module=module, family=spec.family, config=dict(spec.config), source=source, spec=spec,
        scheduler=_scheduler(checkpoint.scheduler), shared=dict(spec.shared),
        attachments={} if source.origins is None else {DEPTH_FILE: source.origins},
    )  # fmt: skip


def spec_of(checkpoint: Checkpoint, ref: ModelRef) -> ModelSpec:
    """Return the spec of a checkpoint that `locate(ref)` has found.

    Raises:
        SourceError: a tensor is stored in a type that is no floating-point number.
    """
    family = family_for(checkpoint.class_name)
    stored = _stored_dtype(checkpoint)  # refuses integers, also where the recipe wants another type
    dtype = getattr(torch, ref.dtype) if ref.dtype else stored
    shapes = expected_shapes(checkpoint.class_name, checkpoint.config)
    tensors = tensor_specs(shapes, dtype)
    shared = _copies(family, checkpoint.config)
    return ModelSpec(
        family=family,
        config=checkpoint.config,
        source=Source(
            checkpoint.id,
            checkpoint.folder,
            checkpoint.revision,
            card=checkpoint.card,
            origins=inherited(checkpoint.folder, checkpoint.config),
        ),
        dtype=dtype,
        tensors=tensors,
        shared=shared,
        parameters=count_parameters(checkpoint.config, shapes, shared),
        parameters_stored=count_parameters(checkpoint.config, shapes, {}),
    )


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating type that holds most of the weights; the others are converted to it."""
    counts: Counter[str] = Counter()
    for name, header in checkpoint.headers.items():
        dtype = TORCH_DTYPES.get(header.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise SourceError(
                f"{header.file}: tensor {name!r} is stored as {header.dtype}, not as a floating-point number",
                hint="start from the checkpoint before it was quantized",
            )
        counts[header.dtype] += prod(header.shape)
    if not counts:
        return _DEFAULT_DTYPE
    dtype = TORCH_DTYPES[counts.most_common(1)[0][0]]
    return dtype if dtype in _WORKING_DTYPES else torch.float32 if dtype == torch.float64 else _DEFAULT_DTYPE


def _copies(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    return {copy: group[0] for group in family.replicas(config) for copy in group[1:]}


def _read_file(
    path: Path,
    group: list[tuple[str, TensorHeader]],
    module: nn.Module,
    dtype: torch.dtype,
    progress: Progress,
) -> str:
    """Read one file into the module and return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        for name, header in group:
            _pass_over(handle, header.start, path, digest)
            tensor = torch.empty(header.shape, dtype=TORCH_DTYPES[header.dtype])
            refuse_not_finite(name, header, _read_tensor(handle, header, tensor, digest))
            place_stored(module, name, tensor.to(torch.float32 if stays_in_float32(name) else dtype))
            progress.advance(header.bytes, name)
        _pass_over(handle, path.stat().st_size, path, digest)
    return digest.hexdigest()


def _pass_over(handle: Any, position: int, path: Path, digest: Any) -> None:
    """Feed the digest up to a position: headers, and tensors that stock classes skip."""
    left = position - handle.tell()
    while left:
        part = memoryview(bytearray(min(left, CHUNK_BYTES)))
        read_exactly(handle, part, path)
        digest.update(part)
        left -= len(part)


def _read_tensor(handle: Any, header: TensorHeader, tensor: Tensor, digest: Any) -> int:
    """Fill `tensor`, feed the digest, and return how many elements are not finite."""
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    count = 0
    for start in range(0, len(view), CHUNK_BYTES):
        part = view[start : start + CHUNK_BYTES]
        read_exactly(handle, part, header.file)
        digest.update(part)
        count += count_not_finite(part, header.dtype)
    return count


def _tie(module: nn.Module, spec: ModelSpec) -> None:
    """Let tied copies be one tensor again: reading gave a place of its own to each.

    Raises:
        SourceError: both are stored and differ, though the config says that they are one.
    """
    for copy, first in spec.shared.items() if spec.family.tied else ():
        stored, one = module.get_parameter(copy), module.get_parameter(first)
        if not stored.is_meta and not torch.equal(stored, one):
            raise SourceError(
                f"{spec.source.folder}: tensor {copy!r} differs from {first!r}, and the config says that they"
                " are one",
                hint="set tie_word_embeddings to false in its config.json if both are meant",
            )
        owner, _, leaf = copy.rpartition(".")
        setattr(module.get_submodule(owner), leaf, one)


def _equal_copies(module: nn.Module, spec: ModelSpec, progress: Progress) -> dict[str, str]:
    """Return those of `spec.shared` whose content really is equal."""
    equal = {
        copy: first
        for copy, first in spec.shared.items()
        if torch.equal(module.get_parameter(copy), module.get_parameter(first))
    }
    different = [name for name in spec.shared if name not in equal]
    if different:
        progress.warn(
            f"{len(different)} tensors differ from the copies they usually are ({different[0]}, ...): "
            "each is stored and counted by itself"
        )
    return equal


def _device(name: str) -> torch.device:
    try:
        device = torch.device(
            "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
        )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"device {name!r}: {reason}", hint="use cpu, or a device that torch sees") from None
    return device


def _scheduler(path: Path | None) -> Any | None:
    """Build the scheduler that a checkpoint came with."""
    if path is None:
        return None
    import diffusers

    config = read_json(path)
    name = config.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    usable = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not usable:
        raise SourceError(f"{path}: {name!r} is not a scheduler of diffusers")
    return kind.from_config(config)
