"""Two thin factors for one weight: in closed form, as published, or at random. Functions on tensors.

Notation as of linear layers: a weight is [h_kv, h] and computes k = x weight^T. Its factors are a [r, h] and
b [h_kv, r]: c = x a^T is what the cache keeps of a token, and c b^T stands for k. Biases are no part of it;
they are added after b.

CSKV (arXiv 2409.10593) starts from `asvd` and trains. `whiten` is the optimum of what it trains for: the
least mean square of k - c b^T on the calibration. It is the projection of k on its r principal directions,
and so needs no inverse: of inputs that span less than h channels the optimum is found as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import StageError
from ...runtime.linear import QuantizedLinear
from .energies import Energy

Init = Literal["whiten", "asvd", "svd", "random"]
MAGNITUDE_FLOOR = 1e-6
"""Added to the mean magnitude of a channel, as published."""
_NEGLIGIBLE = 1e-12
"""A variance this small, relative to the largest, is rounding."""


@dataclass(frozen=True)
class Pair:
    """The factors of one weight.

    Attributes:
        a: [r, h] float32.
        b: [h_kv, r] float32.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class KvFactors:
    """The factors of one attention."""

    k: Pair
    v: Pair

    def tensors(self) -> dict[str, Tensor]:
        """Return them by their names in a checkpoint."""
        return {"k_a": self.k.a, "k_b": self.k.b, "v_a": self.v.a, "v_b": self.v.b}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> KvFactors:
        """Undo `tensors`."""
        return cls(Pair(tensors["k_a"], tensors["k_b"]), Pair(tensors["v_a"], tensors["v_b"]))


@dataclass(frozen=True)
class Spectrum:
    """The outputs of a weight on the calibration, by principal directions.

    Attributes:
        variances: mean squares along them, descending, [h_kv] float64; their sum is that of all outputs.
        directions: [h_kv, h_kv] float64, a direction a column.
    """

    variances: Tensor
    directions: Tensor

    def lost_shares(self) -> list[float]:
        """Return `lost_share` of every rank from 1 to h_kv."""
        variances = self.variances.cpu()
        return [lost_share(variances, rank) for rank in range(1, len(variances) + 1)]


def lost_share(variances: Tensor, rank: int) -> float:
    """Return the share (0-1) of the variance that no factors of this rank can give back.

    Args:
        variances: along the principal directions, descending, [h_kv].
        rank: 1 to h_kv.
    """
    whole = float(variances.sum())
    return float(variances[rank:].sum()) / whole if whole > 0 else 0.0


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """Return the weight that acts on a layer's input, [out, in] float64; a quantized one as it computes.

    Raises:
        StageError: the layer is of a kind whose weight is not known.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.equivalent_weight().double()
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().double()
    raise StageError(f"{name}: a {type(layer).__name__} has no weight that can be factorised")


def spectrum_of(weight: Tensor, gram: Tensor) -> Spectrum:
    """Return the principal directions of a weight's outputs.

    Args:
        weight: [h_kv, h] float64.
        gram: mean of x^T x, [h, h] float64.
    """
    covariance = weight @ gram @ weight.T
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return Spectrum(values.flip(0).clamp_min(0.0), vectors.flip(1))


def whitened(weight: Tensor, spectrum: Spectrum, rank: int) -> Pair:
    """Return the factors with the least mean square error on the calibration.

    With G = L L^T the mean of x^T x, and U S V^T the singular value decomposition of L^T weight^T, the
    optimum is a^T = L^-T U_r S_r^(1/2) and b^T = S_r^(1/2) V_r^T. Since L^-T U_r S_r = weight^T V_r, it is
    computed from V alone; S is the root of the variance along V. The error is what is left of S^2, summed.
    """
    kept = spectrum.variances[:rank]
    root = torch.where(kept > _NEGLIGIBLE * spectrum.variances[0], kept, 1.0) ** 0.25
    directions = spectrum.directions[:, :rank]
    return _pair((directions / root).T @ weight, directions * root)


def scaled(weight: Tensor, scale: Tensor, rank: int) -> Pair:
    """Return the factors of ASVD: U S V^T = svd(diag(scale) weight^T) (arXiv 2409.10593).

    a^T = diag(scale)^-1 U_r S_r^(1/2) and b^T = S_r^(1/2) V_r^T.

    Args:
        weight: [h_kv, h] float64.
        scale: [h] float64, above 0; a constant factor changes a and b, not their product.
        rank: r.
    """
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    root = values[:rank].sqrt()
    return _pair(root[:, None] * right[:rank] / scale, left[:, :rank] * root)


def asvd_scale(magnitude: Tensor, alpha: float) -> Tensor:
    """Return the scale of input channels: (mean |x| + 1e-6)^alpha, [h]."""
    scale: Tensor = (magnitude + MAGNITUDE_FLOOR) ** alpha
    return scale


def random_pair(weight: Tensor, rank: int, generator: torch.Generator) -> Pair:
    """Return factors as linear layers start: uniform within 1 / sqrt(inputs)."""
    a = torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1
    b = torch.rand(weight.shape[0], rank, generator=generator) * 2 - 1
    found = _pair(a / weight.shape[1] ** 0.5, b / rank**0.5)
    return Pair(found.a.to(weight.device), found.b.to(weight.device))


def factorise(
    weight: Tensor,
    energy: Energy,
    spectrum: Spectrum,
    rank: int,
    init: Init,
    *,
    alpha: float,
    generator: torch.Generator,
) -> Pair:
    """Return the factors of one weight that a recipe asks for.

    Args:
        weight: [h_kv, h] float64.
        energy: of the attention's input.
        spectrum: of the weight's outputs.
        rank: r, 1 to h_kv.
        init: how.
        alpha: of asvd.
        generator: of random.
    """
    if init == "whiten":
        return whitened(weight, spectrum, rank)
    if init == "asvd":
        return scaled(weight, asvd_scale(energy.magnitude, alpha), rank)
    if init == "svd":
        return scaled(weight, torch.ones_like(energy.magnitude), rank)
    return random_pair(weight, rank, generator)


def mean_square_error(weight: Tensor, pair: Pair, gram: Tensor) -> float:
    """Return the mean square of k - c b^T over tokens and channels, from the second moments alone.

    Args:
        weight: [h_kv, h] float64.
        pair: its factors.
        gram: mean of x^T x, [h, h] float64.
    """
    missing = weight - pair.b.double() @ pair.a.double()
    return float(((missing @ gram) * missing).sum()) / len(weight)


def _pair(a: Tensor, b: Tensor) -> Pair:
    return Pair(a.float().contiguous(), b.float().contiguous())
