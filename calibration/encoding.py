"""Images to what a denoiser sees: latents of the VAE beside it, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..models.hub import fetch
from ..models.vae import NAME, vae_beside, vae_hashes
from .decoding import Unreadable, decode
from .image_files import Images, TensorFile
from .image_rows import row_pixels
from .seeds import generator_for, normal_rows

_PIXEL_CHANNELS = (1, 3)


@dataclass(frozen=True, eq=False)
class PixelEncoder:
    """A model that sees pixels, in [-1, 1].

    Attributes:
        channels: of the images.
        side: height and width.
    """

    channels: int
    side: int
    key: str = "pixels"

    def __call__(self, pixels: Tensor, first: int) -> Tensor:
        """Return the pixels."""
        return pixels


@dataclass(frozen=True, eq=False)
class VaeEncoder:
    """A VAE of diffusers: a draw from what it says of each image, shifted and scaled as denoisers see it.

    Attributes:
        vae: `AutoencoderKL`, float32.
        side: height and width of the images.
        key: content hash of its files.
        seed: of the draws.
    """

    vae: Any
    side: int
    key: str
    seed: int
    channels: int = 3

    @torch.no_grad()
    def __call__(self, pixels: Tensor, first: int) -> Tensor:
        """Return [b, C, H, W] float32 on the CPU.

        Args:
            pixels: [b, 3, height, width] in [-1, 1].
            first: number of the first image; what is drawn for an image depends on its number alone.
        """
        found = self.vae.encode(pixels.to(self.vae.device)).latent_dist
        mean, spread = found.mean.float().cpu(), found.std.float().cpu()
        generators = (generator_for(self.seed, "encode", first + row) for row in range(len(mean)))
        noise = normal_rows(mean.shape[1:], generators)
        shift = float(self.vae.config.get("shift_factor") or 0.0)
        scaled: Tensor = (mean + spread * noise - shift) * float(self.vae.config.scaling_factor)
        return scaled


Encoder = PixelEncoder | VaeEncoder


def sees_pixels(model: OpenModel) -> bool:
    """Tell whether a denoiser sees images themselves: it has their channels, and no VAE beside it."""
    return int(model.config["in_channels"]) in _PIXEL_CHANNELS and _vae_folder(model) is None


def encoder_for(model: OpenModel, seed: int) -> Encoder:
    """Return what turns images into the model's inputs.

    Raises:
        SourceError: the model sees latents, and there is no VAE beside it that can be read.
    """
    channels = int(model.config["in_channels"])
    if sees_pixels(model):
        return PixelEncoder(channels, int(model.config["sample_size"]))
    folder = _vae_folder(model)
    if folder is None:
        raise SourceError(
            f"{model.source.id}: sees latents of {channels} channels, and there is no {NAME}/ beside the"
            " denoiser to encode images with",
            hint="give the whole pipeline folder, or set calibration.data.latents to encoded ones",
        )
    vae = _load(folder).to(next(model.module.parameters()).device)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    key = " ".join(vae_hashes(folder))
    return VaeEncoder(vae, int(model.config["sample_size"]) * scale, key, seed)


def _vae_folder(model: OpenModel) -> Path | None:
    if model.source.revision is not None:
        patterns = (f"{NAME}/config.json", f"{NAME}/diffusion_pytorch_model.safetensors")
        fetched = fetch(model.source.id, model.source.revision, patterns, ()) / NAME
        return fetched if fetched.is_dir() else None
    return vae_beside(model.source.folder)


def _load(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    try:
        vae: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"{folder}: cannot be loaded as a VAE: {reason}") from None
    return vae.float().eval().requires_grad_(False)


def read_pixels(source: Images, rows: Sequence[int], encoder: Encoder) -> Tensor:
    """Return images as an encoder takes them: [b, channels, side, side] float32 in [-1, 1].

    The short side is resized to the encoder's, then the middle is taken.

    Raises:
        SourceError: an image cannot be read.
    """
    try:
        if isinstance(source, TensorFile):
            images = row_pixels(source, rows, encoder.channels)
        else:
            images = [decode(source.paths[row], encoder.channels) for row in rows]
    except Unreadable as error:
        raise SourceError(str(error), hint="remove the file, or give images that can be read") from None
    planes = np.stack([_squared(image, encoder.side) for image in images])
    return torch.from_numpy(planes).float() / 127.5 - 1.0


def _squared(image: np.ndarray, side: int) -> np.ndarray:
    """Return the middle of an image, [channels, side, side] uint8."""
    _, height, width = image.shape
    if (height, width) == (side, side):
        return image
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    grey = image.shape[0] == 1
    drawn = Image.fromarray(image[0] if grey else np.ascontiguousarray(image.transpose(1, 2, 0)))
    resized = np.asarray(drawn.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))
    planes = resized[None] if grey else resized.transpose(2, 0, 1)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return np.ascontiguousarray(planes[:, top : top + side, left : left + side])
