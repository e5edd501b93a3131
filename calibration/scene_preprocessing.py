"""From decoded images to what a segmenter takes: the checkpoint's own preprocessing, on the CPU.

The processor of transformers does it, in its PIL variant, so that figures are those that users of the
library get. The numbers come with the checkpoint, so they are bounded before the processor sees them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import SourceError
from ..models.base import OpenModel
from ..runtime.hashes import digest
from ..runtime.sam_sizes import sam_encoder
from ..runtime.strict_json import parse_object
from .preprocessing import MAX_SIDE, PREPROCESSOR_FILE
from .scenes import Scene

PROCESSOR_FILE = "processor_config.json"
"""Newer folders keep the same values there, under `image_processor`; it goes first, as in the library."""
_MAX_BYTES = 2**20
_CHANNELS = 3
_SWITCHES = ("do_resize", "do_rescale", "do_normalize", "do_pad")
_RESAMPLINGS = range(6)
_LARGEST_FACTOR = 1000


@dataclass(frozen=True, eq=False)
class ScenePreprocessor:
    """Resizes by the longer side, rescales, normalizes, and fills up to a square.

    Attributes:
        processor: of transformers.
        side: of the squares that the model takes, pixels.
        source: file or model that the errors name.
        key: content hash of what it does.
        note: what was assumed; empty where the checkpoint says everything.
    """

    processor: Any = field(repr=False)
    side: int
    source: str
    key: str
    note: str = ""

    def __call__(self, image: np.ndarray) -> Scene:
        """Prepare one image.

        Args:
            image: [height, width, 3] uint8.

        Raises:
            SourceError: the result is not what the model takes.
        """
        try:
            made = self.processor(image, input_data_format="channels_last")
            pixels = torch.from_numpy(np.asarray(made["pixel_values"][0], dtype=np.float32).copy())
            height, width = (int(length) for length in made["reshaped_input_sizes"][0])
        # Whatever a processor raises for settings that do not fit together: there is no common type.
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(f"{self.source}: cannot prepare the images: {reason}") from error
        wanted = (_CHANNELS, self.side, self.side)
        if tuple(pixels.shape) != wanted:
            raise SourceError(
                f"{self.source}: prepares images {list(pixels.shape)}, the model takes {list(wanted)}",
                hint=f"correct size and pad_size there to {self.side}",
            )
        if not bool(pixels.isfinite().all()):
            raise SourceError(f"{self.source}: prepares values that are not finite")
        return Scene(pixels, (image.shape[0], image.shape[1]), (height, width))


def scene_preprocessor_for(model: OpenModel) -> ScenePreprocessor:
    """Return the preprocessing of a segmenter's images: the checkpoint's, or the usual one for its size.

    Raises:
        SourceError: the checkpoint's file cannot be read, or asks for what no segmenter needs.
    """
    encoder = sam_encoder(model.config)
    if encoder.channels != _CHANNELS:
        raise SourceError(f"{model.source.id}: takes images of {encoder.channels} channels; known are 3")
    return preprocessor_in(model.source.folder, encoder.image_size, model.source.id)


def preprocessor_in(folder: Path, side: int, name: str) -> ScenePreprocessor:
    """Return the preprocessing that a folder says, or the usual one.

    Args:
        folder: of the checkpoint.
        side: of the squares that the model takes, pixels.
        name: of the model, for errors and notes.

    Raises:
        SourceError: see `scene_preprocessor_for`.
    """
    given = _stored(folder)
    source, values = (name, {}) if given is None else (str(given[0]), given[1])
    settings = _checked(source, values, side)
    note = ""
    if given is None:
        note = (
            f"{name}: has no {PREPROCESSOR_FILE}; images are resized to a longer side of {side} pixels and"
            " normalized with the means of ImageNet"
        )
    key = digest([settings, side, {package: version(package) for package in ("transformers", "pillow")}])
    return ScenePreprocessor(_processor(source, settings), side, source, key, note)


def _stored(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the file that says what is done, and what it says; None: there is none."""
    nested = _object(folder / PROCESSOR_FILE).get("image_processor")
    if isinstance(nested, Mapping):
        return folder / PROCESSOR_FILE, nested
    path = folder / PREPROCESSOR_FILE
    return (path, _object(path)) if path.is_file() else None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SourceError(f"{path}: larger than {_MAX_BYTES:,} bytes")
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


def _checked(source: str, values: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Return what a processor is made of, every value of which has been looked at; the rest is left out.

    Raises:
        SourceError: memory would be taken by a number, or images would become something else.
    """
    settings: dict[str, Any] = {name: _switch(source, values, name) for name in _SWITCHES}
    if values.get("do_center_crop"):
        raise SourceError(f"{source}: do_center_crop is not supported for segmenters", hint="set it to false")
    size = values.get("size", {"longest_edge": side})
    if not isinstance(size, Mapping) or set(size) != {"longest_edge"}:
        raise SourceError(f"{source}: size is {size!r}; needed: {{'longest_edge': {side}}}")
    pad = values.get("pad_size", {"height": side, "width": side})
    if not isinstance(pad, Mapping) or set(pad) != {"height", "width"}:
        raise SourceError(f"{source}: pad_size is {pad!r}; needed: height and width {side}")
    settings["size"] = {"longest_edge": _side(source, "size.longest_edge", size["longest_edge"])}
    settings["pad_size"] = {key: _side(source, f"pad_size.{key}", pad[key]) for key in ("height", "width")}
    for name in ("image_mean", "image_std"):
        if values.get(name) is not None:
            settings[name] = _each_channel(source, name, values[name])
    factor = values.get("rescale_factor")
    if factor is not None:
        settings["rescale_factor"] = _number(source, "rescale_factor", factor)
        if not 0 < settings["rescale_factor"] <= _LARGEST_FACTOR:
            raise SourceError(
                f"{source}: rescale_factor is {factor!r}, not above 0 and at most {_LARGEST_FACTOR}"
            )
    resample = values.get("resample")
    if resample is not None:
        if type(resample) is not int or resample not in _RESAMPLINGS:
            raise SourceError(f"{source}: resample is {resample!r}, not a number of 0 to 5")
        settings["resample"] = resample
    return settings


def _switch(source: str, values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, True)
    if value is None:
        return True
    if not isinstance(value, bool):
        raise SourceError(f"{source}: {name} is {value!r}, not true or false")
    return value


def _side(source: str, where: str, value: Any) -> int:
    if type(value) is int and 1 <= value <= MAX_SIDE:
        return value
    raise SourceError(f"{source}: {where} is {value!r}, not a side of 1 to {MAX_SIDE} pixels")


def _number(source: str, where: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise SourceError(f"{source}: {where} is {value!r}, not a finite number")


def _each_channel(source: str, name: str, value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != _CHANNELS:
        raise SourceError(f"{source}: {name} is {value!r}, not {_CHANNELS} numbers")
    numbers = [_number(source, name, part) for part in value]
    if name == "image_std" and min(numbers) <= 0:
        raise SourceError(f"{source}: image_std is {value!r}; each must be above 0")
    return numbers


def _processor(source: str, settings: Mapping[str, Any]) -> Any:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    try:
        return SamImageProcessorPil(**settings)
    # Whatever the library raises for values that do not fit together: there is no common type for it.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{source}: cannot be used: {reason}") from error
