"""Measures of how close two tensors are: power of the error, decibels, structural similarity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

PERFECT_DB = 200.0
"""What a decibel measure is capped at: equal tensors would be infinite, which JSON cannot hold."""


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise), within +-`PERFECT_DB`.

    Args:
        signal: power, not negative.
        noise: power, not negative; 0 gives `PERFECT_DB`.
    """
    if noise <= 0.0:
        return PERFECT_DB
    if signal <= 0.0:
        return -PERFECT_DB
    return max(-PERFECT_DB, min(PERFECT_DB, 10.0 * math.log10(signal / noise)))


def powers(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Return (sum of reference^2, sum of (other - reference)^2) in float64.

    Args:
        reference: any shape, float.
        other: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes {tuple(reference.shape)} and {tuple(other.shape)} differ")
    exact = reference.double()
    return float(exact.square().sum()), float((other.double() - exact).square().sum())


def _gaussian(size: int, sigma: float) -> Tensor:
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    return weights / weights.sum()


def _blur(images: Tensor, window: Tensor) -> Tensor:
    channels = images.shape[1]
    rows = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return functional.conv2d(functional.conv2d(images, rows, groups=channels), columns, groups=channels)


def ssim(reference: Tensor, other: Tensor, data_range: float) -> float:
    """Return the structural similarity (Wang et al. 2004), the mean over positions and images.

    Gaussian window of 11 pixels with sigma 1.5 (the largest odd window that fits, on images smaller
    than that), K1 = 0.01, K2 = 0.03, population moments, windows inside the image only.

    Args:
        reference: [n, C, H, W] float.
        other: the same shape.
        data_range: largest minus smallest value that an image can take.

    Returns:
        A value in -1..1; 1 for equal images.
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes {tuple(reference.shape)} and {tuple(other.shape)} differ")
    smallest_side = min(reference.shape[-2:])
    window = _gaussian(min(11, smallest_side - (smallest_side + 1) % 2), 1.5)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    a, b = reference.double(), other.double()
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    variance_a = _blur(a * a, window) - mean_a.square()
    variance_b = _blur(b * b, window) - mean_b.square()
    covariance = _blur(a * b, window) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float((luminance * structure).mean())
