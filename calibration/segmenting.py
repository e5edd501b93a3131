"""What a Segment Anything model says of an image: its embedding, and masks for points."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .scenes import Scene

MOST_POINTS = 64
"""Points that the decoder answers at a time."""
_ELEMENTS = 2**25
"""Values of masks that are enlarged at a time: 128 MiB of float32."""


@torch.no_grad()
def embeddings(module: nn.Module, pixels: Tensor) -> Tensor:
    """Return what the image encoder makes of images.

    Args:
        module: a `SamModel`, stock or cut.
        pixels: [b, 3, S, S] float32.

    Returns:
        [b, channels, s, s] float32, on the model's device.
    """
    encoder: nn.Module = module.get_submodule("vision_encoder")
    reference = next(encoder.parameters())
    output: Tensor = encoder(pixels.to(reference.device, reference.dtype)).last_hidden_state
    return output.float()


@torch.no_grad()
def best_masks(module: nn.Module, embedding: Tensor, scene: Scene, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask for each point that the model itself rates best of its three.

    The library's post-processing: logits are enlarged to the model's input, cut to what the image covers of
    it, brought to the size of the image and cut off at 0.

    Args:
        module: a `SamModel`.
        embedding: [channels, s, s] of the image, by this encoder or another one.
        scene: the image.
        points: [n, 2] float32 (x, y), in pixels of the image as stored; every point asks for one object.

    Returns:
        Masks [n, height, width] bool and the ratings [n] float32, on the CPU.
    """
    if not len(points):
        return torch.zeros(0, *scene.size, dtype=torch.bool), torch.zeros(0)
    reference = next(module.parameters())
    whole = embedding[None].to(reference.device, reference.dtype)
    asked = scene.points(points.float())
    masks, scores = [], []
    for part in asked.split(MOST_POINTS):
        rated, logits = module(
            image_embeddings=whole,
            # In float32 whatever the weights are: half precision has no room for pixels.
            input_points=part[None, :, None].to(reference.device),
            multimask_output=True,
            return_dict=False,
        )[:2]
        score, best = rated[0].float().max(dim=-1)
        masks.append(_full_size(logits[0].float()[torch.arange(len(part)), best], scene))
        scores.append(score.cpu())
    return torch.cat(masks), torch.cat(scores)


def _full_size(logits: Tensor, scene: Scene) -> Tensor:
    """Return masks in the size of the image: [n, s, s] float32 -> [n, height, width] bool on the CPU."""
    side = scene.pixels.shape[-2:]
    height, width = scene.resized
    at_once = max(1, _ELEMENTS // max(side.numel(), scene.size[0] * scene.size[1]))
    masks = []
    for part in logits[:, None].split(at_once):
        enlarged = interpolate(part, tuple(side), mode="bilinear", align_corners=False)
        shown = interpolate(enlarged[..., :height, :width], scene.size, mode="bilinear", align_corners=False)
        masks.append((shown[:, 0] > 0).cpu())
    return torch.cat(masks)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union of masks, pair by pair; of two empty masks 1.

    Args:
        a: [n, height, width] bool.
        b: of the same shape.

    Returns:
        [n] float32, 0 to 1.
    """
    both = (a & b).flatten(1).sum(dim=1)
    either = (a | b).flatten(1).sum(dim=1)
    return torch.where(either > 0, both / either.clamp_min(1), 1.0).float()


def random_points(scene: Scene, count: int, generator: torch.Generator) -> Tensor:
    """Draw points of an image, every pixel as likely as another.

    Args:
        scene: the image.
        count: how many.
        generator: on the CPU.

    Returns:
        [count, 2] float32 (x, y), in pixels of the image as stored.
    """
    height, width = scene.size
    x = torch.randint(width, (count,), generator=generator)
    y = torch.randint(height, (count,), generator=generator)
    return torch.stack([x, y], dim=1).float()
