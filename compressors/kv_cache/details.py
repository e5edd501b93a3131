"""What the stage reports of a compressed cache, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...models.base import OpenModel, Size
from ...models.cache_bytes import cache_at_context
from ...recipes.kv_cache import CskvSettings
from ...runtime.kv import sizes
from ...runtime.kv.scheme import KvCacheScheme
from ...runtime.kv.support import Skipped
from .factorise import KvFactors, lost_share
from .ranks import SIDES, removed_shares
from .training import Trained

MOST_POINTS = 64
"""Singular values of a layer and side that are told."""


@dataclass(frozen=True)
class LayerFindings:
    """What was found for one attention.

    Attributes:
        factors: float32, on the CPU.
        variances: side -> mean squares of the outputs along their principal directions, descending, [h_kv].
        errors: side -> mean square error of the first factors on the calibration.
        trained_errors: of the trained ones, without rounding; None: there was no training.
        tokens: of the calibration.
        rounded: errors with the rounding of the cache: of the first factors, and of the trained ones where
            there was a training; None: nothing is rounded, or no sequence is as long as a group.
    """

    factors: KvFactors
    variances: Mapping[str, Tensor]
    errors: Mapping[str, float]
    trained_errors: Mapping[str, float] | None
    tokens: int
    rounded: Sequence[Mapping[str, float]] | None = None

    def trained(self, factors: KvFactors, errors: Mapping[str, float]) -> LayerFindings:
        """Return the findings with trained factors."""
        return replace(self, factors=factors, trained_errors=errors)


def described(
    model: OpenModel,
    scheme: KvCacheScheme,
    settings: CskvSettings,
    found: Mapping[str, LayerFindings],
    skipped: Sequence[Skipped],
    before: Size,
    trained: Trained | None,
    dealt: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the section `kv_cache` of the stage's details.

    Args:
        model: with the compressed cache.
        scheme: of it.
        settings: of the stage.
        found: attention -> findings.
        skipped: attentions with a plain cache.
        before: size of the model before the stage.
        trained: of the training; None: there was none.
        dealt: of the ranks by layer; None: they are equal.
    """
    item = model.spec.dtype.itemsize
    whole = cache_at_context(model.config, item, scheme)
    context = whole["tokens"]
    parameters = sizes.factor_parameters(scheme)
    return {
        "init": settings.init,
        "window": scheme.window,
        "mode": scheme.mode,
        "bits": scheme.bits,
        "key_group": scheme.key_group,
        "removed": removed_shares(scheme),
        "asked": settings.model_dump(mode="json", include={"removed", "ranks", "allocate"}),
        "bytes_per_token": {
            "before": before.kv_bytes_per_token,
            "after": float(model.size().kv_bytes_per_token or 0.0),
            "metadata": sizes.metadata_bytes_per_token(scheme),
        },
        "at_context": whole,
        "window_bytes": sizes.window_bytes(scheme, item),
        "factor_parameters": parameters,
        "factor_bytes": parameters * item,
        "break_even_tokens_one": sizes.break_even_tokens_one(scheme, item),
        "break_even_tokens": sizes.break_even_tokens(scheme, item),
        "rebuild_flops": {"tokens": context, "per_token": sizes.rebuild_flops(scheme, context)},
        "layers": [_layer(name, scheme, findings) for name, findings in found.items()],
        "skipped": [{"name": layer.name, "why": layer.why} for layer in skipped],
        "singular_values": [
            {
                "name": name,
                **{side: _singular_values(findings.variances[side]) for side in SIDES},
                "of": scheme.layers[name].width,
            }
            for name, findings in found.items()
        ],
        "allocation": None if dealt is None else dict(dealt),
        "training": None if trained is None else _training(settings, trained),
        "calibration_tokens": next(iter(found.values())).tokens,
    }


def _layer(name: str, scheme: KvCacheScheme, findings: LayerFindings) -> dict[str, Any]:
    layer = scheme.layers[name]
    after = findings.trained_errors or dict.fromkeys(SIDES)
    return {
        "name": name,
        "width": layer.width,
        "rank_k": layer.rank_k,
        "rank_v": layer.rank_v,
        "discarded_k": lost_share(findings.variances["k"], layer.rank_k),
        "discarded_v": lost_share(findings.variances["v"], layer.rank_v),
        "mse_k": findings.errors["k"],
        "mse_v": findings.errors["v"],
        "mse_k_trained": after["k"],
        "mse_v_trained": after["v"],
        **({} if scheme.bits is None else _rounded(findings)),
    }


def _rounded(findings: LayerFindings) -> dict[str, float | None]:
    """Return the errors with rounding of the factors that ship, and of the first ones of a training."""
    found: Sequence[Mapping[str, float | None]] = findings.rounded or [dict.fromkeys(SIDES)]
    told = {f"mse_{side}_rounded": found[-1][side] for side in SIDES}
    if findings.trained_errors is not None:
        told |= {f"mse_{side}_rounded_initial": found[0][side] for side in SIDES}
    return told


def _singular_values(variances: Tensor) -> list[float]:
    """Return singular values of the cache divided by the largest: all, or 64 at equal distances.

    Point i of n is the singular value number round(i * (of - 1) / (n - 1)), from 0.
    """
    count = len(variances)
    points = min(count, MOST_POINTS)
    places = [round(index * (count - 1) / max(points - 1, 1)) for index in range(points)]
    values = (variances / variances[0].clamp_min(1e-300)).sqrt()
    return [float(f"{float(values[place]):.6g}") for place in places]


def _training(settings: CskvSettings, trained: Trained) -> dict[str, Any]:
    return {
        "steps": settings.steps,
        "lr": settings.lr,
        "batch_tokens": settings.batch_tokens,
        "qat": settings.trains_through_rounding,
        "seconds": round(trained.seconds, 3),
        "kept": trained.kept,
    }
