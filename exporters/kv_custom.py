"""A checkpoint with a compressed key-value cache that brings its code along; see `kv_code`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import PlanError
from ..models.base import ModelSpec, OpenModel
from ..runtime.kv.custom_config import custom_config
from ..runtime.kv.scheme import KvCacheScheme
from ..runtime.mapped_routing import is_mapped
from . import compress_format
from .form import stored_form
from .formats import Layout
from .kv_code import auto_map, code_files
from .stock import left_out, trusting_way
from .writer import StoredTensor, dtype_code

METADATA = compress_format.METADATA


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Raises:
        PlanError: the model needs more than the code of the cache.
    """
    scheme = _scheme(model)
    plain = compress_format.layout(model)
    name, gone = str(model.config["_class_name"]), left_out(model.config)
    state = model.module.state_dict().items()
    stock: Any = model.module.config
    config = custom_config(plain.config or {}, scheme, auto_map(name))
    code = code_files(name, type(stock).__name__, stock.model_type)
    return replace(
        plain,
        # Under the module's names: transformers knows others by the stock `model_type` alone.
        tensors=[StoredTensor.of(key, tensor) for key, tensor in state if key not in gone],
        config=config,
        loads_with=["compress.load(path)", trusting_way(name)],
        extra={**plain.extra, **code},
        notes=(),
    )


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model."""
    _scheme(spec)
    gone = left_out(spec.config)
    tensors = [
        StoredTensor(name, dtype_code(tensor.dtype), tensor.shape)
        for name, tensor in spec.tensors.items()
        if name not in gone
    ]
    return tensors, METADATA


def _scheme(model: ModelSpec | OpenModel) -> KvCacheScheme:
    problem = None
    if model.kv_cache is None:
        problem = "the cache of the model is not compressed"
    elif model.quantization:
        problem = f"layer {min(model.quantization)} is quantized, and the code beside the weights has no such"
    elif is_mapped(model.config):
        problem = "its routers are mapped, which has code of its own already"
    elif model.surgery and stored_form(model.family, model.config, model.surgery).surgery:
        problem = f"{min(model.surgery)} has sizes of its own, which no config says"
    if problem is not None or model.kv_cache is None:
        raise PlanError(f"export.kv_cache: custom: {problem}", hint="use checkpoint")
    return model.kv_cache
