"""What stops code that does not know us from opening a folder of ours in transformers. Torch-free.

config.json names a file of weights that is none. transformers looks at that name before it builds or reads
anything, and refuses with it, whatever it was told to ignore; our quantizer is asked before that, and takes
it away. The library's own `save_pretrained` drops the key: of a folder that it wrote again, tensors of other
sizes than the config's are the only stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SourceError

STOP_KEY = "transformers_weights"
STOP_TEXT = "compress has to be imported first, or load the folder with compress.load"
_PARTS = ("vision_config",)
"""Parts of a config that a stock class of its own reads alone, which opens the same folder."""


def stopped(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that stock code refuses, in the parts that it reads alone, too."""
    parts = {key: {**config[key], STOP_KEY: STOP_TEXT} for key in _PARTS if isinstance(config.get(key), dict)}
    return {**config, **parts, STOP_KEY: STOP_TEXT}


def without_stop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it was before `stopped`."""
    parts = {key: _without(config[key]) for key in _PARTS if isinstance(config.get(key), dict)}
    return {**_without(config), **parts}


def check_stops(config: Mapping[str, Any], where: str) -> None:
    """Check what a config says under `STOP_KEY`, where it says anything.

    Raises:
        SourceError: something else than what we write.
    """
    _check(config.get(STOP_KEY), where)
    for key in _PARTS:
        if isinstance(config.get(key), dict):
            _check(config[key].get(STOP_KEY), f"{where}: {key}")


def take_stops(config: Any, where: str) -> None:
    """Take the names away from a config object of the library, in place.

    Raises:
        SourceError: one is something else than what we write.
    """
    for part, place in [
        (config, where),
        *((getattr(config, key, None), f"{where}: {key}") for key in _PARTS),
    ]:
        if part is not None and not isinstance(part, dict):
            _check(vars(part).pop(STOP_KEY, None), place)


def _check(value: object, where: str) -> None:
    if value is not None and value != STOP_TEXT:
        raise SourceError(
            f"{where}: {STOP_KEY} {value!r} is not what compress writes", hint="export the folder again"
        )


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != STOP_KEY}
