"""Tiny random Segment Anything models of transformers, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TINY: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 8, "window_size": 3, "global_attn_indexes": [2], "output_channels": 32, "mlp_dim": 96,
        "num_pos_feats": 16,
    },
    "prompt_encoder_config": {
        "hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32,
    },
}  # fmt: skip
"""Of the stock config; windows of 3 do not divide the 8 tokens of a side, as in the real model."""


def tiny_sam(seed: int = 0, attention: str = "sdpa", **vision: Any) -> Any:
    """Return a `SamModel` in evaluation mode whose parameters are all random (the library starts some at 0).

    Args:
        seed: of the parameters.
        attention: "sdpa" or "eager".
        vision: changes of its vision config.
    """
    import torch
    import transformers

    parts = {**TINY, "vision_config": {**TINY["vision_config"], **vision}}
    config = transformers.SamConfig(**parts, attn_implementation=attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.SamModel(config).eval()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                # Library weights start at 1e-10: without a scale of their own layers would do nothing.
                spread = 0.3 / max(1.0, parameter.shape[-1] ** 0.5 / 4) if parameter.ndim > 1 else 0.1
                if not name.endswith("positional_embedding"):
                    parameter.add_(spread * torch.randn(parameter.shape))
    return module.requires_grad_(False)


def save_tiny_sam(folder: Path, seed: int = 0, **vision: Any) -> Path:
    """Write one as the library does, with the preprocessing of its images."""
    from transformers import SamImageProcessorPil

    module = tiny_sam(seed, **vision)
    side = module.config.vision_config.image_size
    module.save_pretrained(folder)
    SamImageProcessorPil(
        size={"longest_edge": side}, pad_size={"height": side, "width": side},
        mask_size={"longest_edge": side // 4}, mask_pad_size={"height": side // 4, "width": side // 4},
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Return images [height, width, 3] uint8: smooth colours with a bright rectangle each."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        rows, columns = np.mgrid[0:height, 0:width]
        waves = generator.uniform(0.02, 0.2, (3, 2))
        image = np.stack([np.sin(rows * a + columns * b) for a, b in waves], axis=-1) * 60 + 100
        top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
        image[top : top + height // 3, left : left + width // 3] += generator.uniform(60, 90, 3)
        found.append(image.clip(0, 255).astype(np.uint8))
    return found
