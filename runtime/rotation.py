"""Orthogonal Hadamard matrices of the widths that transformers have, applied as small factors.

A Hadamard matrix of order n = m * 2^k is a Kronecker product of one Paley matrix (order 12, 20, 28,
36, ...) and Sylvester's powers of two: 1152 = 36 * 32, 4608 = 36 * 128, 3072 = 12 * 256. Applying the
factors one after the other costs n * (m + 2^k) instead of n^2 per row.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

MAX_BLOCK = 128
"""Widest block of the `block` rotation: a single small matrix product."""
_DENSE_ORDER = 128


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _paley_kind(order: int) -> int:
    """Return 1 or 2 for the Paley construction over a prime field that gives `order`, 0 for none."""
    if (order - 1) % 4 == 3 and _is_prime(order - 1):
        return 1
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return 2
    return 0


def _jacobsthal(prime: int) -> Tensor:
    """Return Q [prime, prime] float64: Q[i, j] is the quadratic character of i - j."""
    squares = {value * value % prime for value in range(1, prime)}
    character = [0] + [1 if value in squares else -1 for value in range(1, prime)]
    return torch.tensor([[character[(i - j) % prime] for j in range(prime)] for i in range(prime)]).double()


def _paley(order: int) -> Tensor:
    kind = _paley_kind(order)
    size = order if kind == 1 else order // 2
    conference = torch.zeros(size, size, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if kind == 1 else 1
    conference[1:, 1:] = _jacobsthal(size - 1)
    eye = torch.eye(size, dtype=torch.float64)
    if kind == 1:
        return eye + conference
    plus = torch.tensor([[1, 1], [1, -1]]).double()
    minus = torch.tensor([[1, -1], [-1, -1]]).double()
    return torch.kron(conference, plus) + torch.kron(eye, minus)


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]).double(), matrix)
    return matrix


@lru_cache(maxsize=64)
def factors(order: int) -> tuple[int, ...]:
    """Split `order` into orders of small Hadamard matrices whose Kronecker product has it.

    Returns:
        One or two orders; empty where no matrix is known here.
    """
    if order < 1:
        return ()
    odd = order // (order & -order)
    if odd == 1:
        if order <= _DENSE_ORDER:
            return (order,)
        left = 1 << (order.bit_length() // 2)
        return (left, order // left)
    base = odd * 4
    while base <= min(order, 512):
        if order % base == 0 and _paley_kind(base):
            return (base, order // base) if order > base else (base,)
        base *= 2
    return ()


def has_hadamard(order: int) -> bool:
    """Tell whether `rotate` can use blocks of `order` channels."""
    return bool(factors(order))


def block_for(columns: int) -> int:
    """Return the widest power of two, at most 128, that divides `columns`."""
    return min(columns & -columns, MAX_BLOCK)


@lru_cache(maxsize=64)
def _signs(order: int) -> Tensor:
    return _paley(order) if order & (order - 1) else _sylvester(order)


def hadamard(order: int) -> Tensor:
    """Return the Hadamard matrix of `order`: float64 [order, order] of +-1 with H H^T = order * I.

    Raises:
        ValueError: no construction for this order.
    """
    parts = factors(order)
    if not parts:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    matrix = _signs(parts[0])
    for part in parts[1:]:
        matrix = torch.kron(matrix, _signs(part))
    return matrix.clone()


class Rotation:
    """x -> x R with R = blockdiag(diag(sign) H / sqrt(block)): orthogonal, and undone by `inverse`.

    Args:
        sign: [columns] of +-1, any dtype.
        block: channels per block; divides the columns.
        dtype: in which it is computed.
    """

    def __init__(self, sign: Tensor, block: int, dtype: torch.dtype = torch.float32) -> None:
        parts = factors(block)
        if not parts or sign.numel() % block:
            raise ValueError(f"no rotation of {sign.numel()} channels in blocks of {block}")
        self.block = block
        self.sign = sign.to(dtype)
        scaled = [_signs(part) / math.sqrt(part) for part in parts]
        self.left = scaled[0].to(device=sign.device, dtype=dtype) if len(parts) == 2 else None
        self.right = scaled[-1].to(device=sign.device, dtype=dtype)

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.block // self.right.shape[0], self.right.shape[0])

    def __call__(self, x: Tensor, scaled_sign: Tensor | None = None) -> Tensor:
        """Rotate the rows of x [..., columns].

        Args:
            x: rows.
            scaled_sign: [columns], `sign` times a scale of every channel, which x is to have first;
                the product by both is one pass.
        """
        y = self._shaped(x * (self.sign if scaled_sign is None else scaled_sign))
        y = y @ self.right
        if self.left is not None:
            y = self.left.t() @ y
        return y.reshape(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        """Undo the rotation of the rows of x [..., columns]."""
        y = self._shaped(x) @ self.right.t()
        if self.left is not None:
            y = self.left @ y
        return y.reshape(x.shape) * self.sign


def random_signs(columns: int, generator: torch.Generator) -> Tensor:
    """Draw the +-1 signs of a rotation: int8 [columns]."""
    return torch.randint(0, 2, (columns,), generator=generator, dtype=torch.int8) * 2 - 1
