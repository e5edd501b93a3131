"""Open tiny mixtures of experts, items for them, and what their routers do, computed the plain way."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from compress.compressors.pruning.experts.layer_groups import layer_groups
from compress.models.mixtures import mixtures
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef

from ....tiny_moe import make_moe

QUIET = SilentProgress()


def opened(class_name, **changes):
    """Return an open model; its folder is gone afterwards, its weights are in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_moe(Path(folder) / "model", class_name, **changes)
        return open_model(ModelRef(id=str(path)), progress=QUIET)


def batches(items=8, tokens=12, size=8, seed=1):
    """Return calls whose items have 5 to `tokens` tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(60, (items, tokens), generator=generator)
    lengths = torch.randint(5, tokens + 1, (items,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) >= tokens - lengths[:, None]).long()
    return [
        {"input_ids": ids[start : start + size], "attention_mask": mask[start : start + size]}
        for start in range(0, items, size)
    ]


def per_layer(model):
    """Return a group for every layer with experts."""
    return layer_groups([mixture.layer for mixture in mixtures(model.module)], "per_layer")


@torch.no_grad()
def routed_plainly(model, calls):
    """Return layer -> (block input, weights, indices) of all tokens that are no padding."""
    found = {mixture.layer: [] for mixture in mixtures(model.module)}
    inputs = {}
    handles = []
    for mixture in mixtures(model.module):

        def keep(_, args, kwargs, layer=mixture.layer):
            inputs[layer] = args[0] if args else kwargs["hidden_states"]

        handles.append(mixture.block.register_forward_pre_hook(keep, with_kwargs=True))
    for call in calls:
        model.module(**call, use_cache=False)
        real = call["attention_mask"].bool()
        for mixture in mixtures(model.module):
            hidden = inputs[mixture.layer][real]
            _, weights, indices = mixture.router(hidden)
            found[mixture.layer].append((hidden, weights, indices))
    for handle in handles:
        handle.remove()
    return {
        layer: tuple(torch.cat(parts) for parts in zip(*calls, strict=True)) for layer, calls in found.items()
    }


def hooks(model):
    """Return how many forward hooks are left in the whole module."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.module.modules())
