"""What slimming tells: the report's details, and the file that says what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....models.base import OpenModel, flat_shapes
from ....models.sam_macs import encoder_macs, encoder_parameters
from ....recipes.slimsam import SlimSamSettings
from ...recovery.details import training_details
from ...recovery.loop import Trained
from .aligning import Aligned
from .choosing import Kept, Widths
from .judging import Verdict
from .records import kept_json
from .sites import encoder_sites

ATTACHMENT = "slimming.json"
_DIGITS = 6


@dataclass(frozen=True)
class Sizes:
    """How large a model is, as the report tells it.

    Attributes:
        widths: of its encoder.
        heads: of every layer.
        parameters: of the model and of its encoder.
        macs: multiply-accumulates of the model, of its encoder, and of the encoder's linears and
            convolutions alone.
    """

    widths: Widths
    heads: int
    parameters: Mapping[str, int]
    macs: Mapping[str, int]

    @classmethod
    def of(cls, model: OpenModel) -> Sizes:
        """Return the sizes of a model as it is now."""
        sites, size, shapes = encoder_sites(model.module), model.size(), flat_shapes(model.surgery)
        parameters = {"model": size.parameters, "encoder": encoder_parameters(model.config, shapes)}
        macs = {
            "model": size.macs,
            "encoder": encoder_macs(model.config, shapes),
            "encoder_linear_conv": encoder_macs(model.config, shapes, attention_products=False),
        }
        return cls(Widths.of(sites), sites.heads, parameters, macs)


def verdict_json(verdict: Verdict) -> dict[str, float | None]:
    """Return what was measured on the choice images."""
    miou = None if verdict.miou is None else _rounded(verdict.miou)
    return {"output_error": _rounded(verdict.output_error), "miou": miou}


def pruned_row(name: str, model: OpenModel, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """Return the row of a phase that pruned.

    Args:
        name: of the phase.
        model: as it is after it.
        verdict: of the same.
        seconds: that the phase took in this process.
    """
    return {
        "name": name,
        "kind": "pruning",
        "parameters": encoder_parameters(model.config, flat_shapes(model.surgery)),
        **verdict_json(verdict),
        "seconds": round(seconds, 3),
    }


def aligned_row(
    name: str, aligned: Aligned, verdict: Verdict, settings: SlimSamSettings, images: int
) -> dict[str, Any]:
    """Return the row of a phase that aligned.

    Args:
        name: of the phase.
        aligned: what it did.
        verdict: of the model after it.
        settings: of the stage.
        images: that were trained on.
    """
    steps = len(aligned.losses)
    trained = Trained(aligned.losses, aligned.rates, aligned.resumed_at, aligned.seconds_per_step)
    return {
        "name": name,
        "kind": "aligning",
        "steps": steps,
        "epochs": _rounded(steps * settings.batch_size / images),
        "batch_size": settings.batch_size,
        "training_loss": training_details(trained)["loss"],
        "choice_values": [
            [number, _rounded(value), _rounded(rate)] for number, value, rate in aligned.epochs
        ],
        "best_step": aligned.best_step,
        **verdict_json(verdict),
        "seconds": round(steps * aligned.seconds_per_step, 3),
        "resumed_at": aligned.resumed_at,
    }


def stage_details(
    settings: SlimSamSettings,
    before: Sizes,
    after: Sizes,
    *,
    images: Mapping[str, Any],
    first: Mapping[str, Any],
    phases: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the details of a finished stage.

    Args:
        settings: of the stage.
        before, after: sizes of the model.
        images: how many were scored, trained on and chosen by.
        first: what was measured of the original.
        phases: their rows.
    """
    names = ("ratio", "ranking", "slimming", "features", "rel_pos", "attn_scale", "sigma", "gradients")
    told = {name: getattr(settings, name) for name in names}
    if settings.ranking == "global":
        told["normalizer"] = settings.normalizer
    return {
        **told,
        **images,
        "heads": before.heads,
        "widths": {
            "embedding": [before.widths.embedding, after.widths.embedding],
            "head_dim": _pairs(before.widths.head_dims, after.widths.head_dims),
            "inner": _pairs(before.widths.inner, after.widths.inner),
        },
        "phases": list(phases),
        "before": dict(first),
        "parameters": {name: [count, after.parameters[name]] for name, count in before.parameters.items()},
        "macs": {name: [count, after.macs[name]] for name, count in before.macs.items()},
        "kept_file": ATTACHMENT,
    }


def slimming_document(
    kept: Kept,
    settings: SlimSamSettings,
    before: Sizes,
    after: Sizes,
    *,
    seed: int,
    images: Mapping[str, Any],
    calibration: str,
) -> dict[str, Any]:
    """Return what `slimming.json` says: what was kept, counted in the model as the stage found it.

    Args:
        kept: of the residual stream, of heads (the same channels of each) and of feed-forward networks.
        settings: of the stage.
        before, after: sizes of the model.
        seed: of the run.
        images: how many were scored, trained on and chosen by.
        calibration: content hash of the images.
    """
    return {
        "format": "compress-slimming",
        "version": 1,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "calibration": {"key": calibration, **images},
        "heads": before.heads,
        "parameters": {name: [count, after.parameters[name]] for name, count in before.parameters.items()},
        "macs": {name: [count, after.macs[name]] for name, count in before.macs.items()},
        "kept": kept_json(kept),
    }


def _pairs(before: Sequence[int], after: Sequence[int]) -> list[list[int]]:
    return [list(pair) for pair in zip(before, after, strict=True)]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
