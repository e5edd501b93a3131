"""Models of published sizes with random weights, and images of noise, as folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from PIL import Image
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

_CLASSES = {"num_labels": 1000}
CLASSIFIERS: dict[str, Any] = {
    "ViT-B/16": ViTConfig(**_CLASSES),
    "ViT-Ti/16": ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, **_CLASSES),
    "ConvNeXt-B": ConvNextConfig(
        depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024], image_size=224, **_CLASSES
    ),
    "Swin-T": SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], **_CLASSES),
}
DIT_S: dict[str, Any] = {
    "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8, "num_layers": 12,
    "attention_bias": True, "sample_size": 32, "patch_size": 2, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip
MODELS = ("ViT-B/16", "ConvNeXt-B", "Swin-T", "DiT-S/2")


def _build(name: str) -> nn.Module:
    if name == "DiT-S/2":
        return DiTTransformer2DModel(**DIT_S)
    config = CLASSIFIERS[name]
    classes = {
        ViTConfig: ViTForImageClassification,
        ConvNextConfig: ConvNextForImageClassification,
        SwinConfig: SwinForImageClassification,
    }
    return classes[type(config)](config)


def write_model(folder: Path, name: str, seed: int) -> Path:
    """Write a model with seeded Gaussian weights; return its folder.

    Args:
        folder: that it becomes.
        name: one of `CLASSIFIERS`, or of `MODELS`.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = _build(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            # Norms around 1, weights that keep the size of what passes: no layer is dead or explodes.
            scale = 0.02 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    module.save_pretrained(folder)
    if name in CLASSIFIERS:
        side = CLASSIFIERS[name].image_size
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    else:
        DDIMScheduler(beta_schedule="linear", clip_sample=False).save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int, side: int, seed: int) -> Path:
    """Write images of smooth noise in ten classes, `count` to calibrate on and a few to hold out."""
    generator = np.random.default_rng(seed)
    for part, images in (("train", count), ("validation", 10)):
        for index in range(images):
            coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            place = folder / part / f"LABEL_{index % 10}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((side, side)).save(place / f"{index:04d}.png")
    return folder
