"""The formats that a checkpoint can be exported in, behind one function each way."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..errors import PlanError
from ..models.base import Family, ModelSpec, OpenModel
from ..models.registry import task_of
from ..recipes.export import PACKAGES, ROUNDING_FORMATS
from ..recipes.kv_export import KvForm
from ..runtime.kv.adapter import WEIGHTS_NAME as ADAPTER_NAME
from ..runtime.mapped_routing import is_mapped
from ..runtime.validate import CONFIG_NAME
from .attachments import attached
from .form import stored_form
from .padded import pad
from .stock import weights_name
from .writer import DEFAULT_SHARD_BYTES, StoredTensor, file_bytes, write_tensors

FORMATS: Mapping[str, str] = {
    "compress": "compress_format",
    "torchao": "torchao_format",
    "sdnq": "sdnq_format",
    "compressed-tensors": "compressed_tensors_format",
    "bitsandbytes-nf4": "bitsandbytes_nf4",
    "bitsandbytes-int8": "bitsandbytes_int8",
    "dequantized": "dequantized_format",
}
_KV_FORMS: Mapping[str, str] = {"adapter": "kv_adapter", "custom": "kv_custom"}
"""Forms of a compressed cache that the format itself does not write -> their modules."""


OF_LANGUAGE_MODELS = frozenset({"compressed-tensors", *ROUNDING_FORMATS})
"""Formats that are written for language models alone."""


@dataclass(frozen=True)
class Layout:
    """What a format writes.

    Attributes:
        tensors: to be written, or, in a prediction, without data.
        config: config.json; None: there is none.
        metadata: text for the headers of the tensor files.
        loads_with: how the folder is loaded, one Python expression each.
        extra: further files by name, as text.
        notes: what the format could not carry over bit for bit, for the model card.
    """

    tensors: list[StoredTensor]
    config: dict[str, Any] | None
    metadata: Mapping[str, str]
    loads_with: list[str]
    extra: Mapping[str, str]
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """A format module."""

    layout: Callable[[OpenModel], Layout]
    """Describe what is to be written; tensors are made when they are read."""

    predict: Callable[[ModelSpec], tuple[list[StoredTensor], Mapping[str, str]]]
    """Return the tensors without data and the metadata that `layout` will give."""


@dataclass(frozen=True)
class ExportInfo:
    """What was written.

    Attributes:
        files: names below the folder, sorted.
        bytes: of the tensor files and their index; what `predict_bytes` predicts.
        tensor_bytes: of the tensors in them, copies once, which is what gates and shares count: of the
            original they are counted once, too. With an adapter those of the original, which it needs.
        loads_with: how the folder is loaded, one Python expression each.
        notes: what the format could not carry over bit for bit.
    """

    format: str
    files: list[str]
    bytes: int
    tensor_bytes: int
    loads_with: list[str]
    notes: tuple[str, ...] = ()


def _module(name: str, kv_cache: KvForm | None = None) -> Format:
    if name not in FORMATS:
        raise PlanError(f"export.format {name!r} is not one of {', '.join(FORMATS)}")
    module: Any = import_module(f".{_KV_FORMS.get(kv_cache or '', FORMATS[name])}", __package__)
    found: Format = module
    return found


def _check_library(family: Family, format: str) -> None:
    """Refuse formats whose layout is that of one library alone.

    Raises:
        PlanError: naming the format.
    """
    if family.library == "transformers" and format in ("torchao", "sdnq"):
        of_language = task_of(family.name) == "language"
        raise PlanError(
            f"export.format: {format} is written as the loader of diffusers reads it, and a model of the"
            f" family {family.name} is loaded by transformers",
            hint=f"use compress, {'compressed-tensors, ' if of_language else ''}or dequantized",
        )
    if format in OF_LANGUAGE_MODELS and task_of(family.name) != "language":
        raise PlanError(
            f"export.format: {format} is written as transformers loads language models, and a model of the"
            f" family {family.name} is none",
            hint="use compress, or dequantized",
        )
    if format in OF_LANGUAGE_MODELS and family.name != "llm":
        raise PlanError(
            f"export.format: {format} is not written for mixtures of experts: transformers keeps the experts"
            " of a layer in one tensor, which bitsandbytes leaves in floating point, and which it fills from"
            " compressed-tensors only where all experts are rounded alike",
            hint="use compress, or dequantized",
        )
    if format in ROUNDING_FORMATS and find_spec(PACKAGES[format]) is None:
        raise PlanError(
            f"export.format: what {format} comes to is measured with the package {PACKAGES[format]}, which is"
            " not installed",
            hint=f"install {PACKAGES[format]}, or use compress or compressed-tensors",
        )


def _check_cut(model: ModelSpec | OpenModel, format: str) -> None:
    """Refuse to write sizes of their own per layer where the stock class alone builds the model.

    Raises:
        PlanError: naming the format.
    """
    if format != "compress" and model.surgery:
        form = stored_form(model.family, model.config, model.surgery)
        if form.surgery or format != "dequantized":
            padded = format == "dequantized" and model.family.padded_config(model.config, model.surgery)
            raise PlanError(
                f"export.format: {format} is loaded by the stock class alone, which cannot build layers that"
                f" were cut to sizes of their own ({min(form.surgery or model.surgery)})",
                hint="use compress" + (", or padded: true" if padded else ""),
            )


def _check_mapped(model: ModelSpec | OpenModel, format: str) -> None:
    """Refuse what routers that are mapped cannot be written as: another format, or with quantized layers.

    Raises:
        PlanError: saying what to do.
    """
    if not is_mapped(model.config):
        return
    if format != "compress":
        raise PlanError(
            f"export.format: {format} is loaded by stock classes; none has mapped routers (export: custom)",
            hint="use compress; the code of the model is then written beside its weights",
        )
    if model.quantization:
        raise PlanError(
            f"layer {min(model.quantization)} is quantized, and a model with mapped routers (export: custom)"
            " is written in floating point alone",
            hint="leave the quantizer out, or use export: stock-projected",
        )


def write(
    model: OpenModel,
    folder: Path,
    format: str,
    *,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    kv_cache: KvForm | None = None,
) -> ExportInfo:
    """Write weights, config, manifest and scheduler of a model into `folder`.

    Args:
        folder: an existing folder; the caller makes it whole or absent (`runtime.atomic`).
        format: a key of `FORMATS`.
        max_shard_size: bytes of tensor data per file; an adapter is one file.
        kv_cache: form of a compressed cache; None: as in the format itself, inside the checkpoint.

    Raises:
        PlanError: the format cannot express the model's layers.
        OSError: the disk is full or refuses.
    """
    _check_library(model.family, format)
    _check_mapped(model, format)
    _check_cut(model, format)
    layout = _module(format, kv_cache).layout(model)
    name, shard = _weights(model.family, max_shard_size, kv_cache)
    paths = write_tensors(folder, layout.tensors, max_shard_size=shard, metadata=layout.metadata, name=name)
    size = sum(path.stat().st_size for path in paths)
    texts = dict(layout.extra)
    if layout.config is not None:
        texts |= {CONFIG_NAME: config_text(layout.config), **attached(model.attachments)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        paths.append(folder / name)
    if model.scheduler is not None:
        model.scheduler.save_config(folder / "scheduler")
        paths.append(folder / "scheduler" / "scheduler_config.json")
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    tensors = _bytes_once(layout.tensors, model.shared)
    if kv_cache == "adapter":
        tensors = model.size().bytes
    return ExportInfo(format, files, size, tensors, list(layout.loads_with), layout.notes)


def _bytes_once(tensors: Iterable[StoredTensor], shared: Mapping[str, str]) -> int:
    """Return the bytes of all tensors but those that are copies of others, which stock loading wants."""
    return sum(tensor.bytes for tensor in tensors if tensor.name not in shared)


def as_shipped(model: OpenModel, format: str, *, padded: bool = False) -> OpenModel:
    """Return the model that computes what the exported folder computes, to be measured or compared.

    `compress` stores the very layers that run here, so the model itself comes back. The layers of
    `torchao`, `compressed-tensors` and `dequantized` are replaced, and those that the formats of
    `bitsandbytes` round; every other tensor is shared with `model`, so change
    neither afterwards. `quantization` then says what the file holds. For `sdnq` the model itself
    comes back too: the integers are equal, but the arithmetic of the package sdnq may differ.
    A padded model is one of other sizes, and it is what has to be written, too.

    Raises:
        PlanError: the format cannot express the model's layers.
    """
    if padded:
        return pad(model)
    found: Any = _module(format)
    convert: Callable[[OpenModel], OpenModel] | None = getattr(found, "as_shipped", None)
    rounds = bool(model.quantization) or format in ROUNDING_FORMATS
    return convert(model) if convert is not None and rounds else model


def predict_bytes(
    spec: ModelSpec,
    format: str,
    *,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    kv_cache: KvForm | None = None,
) -> int:
    """Return the bytes of the tensor files, headers and index included, that `write` will write.

    Raises:
        PlanError: the format cannot express the planned layers.
    """
    tensors, metadata = _predict(spec, format, kv_cache)
    name, shard = _weights(spec.family, max_shard_size, kv_cache)
    return file_bytes(tensors, max_shard_size=shard, metadata=metadata, name=name)


def predict_tensor_bytes(spec: ModelSpec, format: str, *, kv_cache: KvForm | None = None) -> int:
    """Return what `ExportInfo.tensor_bytes` will be: the bytes of the tensors alone, copies once.

    Raises:
        PlanError: as `predict_bytes`.
    """
    tensors, _ = _predict(spec, format, kv_cache)
    return spec.size().bytes if kv_cache == "adapter" else _bytes_once(tensors, spec.shared)


def _predict(
    spec: ModelSpec, format: str, kv_cache: KvForm | None
) -> tuple[list[StoredTensor], Mapping[str, str]]:
    _check_library(spec.family, format)
    _check_mapped(spec, format)
    _check_cut(spec, format)
    return _module(format, kv_cache).predict(spec)


def _weights(family: Family, max_shard_size: int, kv_cache: KvForm | None) -> tuple[str, int]:
    """Return the name of the weights' file, and the largest that one may be."""
    if kv_cache == "adapter":
        return ADAPTER_NAME, sys.maxsize
    return weights_name(family), max_shard_size


def config_text(config: Mapping[str, Any]) -> str:
    """Return config.json's text: sorted keys, so that equal configs are equal bytes."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
