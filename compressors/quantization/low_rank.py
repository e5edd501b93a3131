"""A 16-bit branch for the largest directions of a weight (SVDQuant, arXiv 2411.05007).

W = up down + rest: the branch carries what makes the range of the grid wide, the grid carries the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(weight: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the best branch of a weight under the Frobenius norm.

    Args:
        weight: float32 [out, in].
        rank: of the branch, at most min(out, in).
        dtype: in which the branch is stored; the rest must be computed from the rounded branch.

    Returns:
        down [rank, in] and up [out, rank], both in `dtype`, each with half of the singular values.
    """
    tall = weight.shape[0] >= weight.shape[1]
    # The eigenvectors of the smaller Gram matrix: many times faster than a full SVD, same subspace.
    gram = (weight.t() @ weight if tall else weight @ weight.t()).double()
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors[:, -rank:].flip(-1).float()
    root = values[-rank:].flip(-1).clamp_min(1e-30).sqrt().sqrt().float()
    if tall:
        return (basis * root).t().to(dtype).contiguous(), (weight @ basis / root).to(dtype).contiguous()
    return (basis.t() @ weight / root.unsqueeze(-1)).to(dtype).contiguous(), (basis * root).to(
        dtype
    ).contiguous()
