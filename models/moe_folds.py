"""Which inputs' channel scales a mixture-of-experts model can absorb, exactly.

The norm before the feed-forward block is read by more than linears that are quantized: by the router, and
by the gate of a shared expert. Their columns are divided by what the norm is multiplied by, so that every
token goes where it went. Experts that are not linears of their own read it as well; then nothing is folded
into that norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..runtime.linear_experts import LinearExperts
from ..runtime.mapped_router import MappedRouter
from .base import FoldGroup
from .mixtures import mixtures
from .transformer import config_of, fold_into_norm, fold_into_rows

_GATED = ("gate_proj", "up_proj")
_SHARED = ("shared_expert", "shared_experts")


def moe_folds(module: nn.Module, blocks: list[tuple[str, nn.Module]]) -> list[FoldGroup]:
    """Return the folds of all decoder layers, in forward order.

    Args:
        module: of the stock class, its experts as they are.
        blocks: name and module of every decoder layer.
    """
    found = {mixture.layer: mixture.router_name for mixture in mixtures(module)}
    groups: list[FoldGroup] = []
    for index, (name, block) in enumerate(blocks):
        groups += _attention(module, f"{name}.self_attn", block.get_submodule("self_attn"), name)
        network = block.get_submodule("mlp")
        if index in found:
            groups += _mixture(f"{name}.mlp", network, f"{name}.post_attention_layernorm", found[index])
        else:
            gated = [f"{name}.mlp.{leaf}" for leaf in _GATED]
            groups.append(fold_into_norm(gated, f"{name}.post_attention_layernorm"))
            groups.append(fold_into_rows([f"{name}.mlp.down_proj"], [f"{name}.mlp.up_proj"]))
    return groups


def _attention(module: nn.Module, name: str, attention: nn.Module, block: str) -> Iterator[FoldGroup]:
    config = config_of(module)
    first = ("q_proj", "q_a_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa")
    there = {leaf for leaf, _ in attention.named_children()}
    yield fold_into_norm([f"{name}.{leaf}" for leaf in first if leaf in there], f"{block}.input_layernorm")
    if "kv_b_proj" in there:  # latent attention
        if "q_b_proj" in there:
            yield fold_into_norm([f"{name}.q_b_proj"], f"{name}.q_a_layernorm")
        yield fold_into_norm([f"{name}.kv_b_proj"], f"{name}.kv_a_layernorm")
    elif config.num_attention_heads == config.num_key_value_heads:
        yield fold_into_rows([f"{name}.o_proj"], [f"{name}.v_proj"])


def _mixture(name: str, block: nn.Module, norm: str, router: str) -> Iterator[FoldGroup]:
    experts = block.get_submodule("experts")
    there = {leaf for leaf, _ in block.named_children()}
    networks = [f"{name}.{shared}" for shared in _SHARED if shared in there]
    if isinstance(experts, LinearExperts):
        networks = [*(f"{name}.experts.{index}" for index in range(experts.num_experts)), *networks]
        readers = tuple(
            f"{name}.{leaf}" for leaf in (router, *(f"{s}_gate" for s in _SHARED)) if leaf in there
        )
        gated = tuple(f"{network}.{leaf}" for network in networks for leaf in _GATED)
        yield FoldGroup(gated, partial(_absorb, norm=norm, readers=readers), (norm, *readers))
    for network in networks:
        yield fold_into_rows([f"{network}.down_proj"], [f"{network}.up_proj"])


@torch.no_grad()
def _absorb(module: nn.Module, factor: Tensor, *, norm: str, readers: tuple[str, ...]) -> None:
    """Multiply a norm's weight and bias, and divide the columns of what else reads it.

    In float32, and rounded once to their dtype.
    """
    for values in module.get_submodule(norm).parameters(recurse=False):
        m = factor.detach().to(device=values.device, dtype=torch.float32)
        values.copy_((values.float() * m).to(values.dtype))
    for name in readers:
        reader = module.get_submodule(name)
        if isinstance(reader, MappedRouter):
            raise TypeError(f"{name}: the router is mapped; such a model is not quantized")
        weight = reader.get_parameter("weight")
        m = factor.detach().to(device=weight.device, dtype=torch.float32)
        weight.copy_((weight.float() / m).to(weight.dtype))
