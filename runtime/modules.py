"""Put quantized layers into a stock module and say what their tensors are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import SourceError
from .conv import QuantizedConv2d
from .linear import QuantizedLinear
from .manifest import QuantizedModule
from .mapped_router import MappedRouter
from .mapped_routing import MAPPING
from .windows import kernel_of

ALIGNMENT = 64
EXACT = frozenset(
    {"qweight", "scale", "zero_point", "input_scale", "rotation_sign"}
    | {"activation_scale", "activation_zero_point", "first_token_input"}
)
"""Tensors of a quantized layer that are never cast; bias, low-rank branch and the stored output of the
first token follow the model's dtype."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype called `name`.

    Raises:
        SourceError: not one of float32, float16, bfloat16.
    """
    if isinstance(name, torch.dtype):
        name = name_of(name)
    if name not in _DTYPES:
        raise SourceError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def layer_class(scheme: QuantizedModule) -> type[QuantizedLinear]:
    """Return the class of a quantized layer: a convolution's where the scheme has a kernel."""
    return QuantizedLinear if scheme.kernel is None else QuantizedConv2d


def swap_linears(module: nn.Module, schemes: Mapping[str, QuantizedModule], dtype: torch.dtype) -> None:
    """Replace the listed `nn.Linear`s and `nn.Conv2d`s by empty quantized layers on the meta device.

    Raises:
        SourceError: a name is not a layer of this kind, shape and window.
    """
    for name, scheme in schemes.items():
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            raise SourceError(f"the manifest lists layer {name}, which the model does not have") from None
        _check_same(name, scheme, layer)
        with torch.device("meta"):
            quantized = layer_class(scheme)(scheme, dtype)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, quantized)


def _check_same(name: str, scheme: QuantizedModule, layer: nn.Module) -> None:
    """Refuse a layer of the model that is not what the manifest says."""
    wanted, kind = "Conv2d" if scheme.kernel else "Linear", type(layer).__name__
    if not isinstance(layer, nn.Linear | nn.Conv2d) or isinstance(layer, nn.Linear) == bool(scheme.kernel):
        raise SourceError(f"the manifest lists layer {name}, which is a {kind}, not a {wanted}")
    stated, real = tuple(scheme.shape), (layer.weight.shape[0], layer.weight[0].numel())
    if stated != real or scheme.bias != (layer.bias is not None):
        raise SourceError(
            f"layer {name}: the manifest says {stated}, bias {scheme.bias}; "
            f"the model has {real}, bias {layer.bias is not None}"
        )
    if isinstance(layer, nn.Conv2d) and kernel_of(layer) != scheme.kernel:
        raise SourceError(f"layer {name}: the manifest says {scheme.kernel}; the model has {layer}")


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers of a module by name, in its order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


def place(module: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = False) -> None:
    """Let the parameter or buffer `name` of a module be `tensor` itself."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        setattr(owner, leaf, tensor)


def exact_names(module: nn.Module) -> dict[str, torch.dtype]:
    """Return full name -> dtype of every tensor that is never cast.

    These are the grids of the quantized layers, the mappings of routers, and the buffers that the stock
    class stores: it computes them in a dtype of its own, such as float32 position tables in a bfloat16 model.
    """
    exact = {
        f"{name}.{buffer}": tensor.dtype
        for name, layer in quantized_layers(module).items()
        for buffer, tensor in layer.named_buffers()
        if buffer in EXACT
    }
    inside = tuple(f"{name}." for name in quantized_layers(module))
    stored = module.state_dict().keys() - {name for name, _ in module.named_parameters()}
    buffers = dict(module.named_buffers())
    exact |= {name: buffers[name].dtype for name in stored if not name.startswith(inside)}
    return exact | {
        f"{name}.{MAPPING}": torch.float32
        for name, router in module.named_modules()
        if isinstance(router, MappedRouter)
    }
