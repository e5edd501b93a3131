"""Tiny encoders whose channels are of very different worth, and images for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from compress.progress import SilentProgress
from torch import Tensor

from ....tiny_sam import pictures, tiny_sam

QUIET = SilentProgress()


class Shown:
    """Pixels in a fixed order, as `Scenes` gives them; reading may be broken off, and is noted.

    Args:
        pixels: [n, 3, S, S] float32.
        stop_at: place at which reading is interrupted.
    """

    def __init__(self, pixels: Tensor, stop_at: int | None = None) -> None:
        self._pixels, self._stop_at = pixels, stop_at
        self.seen: list[int] = []
        self.key = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._pixels)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        if self._stop_at in indices:
            raise KeyboardInterrupt
        self.seen += indices
        return self._pixels[list(indices)]


def shown(count: int = 4, seed: int = 0, stop_at: int | None = None, side: int = 64) -> Shown:
    """Return some pictures, normalized as a checkpoint would."""
    images = torch.from_numpy(np.stack(pictures(count, side, side, seed))).permute(0, 3, 1, 2)
    return Shown(images.float().sub(110.0).div(58.0).contiguous(), stop_at)


def heavy_tailed(seed: int = 0, **vision: Any) -> Any:
    """Return a tiny model: inner channels, channels of heads and of the residual stream differ in scale."""
    module = tiny_sam(seed, **vision)
    generator = torch.Generator().manual_seed(seed)

    def scales(count: int, spread: float) -> Tensor:
        return (spread * torch.randn(count, generator=generator)).exp()

    encoder = module.vision_encoder
    with torch.no_grad():
        stream = scales(encoder.patch_embed.projection.out_channels, 0.7)
        for layer in encoder.layers:
            layer.mlp.lin2.weight.mul_(scales(layer.mlp.lin2.in_features, 1.5))
            layer.attn.proj.weight.mul_(scales(layer.attn.proj.in_features, 1.0))
            layer.mlp.lin2.weight.mul_(stream[:, None])
            layer.attn.proj.weight.mul_(stream[:, None])
    return module


def opened(module: Any) -> Any:
    """Return what scores look at of an open model."""
    return SimpleNamespace(module=module)


def embed(module: Any, pixels: Tensor) -> Tensor:
    """Return the encoder's output, [b, channels, side, side]."""
    with torch.no_grad():
        found: Tensor = module.vision_encoder(pixels).last_hidden_state
    return found


def ranks(values: Tensor) -> Tensor:
    """Return the place of every value in their order, float64."""
    return values.argsort(stable=True).argsort(stable=True).double()


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the correlation of ranks."""
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])
