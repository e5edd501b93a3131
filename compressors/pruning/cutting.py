"""Remove what was not chosen, and say what is left.

Every tensor is indexed once, with ascending positions on all axes that groups cut: torch-pruning's own
executor takes them from a set, which permutes the scales of norms at high shares. Tensors that no group
touches stay the objects they were.

Where heads lose channels, stock code computes with the softmax scale of the new size. `preserve` multiplies
the queries by sqrt(new / old), so that the products come out as before; `reset` leaves the change of
temperature in, as the official code does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import StageError
from ...models.base import Family, ModelSpec, OpenModel
from ...models.building import meta_module
from ...models.structure import AttentionSite
from ...runtime.differing import difference
from ...runtime.manifest import ModuleSurgery
from ...runtime.surgery import follow_weight
from .groups import Group, Selection

AttentionScale = Literal["preserve", "reset"]
Shape = tuple[int, ...]


@torch.no_grad()
def cut(
    model: OpenModel, groups: Sequence[Group], selection: Selection, *, attn_scale: AttentionScale
) -> None:
    """Cut the module in place, and update `model.surgery`.

    Args:
        model: open, before quantization.
        groups: of the module as it is now.
        selection: what stays of those groups that lose something.
        attn_scale: preserve or reset.

    Raises:
        StageError: the selection does not fit the module; nothing was changed.
    """
    chosen = [group for group in groups if group.name in selection.kept]
    _check(chosen, selection, model.module)
    if attn_scale == "preserve":
        for group in chosen:
            _fold_scale(model.module, group, selection)
    for name, axes in _positions(chosen, selection).items():
        _replace(model.module, name, axes)
    for group in chosen:
        if group.attention is not None:
            heads = len(selection.heads[group.name])
            _set_attributes(model.module, group.attention, heads, len(selection.kept[group.name]))
    model.surgery = surgery_of(model.module, model.family, model.config)


def cut_shapes(
    shapes: Mapping[str, Shape],
    groups: Iterable[Group],
    kept: Mapping[str, int],
    heads: Mapping[str, int] | None = None,
) -> dict[str, Shape]:
    """Return the shapes that a cut leaves, from counts alone.

    Args:
        shapes: name -> shape of all tensors as they are.
        groups: of the model as it is.
        kept: group -> channels that stay; groups that are not there lose nothing.
        heads: attention group -> heads that stay, for tables with a column per head; None: tables stay.

    Returns:
        Name -> shape of all tensors.
    """
    changed = {name: list(shape) for name, shape in shapes.items()}
    for group in groups:
        if group.name in kept:
            for part in group.slices:
                owned = int((part.owner >= 0).sum())
                changed[part.tensor][part.axis] -= owned // group.size * (group.size - kept[group.name])
        site = group.attention
        if site is not None and site.table is not None and heads is not None:
            changed[site.table][1] = heads.get(group.name, site.heads)
    return {name: tuple(shape) for name, shape in changed.items()}


def surgery_of(module: nn.Module, family: Family, config: Mapping[str, Any]) -> dict[str, ModuleSurgery]:
    """Say what a module has otherwise than its config implies.

    Args:
        module: dense; on any device.
        family: its adapter.
        config: completed, with `_class_name`.

    Returns:
        Module name -> its own tensors' shapes and attributes that differ; in the order of the module.
    """
    return difference(module, meta_module(family, config))


def planned_surgery(
    spec: ModelSpec, groups: Sequence[Group], kept: Mapping[str, int], heads: Mapping[str, int]
) -> dict[str, ModuleSurgery]:
    """Say what a cut will leave, from counts alone.

    Args:
        spec: of the model as it will be before the cut.
        groups: found in `spec.meta_module()`.
        kept: group -> channels that stay, of those that lose something.
        heads: attention group -> heads that stay, of every attention in `kept`.

    Returns:
        What `surgery_of` gives after the cut.
    """
    module = spec.meta_module()
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    for name, shape in cut_shapes(shapes, groups, kept, heads).items():
        if shape != shapes[name]:
            _put(module, name, torch.empty(shape, dtype=spec.dtype, device="meta"))
    for group in groups:
        if group.attention is not None and group.name in kept:
            _set_attributes(module, group.attention, heads[group.name], kept[group.name])
    return surgery_of(module, spec.family, spec.config)


def _check(groups: Sequence[Group], selection: Selection, module: nn.Module) -> None:
    unknown = set(selection.kept) - {group.name for group in groups}
    if unknown:
        raise StageError(f"the selection names {min(unknown)}, which is no group of the model")
    known = dict(module.named_parameters(remove_duplicate=False))
    names = [part.tensor for group in groups for part in group.slices]
    for group in groups:
        _check_group(group, selection, known)
    shared = {id(known[name]) for name in names}
    for name, value in known.items():
        if id(value) in shared and name not in names:
            raise StageError(f"{name} is one tensor with another that is cut, so it cannot stay as it is")


def _check_group(group: Group, selection: Selection, known: Mapping[str, Tensor]) -> None:
    kept = selection.kept[group.name]
    if selection.sizes[group.name] != group.size:
        raise StageError(
            f"{group.name} has {group.size} channels; the selection was made for"
            f" {selection.sizes[group.name]}"
        )
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= group.size:
        raise StageError(
            f"{group.name}: what stays must be some of its {group.size} channels, in ascending order"
        )
    for part in group.slices:
        length = known[part.tensor].shape[part.axis]
        if length != part.owner.numel():
            raise StageError(
                f"{part.tensor}: axis {part.axis} has {length} positions, its group {part.owner.numel()}"
            )
    if group.attention is not None:
        _check_heads(group, group.attention, selection)


def _check_heads(group: Group, site: AttentionSite, selection: Selection) -> None:
    kept = torch.tensor(selection.kept[group.name]) // site.head_dim
    heads = torch.tensor(selection.heads.get(group.name, ()), dtype=torch.int64)
    found, counts = kept.unique(return_counts=True)
    if not torch.equal(found, heads) or int(counts.min()) != int(counts.max()):
        raise StageError(
            f"{group.name}: the channels that stay must lie in the heads that stay, in each equally many"
        )


def _fold_scale(module: nn.Module, group: Group, selection: Selection) -> None:
    """Multiply the queries by sqrt(new / old channels of a head), in float32."""
    site = group.attention
    if site is None:
        return
    head_dim = len(selection.kept[group.name]) // len(selection.heads[group.name])
    if head_dim == site.head_dim:
        return
    factor = math.sqrt(head_dim / site.head_dim)
    for values in module.get_submodule(site.q).parameters(recurse=False):
        values.copy_(values.float() * factor)


def _positions(groups: Sequence[Group], selection: Selection) -> dict[str, dict[int, Tensor]]:
    """Return tensor -> axis -> positions that stay, ascending."""
    axes: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        mask = selection.mask(group.name)
        for part in group.slices:
            axes.setdefault(part.tensor, {})[part.axis] = part.positions(mask)
        site = group.attention
        if site is not None and site.table is not None:
            axes.setdefault(site.table, {})[1] = torch.tensor(selection.heads[group.name])
    return axes


def _replace(module: nn.Module, name: str, axes: Mapping[int, Tensor]) -> None:
    values = module.get_parameter(name).detach()
    for axis, positions in axes.items():
        values = values.index_select(axis, positions.to(values.device))
    _put(module, name, values.contiguous())


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    """Let a parameter be `values`; it keeps its flag, and has no gradient."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = owner._parameters[leaf]
    owner._parameters[leaf] = nn.Parameter(values, requires_grad=old is not None and old.requires_grad)
    follow_weight(owner)


def _set_attributes(module: nn.Module, site: AttentionSite, heads: int, width: int) -> None:
    child = module.get_submodule(site.name)
    for name, value in attribute_values(site, heads, width // heads):
        setattr(child, name, value)


def attribute_values(site: AttentionSite, heads: int, head_dim: int) -> Iterator[tuple[str, int | float]]:
    """Yield the attributes that an attention of `heads` heads of `head_dim` channels has, with values."""
    meant = {"heads": heads, "head_dim": head_dim, "width": heads * head_dim, "scale": head_dim**-0.5}
    for name, meaning in site.attributes.items():
        yield name, meant[meaning]
