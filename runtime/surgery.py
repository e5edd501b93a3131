"""Give a stock module the sizes that its config does not imply: what pruning left.

Nothing is computed here and no weight is looked at: parameters are replaced by empty ones of the listed
shapes on their own device, and attributes are set. The weights arrive afterwards. What is listed may come
from a folder of anyone, so sizes only shrink, and everything that a module says of itself must agree
before a byte is allocated for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SourceError
from .manifest import ModuleSurgery

_SCALE_TOLERANCE = 1e-6  # a scale is written with all its digits; this is room for float32
_HINT = "the manifest was changed by hand, or belongs to other weights"


def apply_surgery(module: nn.Module, surgery: Mapping[str, ModuleSurgery]) -> None:
    """Resize the listed modules in place.

    Args:
        module: as the stock class builds it from the config; on the meta device nothing is allocated.
        surgery: module name -> its own parameters' shapes and its attributes.

    Raises:
        SourceError: a name is not there, a size is none that pruning can leave, or what is left does not
            fit together.
    """
    for name, cut in surgery.items():
        child = _find(module, name)
        depthwise = _is_depthwise(child)
        for parameter, shape in cut.shapes.items():
            _resize(child, name, parameter, tuple(shape))
        for attribute, value in cut.attributes.items():
            _set(child, name, attribute, value)
        follow_weight(child)
        _check_module(child, name, depthwise)
    for name in _attentions_near(surgery):
        _check_attention(module, name, surgery)


def _find(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise SourceError(
            f"the manifest lists module {name}, which the model does not have", hint=_HINT
        ) from None


def _resize(child: nn.Module, name: str, parameter: str, shape: tuple[int, ...]) -> None:
    old = child._parameters.get(parameter)
    if old is None:
        raise SourceError(f"module {name} has no parameter {parameter}, which the manifest lists", hint=_HINT)
    real = tuple(old.shape)
    if len(real) != len(shape) or any(new > was for new, was in zip(shape, real, strict=True)):
        raise SourceError(
            f"{name}.{parameter}: the manifest says {list(shape)}; the config implies {list(real)}, and"
            " pruning only makes it smaller",
            hint=_HINT,
        )
    if isinstance(child, nn.Conv2d) and shape[2:] != real[2:]:
        raise SourceError(
            f"{name}.{parameter}: {list(shape)} has another window than {list(real)}", hint=_HINT
        )
    empty = torch.empty(shape, dtype=old.dtype, device=old.device)
    child._parameters[parameter] = nn.Parameter(empty, requires_grad=old.requires_grad)


def _set(child: nn.Module, name: str, attribute: str, value: int | float) -> None:
    old = vars(child).get(attribute)
    if isinstance(old, bool) or not isinstance(old, int | float):
        raise SourceError(f"module {name} has no number {attribute}, which the manifest sets", hint=_HINT)
    if isinstance(old, int) and (not isinstance(value, int) or value > old):
        raise SourceError(
            f"module {name}: the manifest sets {attribute} to {value}; pruning leaves an integer of at most"
            f" {old}",
            hint=_HINT,
        )
    setattr(child, attribute, value)


def follow_weight(child: nn.Module) -> None:
    """Let what a module says of its own sizes follow from its weight."""
    weight = child._parameters.get("weight")
    if weight is None:
        return
    if isinstance(child, nn.Linear):
        child.out_features, child.in_features = weight.shape
    elif isinstance(child, nn.LayerNorm):
        child.normalized_shape = tuple(weight.shape)
    elif isinstance(child, nn.Conv2d):
        if _is_depthwise(child):
            child.groups = child.in_channels = child.out_channels = weight.shape[0]
        else:
            child.out_channels, child.in_channels = weight.shape[0], weight.shape[1] * child.groups


def _is_depthwise(child: nn.Module) -> bool:
    """Tell whether a convolution has one filter per channel; one of a single channel may be either."""
    return isinstance(child, nn.Conv2d) and 1 < child.groups == child.in_channels == child.out_channels


def _check_module(child: nn.Module, name: str, depthwise: bool) -> None:
    """Refuse a weight and a bias that do not belong together."""
    weight, bias = child._parameters.get("weight"), child._parameters.get("bias")
    if weight is None or not isinstance(child, nn.Linear | nn.LayerNorm | nn.Conv2d):
        return
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise SourceError(
            f"module {name}: the manifest leaves a weight of {list(weight.shape)} with a bias of"
            f" {list(bias.shape)}",
            hint=_HINT,
        )
    if isinstance(child, nn.Conv2d) and not depthwise and child.groups > 1:
        raise SourceError(f"module {name}: a convolution of {child.groups} groups is not pruned", hint=_HINT)


@dataclass(frozen=True)
class _Layout:
    """How a library names what an attention is made of."""

    heads: str
    q: str
    k: str
    v: str
    out: str
    scale: str


_LAYOUTS = (
    _Layout("num_attention_heads", "q_proj", "k_proj", "v_proj", "o_proj", "scaling"),
    _Layout("heads", "to_q", "to_k", "to_v", "to_out.0", "scale"),
)


def _attentions_near(surgery: Mapping[str, ModuleSurgery]) -> Iterator[str]:
    """Yield the modules that may be attentions of which a part is listed, each once."""
    names: dict[str, None] = {}
    for name in surgery:
        names[name] = None
        for layout in _LAYOUTS:
            for part in (layout.q, layout.k, layout.v, layout.out):
                if name.endswith(f".{part}"):
                    names[name.removesuffix(f".{part}")] = None
    yield from names


def _check_attention(module: nn.Module, name: str, surgery: Mapping[str, ModuleSurgery]) -> None:
    """Refuse an attention whose numbers of heads and channels are not those of its projections.

    Stock code splits whatever it gets: with stale numbers it would compute something else, silently.
    """
    attention = module.get_submodule(name)
    for layout in _LAYOUTS:
        parts = [_linear(attention, path) for path in (layout.q, layout.k, layout.v, layout.out)]
        heads = vars(attention).get(layout.heads)
        if not isinstance(heads, int) or any(part is None for part in parts):
            continue
        q, k, v, out = (part for part in parts if part is not None)
        head_dim = _head_dim(attention, heads, q, name)
        stated = getattr(attention, "inner_kv_dim", k.out_features)
        _expect(name, "queries", q.out_features, heads * head_dim)
        _expect(name, "keys", k.out_features, stated)
        _expect(name, "values", v.out_features, k.out_features)
        _expect(name, "inputs of the output projection", out.in_features, q.out_features)
        if k.out_features % head_dim or q.out_features % k.out_features:
            raise SourceError(
                f"module {name}: {k.out_features} channels of keys make no heads of {head_dim}", hint=_HINT
            )
        attributes: dict[Any, int | float] = surgery[name].attributes if name in surgery else {}
        listed = attributes.get(layout.scale)
        if listed is not None and not math.isclose(listed, head_dim**-0.5, rel_tol=_SCALE_TOLERANCE):
            raise SourceError(
                f"module {name}: {layout.scale} {listed} is not that of {head_dim} channels a head",
                hint=_HINT,
            )


def _head_dim(attention: nn.Module, heads: int, q: nn.Linear, name: str) -> int:
    stated = getattr(attention, "head_dim", None)
    if isinstance(stated, int):
        return stated
    width = getattr(attention, "inner_dim", q.out_features)
    if width % heads:
        raise SourceError(f"module {name}: {width} channels make no {heads} heads", hint=_HINT)
    return int(width // heads)


def _linear(attention: nn.Module, path: str) -> nn.Linear | None:
    try:
        found = attention.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None


def _expect(name: str, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise SourceError(f"module {name}: {found} channels of {what}; its heads make {wanted}", hint=_HINT)
