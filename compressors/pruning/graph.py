"""Which channels of a model can only be removed together.

Groups come from the dependencies that torch-pruning's graph finds (`tracing`); what kind they are and
whether any is missing comes from the family's description of the model. A layer that the description calls
prunable and that has no group is an error: torch-pruning would leave it at full width and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...errors import StageError
from ...models.base import Family, OpenModel
from ...models.structure import AttentionSite, PrunableStructure
from .groups import Group, Kind, Slice
from .tracing import Op, Side, Trace

_SCORED = frozenset({"Linear", "Conv", "LayerNorm", "Embedding"})


def find_groups(model: OpenModel) -> list[Group]:
    """Find all groups of an open model, in forward order.

    Raises:
        StageError: a layer that can be pruned has no group, or groups contradict each other.
    """
    return find_groups_in(model.module, model.family)


def find_groups_in(module: nn.Module, family: Family) -> list[Group]:
    """Find all groups of a module, in forward order.

    Args:
        module: of the family; its weights are not looked at and may be on the meta device.
        family: its adapter.

    Raises:
        StageError: a layer that can be pruned has no group, or groups contradict each other.
    """
    structure = family.structure(module)
    parameters = {name for name, _ in module.named_parameters()}
    tables = {site.table for site in structure.attentions if site.table is not None}
    trace = Trace(module, family, sorted(parameters & {*structure.ignored, *tables}))
    groups = [_attention(trace, site) for site in structure.attentions]
    groups += [_inner(trace, name, block) for name, block in structure.inner.items()]
    if structure.width:
        groups += _widths(trace, structure, groups)
    _refuse_overlap(groups)
    return sorted(groups, key=lambda group: trace.order[group.name])


def _attention(trace: Trace, site: AttentionSite) -> Group:
    ops = _reached(trace, site.q, "out")
    size = site.heads * site.head_dim
    found = {(op.module, op.side) for op in ops}
    wanted = [(site.q, "out"), (site.k, "out"), (site.v, "out"), (site.out, "in")]
    for name, side in wanted:
        if (name, side) not in found:
            raise StageError(f"{name}: its {side}puts do not depend on the heads of {site.name}")
    group = _group(site.q, "attention", size, ops, site.block, site)
    straight = torch.arange(size)
    for part in group.slices:
        if not torch.equal(part.owner, straight):
            raise StageError(f"{part.tensor}: its {part.owner.numel()} channels are not heads, one by one")
    return group


def _inner(trace: Trace, name: str, block: int) -> Group:
    ops = _reached(trace, name, "out")
    size = _length(ops, name, "out")
    readers = [op for op in ops if op.side == "in"]
    if not readers:
        raise StageError(f"{name}: nothing reads its outputs, so they are no inner channels")
    if readers[0].length < size:  # gated: two outputs make one channel, so count where they are one
        size = readers[0].length
        ops = _reached(trace, readers[0].module, "in")
    return _group(name, "ff", size, ops, block)


def _widths(trace: Trace, structure: PrunableStructure, inner: Sequence[Group]) -> list[Group]:
    """Find the groups of the residual stream: what other linears and convolutions write."""
    written = {part.module for group in inner for part in group.slices if part.axis == 0}
    groups = []
    for name in _writers(trace):
        if name in written or _is_ignored(name, structure.ignored):
            continue
        ops = _reached(trace, name, "out")
        outputs = {op.module for op in ops if op.side == "out" and op.kind != "Parameter"}
        written |= outputs
        if not any(_is_ignored(output, structure.ignored) for output in outputs):
            groups.append(_group(name, "width", _length(ops, name, "out"), ops))
    if not groups:
        raise StageError("no group of the residual stream was found, though the model has one")
    return groups


def _writers(trace: Trace) -> Iterator[str]:
    """Yield the names of linears and convolutions in forward order."""
    for name in trace.order:
        if isinstance(trace.ghost.get_submodule(name), nn.Linear | nn.Conv2d):
            yield name


def _is_ignored(name: str, ignored: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in ignored)


def _reached(trace: Trace, name: str, side: Side) -> list[Op]:
    ops = trace.reached(name, side)
    if len(ops) < 2:
        raise StageError(f"{name}: no layer depends on its {side}puts; the trace of the model is incomplete")
    return ops


def _length(ops: Sequence[Op], name: str, side: Side) -> int:
    return next(op.length for op in ops if op.module == name and op.side == side)


def _group(
    name: str, kind: Kind, size: int, ops: Sequence[Op], block: int | None = None,
    attention: AttentionSite | None = None,
) -> Group:  # fmt: skip
    parts = [part for op in ops for part in _slices(op, size, name)]
    label = tuple(f"{op.kind}.{op.side}" for op in ops)
    return Group(name, kind, size, tuple(parts), label, block, attention)


def _slices(op: Op, size: int, root: str) -> Iterator[Slice]:
    owner = _owner(op, size, root)
    yield Slice(op.module, op.parameter, op.axis, owner, scored=op.kind in _SCORED)
    if op.bias:
        yield Slice(op.module, "bias", 0, owner, scored=False)


def _refuse_overlap(groups: Sequence[Group]) -> None:
    claimed: dict[tuple[str, int], str] = {}
    for group in groups:
        for part in group.slices:
            first = claimed.setdefault((part.tensor, part.axis), group.name)
            if first != group.name:
                raise StageError(
                    f"{part.tensor}: axis {part.axis} depends on {first} and on {group.name}, which are cut"
                    " independently"
                )


def _owner(op: Op, size: int, root: str) -> Tensor:
    """Return which channel every position belongs to.

    Raises:
        StageError: channels have not equally many positions: the trace has mixed up axes.
    """
    where = f"{op.module}.{op.parameter}" if op.module else op.parameter
    owner = torch.full((op.length,), -1, dtype=torch.int64)
    positions = torch.tensor(op.positions, dtype=torch.int64)
    if positions.numel() and int(positions.max()) >= op.length:
        raise StageError(f"{where}: position {int(positions.max())} depends on {root}, of {op.length}")
    owner[positions] = torch.tensor(op.roots, dtype=torch.int64)
    counts = torch.bincount(owner[owner >= 0], minlength=size)
    if counts.numel() != size or int(counts.min()) != int(counts.max()) or int(counts.min()) == 0:
        raise StageError(
            f"{where}: its {op.length} positions on axis {op.axis} do not follow the {size} channels of"
            f" {root}"
        )
    return owner
