"""Experts of an open model: removed, mixed with each other, and fewer of them per token.

What is left is a model of the stock class with smaller fused tensors: the config says how many experts
there are, router and experts say so themselves, and `save_pretrained` of it is a whole checkpoint.
Works on stock modules; nothing here knows why an expert goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..runtime.modules import place
from ..runtime.moe_classes import MOE_CLASSES
from ..runtime.moe_config import moe_shape, with_expert_count
from .base import ModelSpec, OpenModel
from .expert_choice import check_counts, checked_experts, fewer_experts
from .mixtures import ACTIVE_NAMES, COUNT_NAMES, Mixture, mixtures


def keep_experts(
    module: nn.Module,
    config: Mapping[str, Any],
    kept: Mapping[int, Sequence[int]],
    *,
    active: int | None = None,
    mixing: Mapping[int, Tensor] | None = None,
) -> dict[str, Any]:
    """Remove all other experts of a stock module, in place, and mix the tensors of those that stay.

    Rows of the router are kept, never mixed; with them go its bias and its correction of the choice.

    Args:
        module: of the stock class, dense.
        config: its config, completed, with `_class_name`.
        kept: layer -> experts that stay, in any order; they end up ascending.
        active: experts per token from now on; None: as many as before.
        mixing: layer -> [kept, experts] coefficients of the old experts in every new one, in the order of
            `kept`; of layers that it does not name, the experts stay as they are. Computed in float32.

    Returns:
        the config of what is left.

    Raises:
        PlanError: as `checked_experts`; or coefficients of another shape, of a layer without experts, or
            that are not finite.
    """
    chosen = checked_experts(config, kept, active)
    rows = _checked_mixing(chosen, kept, mixing or {}, moe_shape(config).routing.experts)
    changed = fewer_experts(config, kept, active)
    for mixture in mixtures(module):
        _cut(mixture, chosen[mixture.layer], rows.get(mixture.layer))
    set_counts(module, changed)
    return changed


def use_fewer_experts(module: nn.Module, config: Mapping[str, Any], active: int) -> dict[str, Any]:
    """Send every token through fewer experts from now on, all of which stay; return the changed config.

    Raises:
        PlanError: more than before, none, or not as many as the kind of router can pick.
    """
    count = moe_shape(config).routing.experts
    check_counts(config, count, active)
    changed = with_expert_count(config, count, active)
    set_counts(module, changed)
    return changed


def keep_experts_of(
    model: OpenModel,
    kept: Mapping[int, Sequence[int]],
    *,
    active: int | None = None,
    mixing: Mapping[int, Tensor] | None = None,
) -> None:
    """Do `keep_experts` to an open model; its config says so afterwards.

    Raises:
        PlanError: as `keep_experts`, or the model is quantized.
    """
    if model.quantization:
        raise PlanError(
            "the model is quantized; experts are removed from models in floating point",
            hint="put the removal of experts before the quantizer",
        )
    model.config = keep_experts(model.module, model.config, kept, active=active, mixing=mixing)


def fewer_experts_spec(spec: ModelSpec, count: int, active: int | None = None) -> ModelSpec:
    """Return the spec of a dense model with `count` experts in every layer.

    Raises:
        PlanError: such a model cannot be left, or the model is no mixture of experts.
    """
    check_counts(spec.config, count, active)
    return spec.cut(spec.surgery, with_expert_count(spec.config, count, active))


@torch.no_grad()
def mixed(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the tensors of new experts, each a sum of old ones.

    Summed in float32, expert after expert, and rounded once; a row with a single 1 copies its expert
    exactly. At most one expert is held in float32 at a time.

    Args:
        tensor: [experts, ...].
        rows: [new experts, experts] coefficients, on any device.

    Returns:
        [new experts, ...], in the dtype and on the device of `tensor`.
    """
    made = tensor.new_empty((rows.shape[0], *tensor.shape[1:]))
    for new, row in enumerate(rows.tolist()):
        terms = [(old, factor) for old, factor in enumerate(row) if factor != 0.0]
        if len(terms) == 1 and terms[0][1] == 1.0:
            made[new] = tensor[terms[0][0]]
            continue
        total = torch.zeros(tensor.shape[1:], dtype=torch.float32, device=tensor.device)
        for old, factor in terms:
            total.add_(tensor[old].to(torch.float32), alpha=factor)
        made[new] = total.to(tensor.dtype)
    return made


def _checked_mixing(
    chosen: Mapping[int, tuple[int, ...]],
    kept: Mapping[int, Sequence[int]],
    mixing: Mapping[int, Tensor],
    experts: int,
) -> dict[int, Tensor]:
    """Return the coefficients in the order of the experts that stay."""
    found = {}
    for layer, rows in mixing.items():
        if layer not in chosen:
            raise PlanError(f"coefficients are given for layer {layer}, which has no experts")
        wanted = (len(chosen[layer]), experts)
        if tuple(rows.shape) != wanted:
            raise PlanError(
                f"layer {layer}: coefficients {list(rows.shape)}; {list(wanted)} are needed: a row for every"
                " expert that stays, a column for every expert that there is"
            )
        if not bool(torch.isfinite(rows).all()):
            raise PlanError(f"layer {layer}: coefficients that are not finite")
        order = sorted(range(wanted[0]), key=lambda row: kept[layer][row])
        found[layer] = rows.detach()[order]
    return found


@torch.no_grad()
def _cut(mixture: Mixture, experts: tuple[int, ...], rows: Tensor | None) -> None:
    """Leave these experts in one layer, or mixtures of all of them, tensor by tensor."""
    for name, tensor in mixture.router_tensors().items():
        _replace(mixture.router, name, _picked(tensor, experts))
    for name, tensor in mixture.expert_tensors().items():
        _replace(mixture.experts, name, _picked(tensor, experts) if rows is None else mixed(tensor, rows))


def _picked(tensor: Tensor, experts: tuple[int, ...]) -> Tensor:
    return tensor[torch.tensor(experts, device=tensor.device)]


def _replace(owner: nn.Module, name: str, tensor: Tensor) -> None:
    before = getattr(owner, name)
    place(owner, name, tensor, requires_grad=before.requires_grad)


def set_counts(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Let everything that knows how many experts there are, or a token goes through, know the new number.

    Args:
        module: of the stock class; its own config is changed as well.
        config: of what is left, completed.
    """
    routing = moe_shape(config).routing
    owners = [
        part for mixture in mixtures(module) for part in (mixture.block, mixture.router, mixture.experts)
    ]
    for owner in (module, *owners):
        for name in COUNT_NAMES:
            if name in vars(owner):
                setattr(owner, name, routing.experts)
        for name in ACTIVE_NAMES:
            if name in vars(owner):
                setattr(owner, name, routing.active)
        if isinstance(owner, nn.Linear):
            owner.out_features = routing.experts
    stock: Any = module.config
    setattr(stock, MOE_CLASSES[config["_class_name"]].counts[0], routing.experts)
    stock.num_experts_per_tok = routing.active
