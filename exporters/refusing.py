"""Layers that a format has no place for, refused with the keys of the recipe that would change that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from ..errors import PlanError
from ..runtime.manifest import QuantizedModule

Reasons = Mapping[str, Callable[[QuantizedModule], bool]]
"""What cannot be expressed and, after a semicolon, the setting to change -> whether a layer has it."""
KEEP = "KEEP"
"""Of a setting: stands for the key `keep` with the patterns of the layers concerned."""


def refuse_inexpressible(format: str, quantization: Mapping[str, QuantizedModule], reasons: Reasons) -> None:
    """Refuse layers that a format cannot express.

    Args:
        format: its name.
        quantization: of the layers, by name.
        reasons: in the order of their weight; the message tells the first that holds, the hint says what to
            set for all of them.

    Raises:
        PlanError: naming the layers and the settings to change.
    """
    told, settings = "", []
    for reason, holds in reasons.items():
        names = [name for name, scheme in quantization.items() if holds(scheme)]
        if not names:
            continue
        what, _, setting = reason.partition("; ")
        if not told:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            told = f"{format} format cannot express {what} ({listed})"
        settings.append(setting.replace(KEEP, _keep(names)))
    if told:
        raise PlanError(told, hint=f"{'; '.join(settings)}; or export with format: compress")


def _keep(names: list[str]) -> str:
    """Return the key `keep` that leaves layers out, and with them all others with the same last name."""
    return f"keep: {json.dumps(sorted({'*.' + name.rpartition('.')[2] for name in names}))}"
