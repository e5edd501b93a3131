"""What a denoiser's images look like before it cuts them into tokens, from its config alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SourceError
from ..runtime import config_flux, config_hunyuan

PIXELS_PER_LATENT = 8
"""Along a side; the autoencoders of all these models halve three times."""
USUAL_PIXELS = 1024
"""Side of the images of models whose config names none."""
_PACKED_SIDE = 2


def any_size(config: Mapping[str, Any]) -> bool:
    """Tell whether the config leaves open how large the images are.

    Args:
        config: completed, with `_class_name`.
    """
    return bool(config["_class_name"] == config_flux.CLASS_NAME)


def latent_shape(config: Mapping[str, Any], pixels: int | None = None) -> tuple[int, int, int]:
    """Return (channels, height, width) of what is denoised.

    Args:
        config: completed, with `_class_name`.
        pixels: side of the image, of models of any size; None: `USUAL_PIXELS`.
    """
    if any_size(config):
        side = (pixels or USUAL_PIXELS) // PIXELS_PER_LATENT
        return int(config["in_channels"]) // config_flux.PACKED, side, side
    side = int(config["sample_size"])
    return int(config["in_channels"]), side, side


def check_latents(config: Mapping[str, Any], shape: Sequence[int], place: object, model_id: str) -> None:
    """Refuse items that a model cannot see.

    Args:
        config: completed, with `_class_name`.
        shape: of an item.
        place: where it lies, for the message.
        model_id: of the model, for the message.

    Raises:
        SourceError: they have other channels or another size.
    """
    wanted: list[Any] = list(latent_shape(config))
    if any_size(config):
        if len(shape) == len(wanted) and shape[1] == shape[2] and shape[1] % _PACKED_SIDE == 0:
            wanted = [wanted[0], *shape[1:]]
        else:
            wanted = [wanted[0], "side", "side"]
    if list(shape) != wanted:
        takes = ", ".join(map(str, wanted))
        even = " of an even side" if "side" in wanted else ""
        raise SourceError(
            f"{place}: an item is {list(shape)}, and {model_id} takes [{takes}]{even}",
            hint="encode images of the model's size with the model's own VAE",
        )


def tokens_of(config: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Return how many tokens an image is cut into.

    Args:
        config: completed, with `_class_name`.
        shape: of the image, [..., height, width].
    """
    patch = _PACKED_SIDE if any_size(config) else int(config["patch_size"])
    return int(shape[-2] // patch) * int(shape[-1] // patch)


def learns_variance(config: Mapping[str, Any]) -> bool:
    """Tell whether a denoiser has further channels, for its variance.

    Args:
        config: completed, with `_class_name`.
    """
    if config["_class_name"] == config_hunyuan.CLASS_NAME:
        return bool(config["learn_sigma"])
    if any_size(config):
        return False
    return int(config["out_channels"] or config["in_channels"]) == 2 * int(config["in_channels"])
