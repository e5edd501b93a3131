"""Are figures that were measured again those that a report states? Torch-free.

On the machine and with the versions of the run every figure comes back to the last digit. Elsewhere sums
are rounded in another order, and samples, which are drawn step by step, carry that on. So what counts
bytes must be equal, and what compares outputs may differ by what other kernels alone do: see `_allowed`.
`compress verify FOLDER --against builtin:dit` shows it when it is run with ATEN_CPU_CAPABILITY=default,
ONEDNN_MAX_CPU_ISA=AVX2 and another number of threads than the run had: PSNR moves by less than 0.1 dB
where it is 34 dB, and by 0.7 dB where it is 50 dB. A larger difference is a failure in either direction,
because a figure that is too good does not belong to these files either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..recipes.gates import SPEEDUP

_DECIBELS = 0.5
_SSIM = 0.01
_AGREEMENT = 0.01
_PERPLEXITY_SHARE = 0.01
_KL_FLOOR = 0.002
_PERPLEXITIES = ("perplexity", "decode_perplexity", "cache_perplexity")
_PASSKEY = ("passkey", "passkey_original", "passkey_drop")
_SHARES = ("class_agreement", "accuracy", "top1_agreement", "mask_agreement", "miou")
_FRECHET_SHARE = 0.05
_FRECHET_FLOOR = 0.05
# Below the signal by this much lies what other kernels may add; beyond it there is nothing else.
_CEILING_DB = 60.0


@dataclass(frozen=True)
class Row:
    """One metric, as recorded and as measured again.

    Attributes:
        difference: measured minus recorded, None where one of them is missing.
        tolerance: the largest difference that is allowed.
        agrees: whether it is within that.
    """

    metric: str
    recorded: float | None
    measured: float | None
    difference: float | None
    tolerance: float
    agrees: bool

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Agreement:
    """All rows, and what they say together."""

    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether every recorded figure was found again, and there are any."""
        return bool(self.rows) and all(row.agrees for row in self.rows)

    @property
    def text(self) -> str:
        """What they say, in a sentence."""
        if not self.rows:
            return "the report records no figures"
        wrong = [row for row in self.rows if not row.agrees]
        if wrong:
            return "; ".join(_told(row) for row in wrong)
        unequal = [row for row in self.rows if row.difference]
        if not unequal:
            return f"{len(self.rows)} measured again, all equal"
        far = max(unequal, key=lambda row: abs(row.difference or 0.0) / (row.tolerance or 1.0))
        return (
            f"{len(self.rows)} measured again, {len(unequal)} not to the last digit; farthest: {_told(far)}"
        )


def compare_metrics(
    recorded: Mapping[str, Any],
    measured: Mapping[str, float],
    *,
    quality_samples: int | None,
    fidelity_samples: int | None = None,
    points: int = 1,
    passkey_samples: int | None = None,
) -> Agreement:
    """Hold figures against the recorded ones; what is only measured now says nothing about a record.

    A time is that of a machine, and says nothing about the files: it is held against nothing.

    Args:
        recorded: of a report.
        measured: now.
        quality_samples: that class agreement, accuracy and mIoU were counted on, None where they were not
            measured.
        fidelity_samples: the same of equal answers of classifiers, and images whose masks were compared.
        points: masks of each of these images.
        passkey_samples: the same of hidden numbers.
    """
    masks = None if fidelity_samples is None else fidelity_samples * points
    compared = {"top1_agreement": fidelity_samples, "mask_agreement": masks}
    counted = dict.fromkeys(_PASSKEY, passkey_samples) | compared
    held = (name for name in recorded if name != SPEEDUP)
    return Agreement(
        tuple(_row(name, recorded[name], measured, counted.get(name, quality_samples)) for name in held)
    )


def _row(name: str, stated: Any, measured: Mapping[str, float], samples: int | None) -> Row:
    before = stated if isinstance(stated, int | float) and not isinstance(stated, bool) else None
    now = measured.get(name)
    if before is None or now is None:
        return Row(name, before, now, None, 0.0, agrees=False)
    tolerance = _allowed(name, before, samples)
    difference = 0.0 if now == before else _capped(name, now) - _capped(name, before)
    return Row(name, before, now, difference, tolerance, agrees=abs(difference) <= tolerance)


def _capped(name: str, value: float) -> float:
    return min(value, _CEILING_DB) if "_db" in name else value


def _allowed(name: str, recorded: float, samples: int | None) -> float:
    """Return how far a metric may lie from its record; 0 for everything that is counted."""
    if "_db" in name:
        return _decibels(recorded)
    if name == "ssim":
        return _SSIM
    if name.startswith(("perplexity", "decode_perplexity", "cache_perplexity")) or name in (
        "kl",
        "decode_kl",
    ):
        return _of_text(name, recorded)
    if name in _PASSKEY or name.startswith(_SHARES):
        # A handful of samples near a decision's border; a drop is a difference of two such counts. A model
        # that segments decides, too: which of three masks it offers.
        least = max(_AGREEMENT, 3.0 / samples if samples else 0.0)
        return 2 * least if name.endswith("_drop") else least
    if name.startswith("fid"):
        return _FRECHET_SHARE * abs(recorded) + _FRECHET_FLOOR
    return 0.0


def _of_text(name: str, recorded: float) -> float:
    """Return how far a figure of next tokens may move: what a few tokens' changed roundings make of it."""
    if name.endswith("kl"):
        return _KL_FLOOR + _PERPLEXITY_SHARE * abs(recorded)
    # An increase is a quotient of two of them.
    return 2 * _PERPLEXITY_SHARE if name.endswith("_increase") else _PERPLEXITY_SHARE * abs(recorded)


def _decibels(recorded: float) -> float:
    """Return by how much an error of -60 dB that adds up in amplitude changes a ratio, in decibels.

    Next to nothing where a compression costs quality, several decibels where it costs hardly any.
    """
    share = 10 ** ((min(recorded, _CEILING_DB) - _CEILING_DB) / 20)
    return max(_DECIBELS, 20 * math.log10(1 + share))


def _told(row: Row) -> str:
    if row.measured is None:
        return f"{row.metric} was not measured again"
    if row.recorded is None:
        return f"{row.metric} is recorded as something else than a number"
    allowed = f"allowed {row.tolerance:.3g}" if row.tolerance else "must be equal"
    return f"{row.metric} is {row.measured:.6g}, recorded {row.recorded:.6g} ({allowed})"
