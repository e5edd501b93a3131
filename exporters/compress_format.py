"""The default format: weights packed to their real bits, equal copies stored once.

A model without quantized layers, whose sizes a stock config can say, is written as a plain stock folder
(copies included), which loads without this package; the manifest then holds history alone. The factors of a
compressed cache lie in it as further tensors, which stock code names as unexpected and leaves alone: it
computes with a plain cache, and by the model's own weights. One whose routers
are mapped is written likewise, under the module's names, with code of its own beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.base import ModelSpec, OpenModel
from ..runtime.kv.scheme import factor_tensors
from ..runtime.kv.stored import is_factor
from ..runtime.language_config import without_code
from ..runtime.manifest import FILE_NAME, Manifest, QuantizedModule
from ..runtime.mapped_routing import is_mapped
from ..runtime.modules import name_of, quantized_layers
from ..runtime.stopping import stopped, without_stop
from ..runtime.validate import expected_tensors, guard_name, quantization_section
from .bits_file import bits_files
from .custom_code import code_files, config_keys
from .form import stored_form
from .formats import Layout
from .stock import left_out, named_by_library, registered_way, stock_way, trusting_way
from .writer import StoredTensor, dtype_code

METADATA: Mapping[str, str] = {"format": "pt"}


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`."""
    state = model.module.state_dict()
    quantization = dict(model.quantization)
    if {name: layer.scheme for name, layer in quantized_layers(model.module).items()} != quantization:
        raise ValueError("the model's quantized layers are not the ones that its record lists")
    check_cache(model)
    state = {name: tensor for name, tensor in state.items() if name not in left_out(model.config)}
    shared = equal_copies(state, model.shared, quantization) if quantization else {}
    form = stored_form(model.family, model.config, model.surgery)
    manifest = Manifest(
        surgery=form.surgery, quantization=quantization, shared=shared, kv_cache=model.kv_cache,
        history=tuple(model.history),
    )  # fmt: skip
    config, dtype = stock_config(replace(model, config=form.config)), name_of(model.spec.dtype)
    name = str(model.config.get("_class_name") or type(model.module).__name__)
    if quantization or form.surgery:
        config["quantization_config"] = quantization_section(manifest, dtype)
        if model.family.library == "transformers":
            config = stopped(config)
        loads_with = ["compress.load(path)", registered_way(name)]
    else:
        way = trusting_way(name) if is_mapped(config) else stock_way(name, dtype)
        loads_with = ["compress.load(path)", way]
    tensors = [StoredTensor.of(name, tensor) for name, tensor in state.items() if name not in shared]
    tensors += _guard(name, quantization)
    if not (quantization or form.surgery or is_mapped(config)):
        tensors = named_by_library(name, tensors)
    extra = {FILE_NAME: manifest.to_json(), **bits_files(model)}
    if is_mapped(config):
        extra |= code_files(name)
    return Layout(tensors, config, METADATA, loads_with, extra, cache_notes(model, loads_with))


def cache_notes(model: OpenModel, loads_with: Iterable[str]) -> tuple[str, ...]:
    """Say which ways of loading compress the cache, where it is compressed: those by this package."""
    stock = [way for way in loads_with if "compress" not in way]
    if model.kv_cache is None or not stock:
        return ()
    return (
        f"the cache is compressed where compress.load(path) opens the folder; {stock[0]} reports the factors"
        " as unexpected and keeps a plain cache, with the same logits as before the cache was compressed",
    )


def check_cache(model: OpenModel) -> None:
    """Hold the factors in the module against the model's record.

    Raises:
        ValueError: they are not what it says.
    """
    expected = {} if model.kv_cache is None else factor_tensors(model.kv_cache)
    state = model.module.state_dict().items()
    if {name: tuple(tensor.shape) for name, tensor in state if is_factor(name)} != expected:
        raise ValueError("the factors of the model's cache are not the ones that its record lists")


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model."""
    gone = left_out(spec.config)
    tensors = {name: tensor for name, tensor in spec.tensors.items() if name not in gone}
    shared = {
        copy
        for copy, canonical in (_expand(spec.shared.items(), spec.quantization) if spec.quantization else ())
        if copy in tensors and canonical in tensors and tensors[copy] == tensors[canonical]
    }
    class_name = str(spec.config["_class_name"])
    stored = [
        StoredTensor(name, dtype_code(tensor.dtype), tensor.shape)
        for name, tensor in tensors.items()
        if name not in shared
    ] + _guard(class_name, spec.quantization)
    if not spec.quantization and not is_mapped(spec.config) and _is_native(spec):
        stored = named_by_library(class_name, stored)
    return stored, METADATA


def _is_native(spec: ModelSpec) -> bool:
    """Tell whether a stock config says all sizes of a planned model."""
    return not spec.surgery or spec.family.native_config(spec.config, spec.surgery) is not None


def _guard(class_name: str, quantization: Mapping[str, QuantizedModule]) -> list[StoredTensor]:
    """Return the tensor without content that stops code which does not know the format."""
    name = guard_name(class_name, Manifest(quantization=dict(quantization)))
    return [] if name is None else [StoredTensor.of(name, torch.empty(0, dtype=torch.uint8))]


def stock_config(model: OpenModel) -> dict[str, Any]:
    """Return the model's config without anything that only applies to how it was stored before."""
    dropped = ("quantization_config", "_name_or_path")
    config = {key: value for key, value in without_stop(model.config).items() if key not in dropped}
    if model.family.library == "transformers":
        return transformers_config(config, model.spec.dtype)
    config.setdefault("_class_name", type(model.module).__name__)
    return config


def transformers_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json as transformers goes by it: `architectures`, and no class to run code of.

    Where routers are mapped, there is no stock class, and it names the one that `custom_code` writes.

    Args:
        config: completed, with `_class_name`, which is ours alone.
        dtype: of the weights.
    """
    kept = {key: value for key, value in config.items() if key not in ("_class_name", "torch_dtype")}
    class_name = str(config["_class_name"])
    named = config_keys(class_name) if is_mapped(config) else {"architectures": [class_name]}
    return {**without_code(kept), **named, "dtype": name_of(dtype)}


def equal_copies(
    state: Mapping[str, Tensor],
    shared: Mapping[str, str],
    quantization: Mapping[str, QuantizedModule],
) -> dict[str, str]:
    """Return the tensors that need not be stored: copy -> stored name, contents compared here.

    Args:
        state: the module's tensors as they are now.
        shared: the copies by construction, named as in the dense model or as in the quantized one.
        quantization: layer name -> scheme.
    """
    pairs: dict[str, str] = {}
    for copy, canonical in _expand(shared.items(), quantization):
        if copy not in state or canonical not in state or copy == canonical:
            continue
        first, second = state[copy], state[canonical]
        if first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second):
            pairs[copy] = canonical
    return pairs


def _expand(
    shared: Iterable[tuple[str, str]], quantization: Mapping[str, QuantizedModule]
) -> Iterable[tuple[str, str]]:
    """Name the tensors of quantized layers whose dense weights were copies."""
    for copy, canonical in shared:
        yield copy, canonical
        layer, suffix = copy.rpartition(".")[::2]
        other = canonical.rpartition(".")[0]
        if suffix == "weight" and layer in quantization and other in quantization:
            for name in expected_tensors(quantization[layer], "float32"):
                yield f"{layer}.{name}", f"{other}.{name}"
