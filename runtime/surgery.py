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
    attentions = {name: _head_dim_before(module, name) for name in _attentions_near(surgery)}
    for name, cut in surgery.items():
        child = _find(module, name)
        depthwise = _is_depthwise(child)
        for parameter, shape in cut.shapes.items():
            _resize(child, name, parameter, tuple(shape))
        for attribute, value in cut.attributes.items():
            _set(child, name, attribute, value)
        follow_weight(child)
        _check_module(child, name, depthwise)
    for name, head_dim in attentions.items():
        _check_attention(module.get_submodule(name), name, head_dim)


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
    """How a library names what an attention is made of.

    Attributes:
        heads, scale: attributes of the attention.
        widths: attributes that say channels of all heads.
        table: path of a parameter with a column per head, in the attentions that have one.
    """

    heads: str
    scale: str
    widths: tuple[str, ...]
    q: str
    k: str
    v: str
    out: str
    table: tuple[str, str] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the modules that an attention is cut in."""
        table = () if self.table is None else (self.table[0],)
        return (self.q, self.k, self.v, self.out, *table)


_TABLE = ("relative_position_bias", "relative_position_bias_table")
_LAYOUTS = (
    _Layout("num_attention_heads", "scaling", (), "q_proj", "k_proj", "v_proj", "o_proj", _TABLE),
    _Layout("heads", "scale", ("inner_dim", "inner_kv_dim"), "to_q", "to_k", "to_v", "to_out.0"),
)


def _attentions_near(surgery: Mapping[str, ModuleSurgery]) -> Iterator[str]:
    """Yield the attentions of which anything is listed, each once."""
    names: dict[str, None] = {}
    for name, cut in surgery.items():
        if cut.attributes:
            names[name] = None
        for part in (part for layout in _LAYOUTS for part in layout.parts):
            if name.endswith(f".{part}"):
                names[name.removesuffix(f".{part}")] = None
    yield from names


def _layout_of(attention: nn.Module, name: str) -> _Layout:
    """Return how an attention is laid out.

    Raises:
        SourceError: it is none of which is known what computes with its heads.
    """
    for layout in _LAYOUTS:
        linears = (_linear(attention, path) for path in (layout.q, layout.k, layout.v, layout.out))
        if type(vars(attention).get(layout.heads)) is int and None not in linears:
            return layout
    raise SourceError(
        f"module {name}: a {type(attention).__name__} is no attention that pruning cuts", hint=_HINT
    )


def _head_dim_before(module: nn.Module, name: str) -> int:
    attention = _find(module, name)
    return _head_dim(attention, _layout_of(attention, name), name)


def _check_attention(attention: nn.Module, name: str, head_dim_before: int) -> None:
    """Refuse an attention whose numbers are not those of its projections.

    Stock code splits whatever it gets into the heads that it was told of, and scales by what it was told:
    with numbers of before the cut it would compute something else, silently.
    """
    layout = _layout_of(attention, name)
    heads, head_dim = int(vars(attention)[layout.heads]), _head_dim(attention, layout, name)
    if head_dim > head_dim_before:
        raise SourceError(
            f"module {name}: the manifest leaves heads of {head_dim} channels, and before the cut they had"
            f" {head_dim_before}",
            hint=_HINT,
        )
    width = heads * head_dim
    for what, path in (("queries", layout.q), ("keys", layout.k), ("values", layout.v)):
        _expect(name, f"channels of {what}", attention.get_submodule(path).out_features, width)
    out = attention.get_submodule(layout.out)
    _expect(name, "channels as inputs of the output projection", out.in_features, width)
    for attribute in layout.widths:
        _expect(name, f"as {attribute}", getattr(attention, attribute), width)
    if layout.table is not None and _has(attention, layout.table[0]):
        table = attention.get_submodule(layout.table[0]).get_parameter(layout.table[1])
        _expect(name, f"columns of {layout.table[1]}", table.shape[1], heads)
    scale = vars(attention).get(layout.scale)
    if not isinstance(scale, int | float) or not math.isclose(
        scale, head_dim**-0.5, rel_tol=_SCALE_TOLERANCE
    ):
        raise SourceError(
            f"module {name}: {layout.scale} {scale} is not that of {head_dim} channels a head,"
            f" {head_dim**-0.5}",
            hint=_HINT,
        )


def _head_dim(attention: nn.Module, layout: _Layout, name: str) -> int:
    stated = vars(attention).get("head_dim")
    if type(stated) is int:
        return stated
    heads = vars(attention)[layout.heads]
    width = attention.get_submodule(layout.q).get_parameter("weight").shape[0]
    if width % heads:
        raise SourceError(f"module {name}: {width} channels make no {heads} heads", hint=_HINT)
    return int(width // heads)


def _linear(attention: nn.Module, path: str) -> nn.Linear | None:
    found = attention.get_submodule(path) if _has(attention, path) else None
    return found if isinstance(found, nn.Linear) else None


def _has(attention: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in attention.named_modules())


def _expect(name: str, what: str, found: object, wanted: int) -> None:
    if found != wanted:
        raise SourceError(f"module {name}: {found} {what}; its heads make {wanted}", hint=_HINT)
