"""What is in a checkpoint folder: layers, bits, bytes, provenance. Reads headers only, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..models.origins import NAME as DEPTH_FILE
from ..models.origins import blocks_of_first
from ..models.shapes import expected_shapes
from ..runtime.fetch import fetch
from ..runtime.kv.adapter import is_adapter
from ..runtime.kv.stored import is_factor
from ..runtime.library_sections import is_known, library_schemes
from ..runtime.manifest import ActivationScheme, QuantizedModule
from ..runtime.transformers_config import complete_transformers_config
from ..runtime.validate import (
    CONFIG_NAME,
    ITEM_BYTES,
    QUANT_METHOD,
    StoredCheckpoint,
    TensorEntry,
    expected_tensors,
    open_folder,
)
from .adapter_stored import inspect_adapter
from .attachments import read_attachments
from .cache_stored import cache_stored
from .experts_stored import experts_stored

_TORCHAO_PART = "._weight_"


def inspect(path: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint in any format that `compress` writes, or a dense one.

    Returns:
        Of an adapter of a compressed cache what `inspect_adapter` says; of all else
        a JSON value: `path, class, format, dtype, files, bytes, tensor_bytes, parameters,
        parameters_stored, bits_per_weight, quantized_bits, shared, cut, depth, experts, kv_cache, layers,
        history`. Bytes are on disk; `bits_per_weight` is 8 * tensor_bytes / parameters; `quantized_bits`
        is the average over the weights of the quantized layers, scales not counted, None without any;
        `cut` is how many modules have other sizes than the stock class builds from the config; `depth`,
        where blocks were removed, list of blocks -> `of` (the original's number) and `kept` (their
        places there); `experts` as `experts_stored` has it, None of other models; `kv_cache` as
        `cache_stored` has it, None of models with a plain cache, and its factors are neither layers nor
        parameters of the model. A layer:
        `name, shape, bits, bytes` (all its tensors), `dtype` (of the stored weight),
        `activation_bits` (None: floating point), `activation_scope` (what shares a scale: `token`,
        `sample`, or `tensor`, which is static), `first_token_stored` (its output, in floating point),
        `group_size, decided_by, method` and `shared_with`.

    Raises:
        SourceError: the folder is missing, damaged or contradicts itself.
        HubError: the Hub or the network refused.
    """
    folder = fetch(path, revision=revision, subfolder=subfolder)
    if is_adapter(folder):
        return {"path": str(path), **inspect_adapter(folder)}
    stored = open_folder(folder)
    files = sorted({entry.file for entry in stored.tensors.values()})
    layers, once, copies = _count(stored)
    tensor_bytes = sum(entry.bytes for entry in stored.tensors.values())
    return {
        "path": str(path),
        "class": stored.class_name,
        "format": stored.quant_method or "dense",
        "dtype": stored.dtype,
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "tensor_bytes": tensor_bytes,
        "parameters": once,
        "parameters_stored": once + copies,
        "bits_per_weight": round(8 * tensor_bytes / once, 4) if once else None,
        "quantized_bits": _quantized_bits(layers),
        "shared": len(stored.manifest.shared),
        "cut": len(stored.manifest.surgery),
        "depth": _depth(stored),
        "experts": experts_stored(stored),
        "kv_cache": cache_stored(stored),
        "layers": layers,
        "history": [entry.model_dump(mode="json") for entry in stored.manifest.history],
    }


def _depth(stored: StoredCheckpoint) -> dict[str, dict[str, Any]]:
    """Return list of blocks -> how many the original has and which of them are left; empty: all.

    Raises:
        SourceError: the file is damaged, or the model has other blocks than it says.
    """
    text, path = read_attachments(stored.folder).get(DEPTH_FILE), stored.folder / DEPTH_FILE
    if text is None:
        return {}
    try:
        found = blocks_of_first(text)
    except SourceError as error:
        raise SourceError(f"{path}: {error.message}", hint=error.hint) from None
    names = [*stored.tensors, *stored.manifest.shared]
    for name, row in found.items():
        starts = f"{name}."
        places = {rest.removeprefix(starts).partition(".")[0] for rest in names if rest.startswith(starts)}
        if places != {str(place) for place in range(len(row["kept"]))}:
            # The name is a stranger's: it may hold anything, and goes to a terminal.
            raise SourceError(
                f"{path}: says that {len(row['kept'])} blocks of {name!r} are left, and the model has"
                f" {len(places) or 'no such list'}",
                hint="the file is of another model; remove it where that is known",
            )
    return found


def foreign_schemes(folder: Path) -> dict[str, QuantizedModule]:
    """Describe the layers that another library loads as quantized ones, as `as_shipped` does.

    What the package sdnq stores is not described: its layers have tensors of their own.

    Raises:
        SourceError: the folder is missing, damaged or contradicts itself.
    """
    stored = open_folder(folder)
    if is_known(stored):
        return _library_schemes(stored)
    if stored.quant_method != "torchao":
        return {}
    layers, _, _ = _count(stored)
    return {
        row["name"]: QuantizedModule(
            shape=tuple(row["shape"]),
            bits=8,
            symmetric=True,
            activation=ActivationScheme(bits=8) if row["activation_bits"] else None,
            bias=f"{row['name']}.bias" in stored.tensors,
            method="torchao",
            decided_by="as stored",
        )
        for row in layers
        if row["method"] == "torchao"
    }


def _library_schemes(stored: StoredCheckpoint) -> dict[str, QuantizedModule]:
    where = str(stored.folder / CONFIG_NAME)
    config = complete_transformers_config(stored.class_name, stored.config, where)
    return library_schemes(stored, expected_shapes(stored.class_name, config))


def _count_library(stored: StoredCheckpoint) -> tuple[list[dict[str, Any]], int, int]:
    """Do the same for a format of which `runtime.library_load` knows all tensors."""
    schemes, owned = _library_schemes(stored), Counter[str]()
    rows, parameters = [], sum(prod(scheme.shape) for scheme in schemes.values())
    for name, entry in stored.tensors.items():
        if is_factor(name):  # of a compressed cache
            continue
        layer, suffix = name.rpartition(".")[::2]
        if ".weight." in name:  # of bitsandbytes, which has names such as M.weight.absmax
            layer = name.partition(".weight.")[0]
        owned[layer] += entry.bytes
        if layer not in schemes or suffix == "bias":
            parameters += prod(entry.shape)
        if layer not in schemes and suffix == "weight" and len(entry.shape) >= 2:
            rows.append(_row(layer, entry))
    for name, scheme in schemes.items():
        parts = (f"{name}.{part}" for part in ("weight_packed", "weight"))
        weight = next(stored.tensors[part] for part in parts if part in stored.tensors)
        activation = scheme.activation
        rows.append(
            _row(
                name,
                weight,
                shape=list(scheme.shape),
                bits=scheme.bits,
                activation_bits=activation and activation.bits,
                activation_scope=activation and activation.scope,
                group_size=scheme.group_size,
                method=scheme.method,
            )  # fmt: skip
        )
    rows = [row | {"bytes": owned[row["name"]]} for row in rows]
    return sorted(rows, key=lambda row: _natural(row["name"])), parameters, 0


def _count(stored: StoredCheckpoint) -> tuple[list[dict[str, Any]], int, int]:
    """Return the rows of the layers, and the parameters stored once and as copies."""
    if is_known(stored):
        return _count_library(stored)
    try:
        return (
            _layers(stored),
            sum(_parameters(stored, stored.tensors)),
            sum(_parameters(stored, stored.manifest.shared)),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        # Our own sections were checked when the folder was opened; those of other libraries are not.
        if stored.quant_method in (None, QUANT_METHOD):
            raise
        raise SourceError(
            f"{stored.folder}: config and tensors are not what {stored.quant_method} writes: {error!r}",
            hint="the folder was changed by hand or damaged; fetch it again",
        ) from error


def _layers(stored: StoredCheckpoint) -> list[dict[str, Any]]:
    rows = [_quantized_row(stored, name, scheme) for name, scheme in stored.manifest.quantization.items()]
    quantized = set(stored.manifest.quantization)
    owned = Counter[str]()  # summed once: a mixture of experts has tens of thousands of layers
    for name, entry in stored.tensors.items():
        owned[name.rpartition(".")[0]] += entry.bytes
    for name, entry in stored.tensors.items():
        layer, suffix = name.rpartition(".")[::2]
        if layer in quantized or is_factor(name):
            continue
        if suffix == "weight" and (len(entry.shape) >= 2 or f"{layer}.scale" in stored.tensors):
            rows.append(_plain_row(stored, layer, entry) | {"bytes": owned[layer]})
        elif name.endswith(f"{_TORCHAO_PART}qdata"):
            layer = name.removesuffix(f"{_TORCHAO_PART}qdata")
            rows.append(_torchao_row(stored, layer, entry) | {"bytes": owned[layer]})
    return sorted(rows, key=lambda row: _natural(row["name"]))


def _quantized_row(stored: StoredCheckpoint, name: str, scheme: QuantizedModule) -> dict[str, Any]:
    shared = stored.manifest.shared
    names = [f"{name}.{suffix}" for suffix in expected_tensors(scheme, stored.dtype)]
    weight = stored.tensors[shared.get(names[0], names[0])]
    canonical = shared.get(names[0])
    return {
        "name": name,
        "shape": list(scheme.weight_shape),
        "bits": scheme.bits,
        "bytes": sum(stored.tensors[tensor].bytes for tensor in names if tensor not in shared),
        "dtype": weight.dtype,
        "activation_bits": scheme.activation.bits if scheme.activation else None,
        "activation_scope": scheme.activation.scope if scheme.activation else None,
        "first_token_stored": scheme.first_token is not None,
        "group_size": scheme.group_size,
        "decided_by": scheme.decided_by,
        "method": scheme.method,
        "shared_with": canonical.rpartition(".")[0] if canonical else None,
    }


def _row(name: str, weight: TensorEntry, **values: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "shape": list(weight.shape),
        "bits": 8 * ITEM_BYTES[weight.dtype],
        "bytes": weight.bytes,
        "dtype": weight.dtype,
        "activation_bits": None,
        "activation_scope": None,
        "first_token_stored": False,
        "group_size": None,
        "decided_by": None,
        "method": None,
        "shared_with": None,
    }
    return {**row, **values}


def _plain_row(stored: StoredCheckpoint, name: str, weight: TensorEntry) -> dict[str, Any]:
    if stored.quant_method == "sdnq" and f"{name}.scale" in stored.tensors:
        section = stored.config["quantization_config"]
        kinds = section.get("modules_dtype_dict") or {}
        kind = next(
            (k for k, names in kinds.items() if f"{name}.weight" in names), section.get("weights_dtype")
        )
        bits = int("".join(filter(str.isdigit, str(kind))) or 8)
        count = weight.bytes * 8 // bits
        rows = stored.tensors[f"{name}.scale"]
        return _row(name, weight, bits=bits, shape=_sdnq_shape(weight, rows, count), method="sdnq")
    return _row(name, weight)


def _sdnq_shape(weight: TensorEntry, scale: TensorEntry, count: int) -> list[int]:
    if len(scale.shape) == 2 and scale.shape[0] == 1:
        return [weight.shape[1], weight.shape[0]]
    return [scale.shape[0], count // scale.shape[0]]


def _torchao_row(stored: StoredCheckpoint, name: str, weight: TensorEntry) -> dict[str, Any]:
    text = stored.metadata.get(f"{name}.weight", "")
    dynamic = '"act_quant_kwargs": {' in text
    bits, scope = (8, "token") if dynamic else (None, None)
    return _row(name, weight, activation_bits=bits, activation_scope=scope, method="torchao")


def _parameters(stored: StoredCheckpoint, names: Iterable[str]) -> Iterable[int]:
    """Yield what each tensor counts for in the dense model: grids, signs and scales count nothing."""
    schemes: Mapping[str, QuantizedModule] = stored.manifest.quantization
    foreign = stored.quant_method in ("torchao", "sdnq")
    rows = {row["name"]: row["shape"] for row in _layers(stored)} if foreign else {}
    for name in names:
        layer, suffix = name.rpartition(".")[::2]
        if is_factor(name):
            continue
        if layer in schemes:
            if suffix == "qweight":
                yield prod(schemes[layer].shape)
            elif suffix == "bias":
                yield schemes[layer].shape[0]
            continue
        entry = stored.tensors[stored.manifest.shared.get(name, name)]
        if foreign and (_TORCHAO_PART in name or f"{layer}.scale" in stored.tensors) and suffix != "bias":
            if suffix in ("weight", "_weight_qdata"):
                yield prod(rows[layer])
            continue
        yield prod(entry.shape)


def _quantized_bits(layers: Iterable[Mapping[str, Any]]) -> float | None:
    chosen = [layer for layer in layers if layer["method"] is not None and layer["shared_with"] is None]
    weights = sum(prod(layer["shape"]) for layer in chosen)
    if not weights:
        return None
    average: float = sum(layer["bits"] * prod(layer["shape"]) for layer in chosen) / weights
    return round(average, 4)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts block 2 before block 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
