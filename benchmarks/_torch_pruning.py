"""torch-pruning's own isomorphic pruner on a vision transformer of transformers, as its users run it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]


def macs(module: Any) -> int:
    """Return the multiply-accumulates of one image, attention products included.

    Args:
        module: a `ViTForImageClassification`, cut or not.
    """
    config, width = module.config, module.classifier.in_features
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    total = config.num_channels * config.patch_size**2 * width * patches
    total += width * module.classifier.out_features
    for layer in module.vit.layers:
        inner = layer.attention.q_proj.out_features
        total += 4 * tokens * width * inner + 2 * tokens**2 * inner
        total += 2 * tokens * width * layer.mlp.fc1.out_features
    return int(total)


def gradients(module: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the summed gradients of the cross-entropy, as the official script accumulates them."""
    module.eval().requires_grad_(True).zero_grad()
    for pixels, labels in batches:
        functional.cross_entropy(module(pixel_values=pixels).logits, labels).backward()
    found = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def pruned(
    original: nn.Module, summed: Mapping[str, Tensor], shares: Mapping[str, float], round_to: int
) -> nn.Module:
    """Return a copy that torch-pruning has cut, with the attributes of its attentions mended.

    Args:
        original: left as it is.
        summed: of `gradients`.
        shares: what to remove of `width`, `heads` and `head_dim`.
        round_to: of torch-pruning.
    """
    module: Any = copy.deepcopy(original).eval().requires_grad_(True)
    for name, value in module.named_parameters():
        value.grad = summed[name].clone() if name in summed else None
    attentions = [layer.attention for layer in module.vit.layers]
    queries = [attention.q_proj for attention in attentions]
    config = module.config
    example = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
    pruner = torch_pruning.pruner.BasePruner(
        module,
        {"pixel_values": example},
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=shares["width"],
        pruning_ratio_dict={tuple(queries): shares["head_dim"]},
        ignored_layers=[module.classifier],
        round_to=round_to,
        num_heads={
            linear: config.num_attention_heads
            for attention in attentions
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        },
        prune_num_heads=shares["heads"] > 0,
        prune_head_dims=shares["head_dim"] > 0,
        head_pruning_ratio=shares["heads"],
        in_channel_groups={},
        out_channel_groups={},
        output_transform=lambda output: output.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for attention in attentions:
        attention.num_attention_heads = pruner.num_heads[attention.q_proj]
        attention.head_dim = attention.q_proj.out_features // attention.num_attention_heads
        attention.scaling = attention.head_dim**-0.5
    module.zero_grad(set_to_none=True)
    return module


def pruned_to(
    original: nn.Module, summed: Mapping[str, Tensor], shares: Mapping[str, float], round_to: int, wanted: int
) -> nn.Module:
    """Scale the shares until the multiply-accumulates come nearest to `wanted`; return that model.

    torch-pruning has no target; this is the bisection that its user writes around it.
    """
    low, high = 0.0, min(0.95 / max(shares.values()), 2.0)
    best: tuple[int, nn.Module] | None = None
    for _ in range(12):
        scale = (low + high) / 2
        made = pruned(original, summed, {name: share * scale for name, share in shares.items()}, round_to)
        found = macs(made)
        if best is None or abs(found - wanted) < abs(best[0] - wanted):
            best = (found, made)
        low, high = (scale, high) if found > wanted else (low, scale)
    assert best is not None
    return best[1]
