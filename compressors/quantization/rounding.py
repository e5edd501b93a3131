"""Error-compensating rounding (GPTQ, arXiv 2210.17323): later columns absorb earlier errors.

The grid is fixed beforehand; columns are visited in order of falling input energy. For column j with
error e = (w_j - w^_j) / U_jj, where U is the upper Cholesky factor of the inverse damped Gram matrix,
the columns that are still free become W -= e U_j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import StageError
from .grid import Grid, Steps

_BLOCK = 128
_DAMPING = 0.01
_ATTEMPTS = 8


def _inverse_factor(gram: Tensor, name: str) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped gram, float32.

    Raises:
        StageError: the matrix is not finite, or no damping makes it positive definite.
    """
    if not torch.isfinite(gram).all():
        raise StageError(f"{name}: its calibration inputs are not finite", hint="check the calibration data")
    eye = torch.eye(gram.shape[0], device=gram.device)
    damping = _DAMPING * float(gram.diagonal().mean())
    damping = damping if damping > 0 else 1.0
    # The last damping exceeds the mean diagonal 10^5 times: what still fails then is no Gram matrix.
    for _ in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(gram + damping * eye)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0:
                return upper
        damping *= 10.0
    raise StageError(
        f"{name}: the correlations of its calibration inputs cannot be inverted, damped {_ATTEMPTS} times",
        hint="set `rounding: nearest`, or calibrate on other samples",
    )


def round_with_compensation(
    weight: Tensor, gram: Tensor, steps: Steps, grid: Grid, name: str = "a layer"
) -> Tensor:
    """Round a weight so that the output error X (W - W^)^T is small.

    Args:
        weight: float32 [out, in].
        gram: float32 [in, in], X^T X of the inputs that this weight multiplies.
        steps: the weight's grid.
        grid: its kind.
        name: of the layer, for errors.

    Returns:
        int8 [out, in].

    Raises:
        StageError: the inputs were not finite, or their Gram matrix cannot be inverted.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(gram[order][:, order], name)
    columns = weight.shape[1]
    group = (order // (grid.group_size or columns)).tolist()
    scale = steps.scale.float().t().contiguous()
    zero = torch.zeros_like(scale) if steps.zero is None else steps.zero.float().t().contiguous()
    bottom, top = grid.bounds
    # Columns as rows, so that each step touches contiguous memory.
    free = weight.t()[order].contiguous()
    levels = torch.empty_like(free, dtype=torch.int8)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(end - start, weight.shape[0], device=weight.device)
        for j in range(start, end):
            step, offset = scale[group[j]], zero[group[j]]
            level = (torch.round(free[j] / step) - offset).clamp_(bottom, top)
            levels[j] = level.to(torch.int8)
            error = (free[j] - (level + offset) * step) / upper[j, j]
            errors[j - start] = error
            free[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1.0)
        free[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1.0)
    q = torch.empty_like(levels)
    q[order] = levels
    return q.t().contiguous()
