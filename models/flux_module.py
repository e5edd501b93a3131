"""Flux's denoiser, called as all denoisers here are: with images, and timesteps from 0 to 1000.

The stock class takes tokens of two by two pixels, where these lie, and times from 0 to 1; its pipeline
makes them. Called with tokens, this class is the stock class.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel as StockFlux
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

_AXES = 3
_TIMES = 1000


class FluxTransformer2DModel(StockFlux):
    """The stock class, which also takes images; its name is that class's, which checkpoints carry."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Predict the velocity.

        Args:
            hidden_states: images [b, C, H, W] with H and W even, or what the stock class takes.
            args: of the stock class; none with images.
            kwargs: of the stock class. With images: `timestep` [b] from 0 to 1000, no `img_ids` and no
                `txt_ids`.

        Returns:
            As the stock class; of images images.
        """
        if hidden_states.ndim != 4:
            return super().forward(hidden_states, *args, **kwargs)
        whole = kwargs.pop("return_dict", True)
        height, width = hidden_states.shape[-2:]
        like = hidden_states
        # As the stock pipeline: the time is rounded to the type of the arithmetic before it is divided.
        kwargs["timestep"] = kwargs["timestep"].to(like.dtype) / _TIMES
        text = kwargs["encoder_hidden_states"].shape[1]
        ids = {"img_ids": image_ids(height, width, like), "txt_ids": text_ids(text, like)}
        output = super().forward(packed(hidden_states), *args, return_dict=False, **kwargs, **ids)[0]
        image = unpacked(output, height, width)
        return Transformer2DModelOutput(sample=image) if whole else (image,)


def packed(images: Tensor) -> Tensor:
    """Return the tokens of images: [b, C, H, W] to [b, (H/2)(W/2), 4C]."""
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the images that tokens are of: the inverse of `packed`."""
    batch, _, channels = tokens.shape
    cells = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, channels // 4, height, width)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return where tokens lie: [(H/2)(W/2), 3], of which the first number is 0."""
    rows = torch.arange(height // 2, device=like.device, dtype=like.dtype)
    columns = torch.arange(width // 2, device=like.device, dtype=like.dtype)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).view(-1, _AXES)


def text_ids(tokens: int, like: Tensor) -> Tensor:
    """Return where the text lies: [tokens, 3] zeros."""
    return torch.zeros(tokens, _AXES, device=like.device, dtype=like.dtype)
