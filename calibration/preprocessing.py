"""From decoded images to what a classifier takes: the checkpoint's own preprocessing, on the CPU.

The processors of transformers do it, in their PIL variants, so that figures are those that users of the
library get. The file that configures them comes with the checkpoint, so its numbers are bounded first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..runtime.hashes import digest
from ..runtime.strict_json import parse_object

PREPROCESSOR_FILE = "preprocessor_config.json"
MAX_SIDE = 4096
_MAX_BYTES = 2**20
_LEAST_CROP = 0.1
_HALF = 0.5
# Position embeddings and windows are laid out for one size; convolutions take any.
_ONE_SIZE = ("vit", "swin")


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """Resizes, crops, rescales and normalizes.

    Attributes:
        processor: of transformers.
        channels: 1 or 3, of the images that it takes and gives.
        size: (height, width) that the model takes; None: any.
        key: content hash of what it does.
        note: what was assumed; empty where the checkpoint says everything.
    """

    processor: Any
    channels: int
    size: tuple[int, int] | None
    key: str
    note: str = ""

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Prepare images.

        Args:
            images: each [channels, height, width] uint8.

        Returns:
            [n, channels, H, W] float32.

        Raises:
            SourceError: the result is not what the model takes.
        """
        try:
            prepared = self.processor(list(images), input_data_format="channels_first")["pixel_values"]
            pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in prepared]))
        # Whatever a processor raises for settings that do not fit together: there is no common type.
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(f"{PREPROCESSOR_FILE}: cannot prepare the images: {reason}") from error
        given = tuple(pixels.shape[1:])
        if given[0] != self.channels or (self.size is not None and given[1:] != self.size):
            wanted = [self.channels, *(self.size or ("any", "any"))]
            raise SourceError(
                f"{PREPROCESSOR_FILE}: prepares images {list(given)}, the model takes {wanted}",
                hint="correct size and crop_size there",
            )
        if not bool(pixels.isfinite().all()):
            raise SourceError(f"{PREPROCESSOR_FILE}: prepares values that are not finite")
        return pixels


def preprocessor_for(model: OpenModel) -> Preprocessor:
    """Return the preprocessing of a classifier's images: the checkpoint's, or the usual one for its size.

    Raises:
        SourceError: the checkpoint's file cannot be read, or asks for what no classifier needs.
    """
    config = model.config
    channels = int(config.get("num_channels", 3))
    if channels not in (1, 3):
        raise SourceError(f"{model.source.id}: takes images of {channels} channels; known are 1 and 3")
    size = _size(config)
    bound = size if model.family.name in _ONE_SIZE else None
    path = model.source.folder / PREPROCESSOR_FILE
    if path.is_file():
        processor, note = _own(path), ""
    else:
        processor = _usual(channels, size or (224, 224))
        shown = "x".join(map(str, size or (224, 224)))
        note = (
            f"{model.source.id}: has no {PREPROCESSOR_FILE}; images are resized to {shown} and scaled to"
            " -1 to 1"
        )
    return Preprocessor(processor, channels, bound, _key(processor, channels), note)


def _size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    given = config.get("image_size")
    if isinstance(given, int):
        return given, given
    if isinstance(given, list | tuple) and len(given) == 2:
        return int(given[0]), int(given[1])
    return None


def _own(path: Path) -> Any:
    import transformers

    _check(path)
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            str(path.parent), backend="pil", local_files_only=True, trust_remote_code=False
        )
    # Whatever the library raises for a file that it cannot use: there is no common type for it.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{path}: cannot be used: {reason}") from error


def _check(path: Path) -> None:
    """Bound the numbers of the file: memory is taken by them."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SourceError(f"{path}: larger than {_MAX_BYTES:,} bytes")
        values = parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    for key in ("size", "crop_size"):
        given = values.get(key)
        sides = given.items() if isinstance(given, dict) else [("", given)]
        for name, side in sides:
            if side is not None and not (type(side) is int and 1 <= side <= MAX_SIDE):
                where = f"{key}.{name}" if name else key
                raise SourceError(f"{path}: {where} is {side!r}, not a side of 1 to {MAX_SIDE} pixels")
    crop = values.get("crop_pct")
    if crop is not None and not (isinstance(crop, int | float) and _LEAST_CROP <= crop <= 1):
        raise SourceError(f"{path}: crop_pct is {crop!r}, not a share of {_LEAST_CROP} to 1")
    if values.get("do_pad"):
        raise SourceError(f"{path}: do_pad is not supported for classifiers", hint="set it to false")


def _usual(channels: int, size: tuple[int, int]) -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    half = [_HALF] * channels
    return ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, image_mean=half, image_std=half)


def _key(processor: Any, channels: int) -> str:
    content = {
        "processor": processor.to_dict(), "channels": channels,
        "versions": {name: version(name) for name in ("transformers", "pillow")},
    }  # fmt: skip
    return digest(content)
