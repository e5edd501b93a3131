"""Measures of how close two outputs are, as functions on tensors; no models, no files."""

from __future__ import annotations

from torch import Tensor

from ..calibration.similarity import PERFECT_DB, decibels, powers, ssim
from ..models.builtin.frechet import frechet_distance, moments

__all__ = [
    "PERFECT_DB", "class_agreement", "decibels", "frechet_distance", "moments", "powers", "psnr_db",
    "sqnr_db", "ssim",
]  # fmt: skip


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: 10 log10(sum r^2 / sum (o - r)^2)."""
    return decibels(*powers(reference, other))


def psnr_db(reference: Tensor, other: Tensor, data_range: float) -> float:
    """Return the peak signal-to-noise ratio in dB, the mean over the images.

    Args:
        reference: [n, C, H, W] float.
        other: the same shape.
        data_range: largest minus smallest value that an image can take.
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes {tuple(reference.shape)} and {tuple(other.shape)} differ")
    errors = (other.double() - reference.double()).square().flatten(1).mean(dim=1)
    return sum(decibels(data_range**2, float(error)) for error in errors) / len(errors)


def class_agreement(predicted: Tensor, wanted: Tensor) -> float:
    """Return the fraction of equal labels, 0-1.

    Args:
        predicted: [n] int64.
        wanted: [n] int64.
    """
    if predicted.shape != wanted.shape:
        raise ValueError(f"{len(predicted)} labels for {len(wanted)} conditions")
    return float((predicted == wanted).double().mean())
