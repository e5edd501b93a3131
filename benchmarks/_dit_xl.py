"""DiT-XL/2 with random weights: the public config at 256 pixels, cut to any number of blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

CONFIG: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}


def build(blocks: int, dtype: torch.dtype, seed: int) -> DiTTransformer2DModel:
    """Return a DiT of XL width with seeded Gaussian weights, in evaluation mode.

    As in the public checkpoint every block carries the same timestep and label embedder.
    """
    with torch.device("meta"):
        module = DiTTransformer2DModel(**{**CONFIG, "num_layers": blocks})
    fixed = DiTTransformer2DModel(**{**CONFIG, "num_layers": 0}).pos_embed.pos_embed
    module = module.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    module.pos_embed.pos_embed.copy_(fixed)
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(module.named_parameters())
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        if rest.startswith("norm1.emb.") and block != "0":
            tensor.copy_(tensors[f"transformer_blocks.0.{rest}"])
            continue
        scale = 0.02 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return module


def write_config(folder: Path, blocks: int = 28) -> Path:
    """Write a component folder that holds configs only."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "DiTTransformer2DModel", **CONFIG, "num_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def write_random(folder: Path, blocks: int, dtype: torch.dtype, seed: int) -> Path:
    """Write a component folder with random weights and the scheduler of the public checkpoint."""
    build(blocks, dtype, seed).save_pretrained(folder)
    DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    return folder


def inputs(dtype: torch.dtype, batch: int, seed: int) -> dict[str, Any]:
    """Return one forward's arguments: `batch` x 256 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 32, 32, generator=generator).to(dtype),
        "timestep": torch.linspace(900, 100, batch).long(),
        "class_labels": torch.arange(batch) * 100,
        "return_dict": False,
    }
