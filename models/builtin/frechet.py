"""The Frechet distance between two sets of features, seen as Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [d] and the sample covariance [d, d] of features [n, d], in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _symmetric_root(matrix: Tensor) -> Tensor:
    # Rounding makes the smallest eigenvalues of a covariance slightly negative.
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    return root


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Return the squared Frechet distance of two Gaussians (FID, arXiv 1706.08500 eq. 6).

    tr((A B)^(1/2)) is computed as the trace of the symmetric (A^(1/2) B A^(1/2))^(1/2), which has
    the same eigenvalues and needs no general matrix square root.

    Args:
        mean_a, mean_b: [d] float.
        covariance_a, covariance_b: [d, d] float, symmetric.
    """
    root = _symmetric_root(covariance_a.double())
    product = root @ covariance_b.double() @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0.0)
    shift = (mean_a.double() - mean_b.double()).square().sum()
    spread = covariance_a.double().trace() + covariance_b.double().trace() - 2 * eigenvalues.sqrt().sum()
    return float((shift + spread).clamp_min(0.0))
