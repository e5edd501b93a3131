"""Hunyuan-DiT, called as all denoisers here are: without what follows from the size of the image.

The stock class takes rotations by place, sizes and a style, which its pipeline makes. What is given is
passed on; what is not, is made here as there.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanDiT2DModel as StockHunyuan
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor

from .latent_sizes import PIXELS_PER_LATENT

_GRID_PIXELS = 512
"""Side of the image that the grid of places was trained on; larger ones are as fine as they are large."""
_ORIGINAL_PIXELS = 1024


class HunyuanDiT2DModel(StockHunyuan):
    """The stock class with its pipeline's defaults; its name is that class's, which checkpoints carry."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
        """Predict, as the stock class.

        Args:
            hidden_states: [b, C, H, W], square.
            timestep: [b] of any type; it takes that of the images, as the stock pipeline has it.
            kwargs: of the stock class; `image_rotary_emb`, `image_meta_size` and `style` are made where they
                are not given.
        """
        side, patch, like = hidden_states.shape[-1], int(self.config.patch_size), hidden_states
        if kwargs.get("image_rotary_emb") is None:
            kwargs["image_rotary_emb"] = rotations(int(self.config.attention_head_dim), side, patch, like)
        if self.config.use_style_cond_and_image_meta_size:
            if kwargs.get("image_meta_size") is None:
                kwargs["image_meta_size"] = sizes(side, len(like)).to(like)
            if kwargs.get("style") is None:
                kwargs["style"] = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        return super().forward(hidden_states, timestep.to(like.dtype), **kwargs)


def rotations(head_dim: int, side: int, patch: int, like: Tensor) -> Tensor:
    """Return cosines and sines of the places of a square image: [2, tokens, head_dim] float32.

    Args:
        head_dim: channels of a head.
        side: of the latent.
        patch: side of a token.
        like: gives the device.
    """
    cells, base = side // patch, _GRID_PIXELS // PIXELS_PER_LATENT // patch
    # Of a square image the whole grid of the base size is taken, however many cells it is cut into.
    pair = get_2d_rotary_pos_embed(
        head_dim, ((0, 0), (base, base)), (cells, cells), device=like.device, output_type="pt"
    )
    return torch.stack(list(pair))


def sizes(side: int, batch: int) -> Tensor:
    """Return what the model is told of whole square images: [batch, 6] float32.

    Args:
        side: of the latent.
        batch: images.
    """
    pixels = side * PIXELS_PER_LATENT
    row = torch.tensor([_ORIGINAL_PIXELS, _ORIGINAL_PIXELS, pixels, pixels, 0, 0], dtype=torch.float32)
    return row.repeat(batch, 1)
