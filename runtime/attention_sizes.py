"""What must agree in an attention once its modules have other sizes: heads, their channels, scale, tables.

Stock code splits whatever it gets into the heads that it was told of, and scales by what it was told: with
numbers of before a cut it would compute something else, silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..errors import SourceError
from .manifest import ModuleSurgery

_SCALE_TOLERANCE = 1e-6  # a scale is written with all its digits; this is room for float32
HINT = "the manifest was changed by hand, or belongs to other weights"


@dataclass(frozen=True)
class _Projection:
    """A linear whose outputs are those of all heads, of `matrices` matrices one after the other."""

    what: str
    path: str
    matrices: int = 1


@dataclass(frozen=True)
class _Table:
    """A parameter with a column per head, or per channel of a head.

    Attributes:
        owner: path of the module that has it; empty: the attention itself.
    """

    owner: str
    name: str
    columns: Literal["heads", "head_dim"]


@dataclass(frozen=True)
class _Layout:
    """How a library names what an attention is made of.

    Attributes:
        heads, scale: attributes of the attention.
        widths: attributes that say channels of all heads.
        tables: in the attentions that have them.
        telling: the module that makes an attention of what `out` is in, where others have one of that name.
    """

    heads: str
    scale: str
    widths: tuple[str, ...]
    projections: tuple[_Projection, ...]
    out: str
    tables: tuple[_Table, ...] = ()
    telling: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the modules that an attention is cut in."""
        owners = (table.owner for table in self.tables if table.owner)
        return (*(projection.path for projection in self.projections), self.out, *owners)

    @property
    def own_tables(self) -> frozenset[str]:
        """Names of the tables that the attention itself has."""
        return frozenset(table.name for table in self.tables if not table.owner)


def _separate(pattern: str) -> tuple[_Projection, ...]:
    names = {"queries": "q", "keys": "k", "values": "v"}
    return tuple(_Projection(f"channels of {what}", pattern.format(name)) for what, name in names.items())


_LAYOUTS = (
    _Layout(
        "num_attention_heads", "scaling", (), _separate("{}_proj"), "o_proj",
        (_Table("relative_position_bias", "relative_position_bias_table", "heads"),),
    ),
    _Layout("heads", "scale", ("inner_dim", "inner_kv_dim"), _separate("to_{}"), "to_out.0"),
    _Layout(  # of Segment Anything
        "num_attention_heads", "scale", (),
        (_Projection("rows of queries, keys and values", "qkv", 3),), "proj",
        (_Table("", "rel_pos_h", "head_dim"), _Table("", "rel_pos_w", "head_dim")), telling="qkv",
    ),
)  # fmt: skip


def attentions_near(module: nn.Module, surgery: Mapping[str, ModuleSurgery]) -> Iterator[str]:
    """Yield the attentions of which a surgery lists anything, each once; some may be none that is known."""
    names: dict[str, None] = {}
    for name, cut in surgery.items():
        if cut.attributes or any(cut.shapes.keys() & layout.own_tables for layout in _LAYOUTS):
            names[name] = None
        for layout in _LAYOUTS:
            for part in layout.parts:
                owner = name.removesuffix(f".{part}")
                if owner != name and (layout.telling is None or _has(module, f"{owner}.{layout.telling}")):
                    names[owner] = None
    yield from names


def head_dim_of(attention: nn.Module, name: str) -> int:
    """Return the channels of a head.

    Raises:
        SourceError: it is no attention of which is known what computes with its heads.
    """
    return _head_dim(attention, _layout_of(attention, name), name)


def check_attention(attention: nn.Module, name: str, head_dim_before: int) -> None:
    """Refuse an attention whose numbers are not those of its projections.

    Args:
        attention: cut.
        name: for messages.
        head_dim_before: channels of a head before the cut.

    Raises:
        SourceError: naming the number.
    """
    layout = _layout_of(attention, name)
    heads, head_dim = int(vars(attention)[layout.heads]), _head_dim(attention, layout, name)
    if head_dim > head_dim_before:
        raise SourceError(
            f"module {name}: the manifest leaves heads of {head_dim} channels, and before the cut they had"
            f" {head_dim_before}",
            hint=HINT,
        )
    width = heads * head_dim
    for projection in layout.projections:
        rows = attention.get_submodule(projection.path).out_features
        _expect(name, projection.what, rows, projection.matrices * width)
    out = attention.get_submodule(layout.out)
    _expect(name, "channels as inputs of the output projection", out.in_features, width)
    for attribute in layout.widths:
        _expect(name, f"as {attribute}", getattr(attention, attribute), width)
    for table in layout.tables:
        _check_table(attention, name, table, heads if table.columns == "heads" else head_dim)
    scale = vars(attention).get(layout.scale)
    if not isinstance(scale, int | float) or not math.isclose(
        scale, head_dim**-0.5, rel_tol=_SCALE_TOLERANCE
    ):
        raise SourceError(
            f"module {name}: {layout.scale} {scale} is not that of {head_dim} channels a head,"
            f" {head_dim**-0.5}",
            hint=HINT,
        )


def _check_table(attention: nn.Module, name: str, table: _Table, columns: int) -> None:
    owner = attention
    if table.owner:
        if not _has(attention, table.owner):
            return
        owner = attention.get_submodule(table.owner)
    found = owner._parameters.get(table.name)
    if found is not None:
        _expect(name, f"columns of {table.name}", found.shape[1], columns)


def _layout_of(attention: nn.Module, name: str) -> _Layout:
    for layout in _LAYOUTS:
        paths = (*(projection.path for projection in layout.projections), layout.out)
        linears = [_linear(attention, path) for path in paths]
        if type(vars(attention).get(layout.heads)) is int and None not in linears:
            return layout
    raise SourceError(
        f"module {name}: a {type(attention).__name__} is no attention that pruning cuts", hint=HINT
    )


def _head_dim(attention: nn.Module, layout: _Layout, name: str) -> int:
    stated = vars(attention).get("head_dim")
    if type(stated) is int:
        return stated
    heads, first = vars(attention)[layout.heads], layout.projections[0]
    rows = attention.get_submodule(first.path).get_parameter("weight").shape[0]
    if rows % (heads * first.matrices):
        raise SourceError(f"module {name}: {rows} {first.what} make no {heads} heads", hint=HINT)
    return int(rows // (heads * first.matrices))


def _linear(attention: nn.Module, path: str) -> nn.Linear | None:
    found = attention.get_submodule(path) if _has(attention, path) else None
    return found if isinstance(found, nn.Linear) else None


def _has(module: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in module.named_modules())


def _expect(name: str, what: str, found: object, wanted: int) -> None:
    if found != wanted:
        raise SourceError(f"module {name}: {found} {what}; its heads make {wanted}", hint=HINT)
