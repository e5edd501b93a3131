"""What the cache keeps of all tokens: compressed keys and values, as floats or as packed integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .rounding import Axis, PackedStates
from .scheme import KvCacheScheme, KvLayer


class _Branch:
    """Compressed keys, or values, of one layer: packed whole groups of tokens first, then floats."""

    def __init__(self, bits: int | None, tokens: int, axis: Axis, group: int) -> None:
        self._bits, self._tokens, self._axis, self._group = bits, tokens, axis, group
        self.packed: PackedStates | None = None
        self.floats: Tensor | None = None

    @property
    def tokens(self) -> int:
        packed = 0 if self.packed is None else self.packed.tokens
        return packed + (0 if self.floats is None else self.floats.shape[1])

    def append(self, c: Tensor) -> None:
        """Add states [batch, new tokens, rank]; pack what has become a whole group of tokens."""
        floats = c if self.floats is None else torch.cat([self.floats, c], dim=1)
        whole = 0 if self._bits is None else floats.shape[1] // self._tokens * self._tokens
        if whole and self._bits is not None:
            later = PackedStates.of(floats[:, :whole].contiguous(), self._bits, self._axis, self._group)
            self.packed = later if self.packed is None else self.packed.extended(later)
            floats = floats[:, whole:].clone()
        self.floats = floats

    def read(self, tokens: int) -> Tensor:
        """Return the first tokens as floats, [batch, tokens, rank]."""
        if self.floats is None:
            raise ValueError("nothing is stored")
        if self.packed is None:
            return self.floats[:, :tokens]
        first = self.packed.read(min(tokens, self.packed.tokens), self.floats.dtype)
        rest = tokens - first.shape[1]
        return torch.cat([first, self.floats[:, :rest]], dim=1) if rest else first

    def tensors(self) -> Iterator[Tensor]:
        if self.packed is not None:
            yield from self.packed.tensors()
        if self.floats is not None:
            yield self.floats

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.packed = None if self.packed is None else self.packed.changed(change)
        self.floats = None if self.floats is None else change(self.floats)

    def clear(self) -> None:
        self.packed = self.floats = None


class Latents:
    """Compressed keys and values of all tokens of one layer.

    Where the cache is quantized, tokens are packed as soon as a whole group of them is there.
    """

    def __init__(self, scheme: KvCacheScheme, layer: KvLayer) -> None:
        self._k = _Branch(scheme.bits, scheme.key_group, "tokens", scheme.key_group)
        self._v = _Branch(scheme.bits, scheme.key_group, "channels", layer.value_group)

    @property
    def tokens(self) -> int:
        """How many tokens are stored."""
        return self._k.tokens

    def append(self, c_k: Tensor, c_v: Tensor) -> None:
        """Add compressed keys [batch, new tokens, rank_k] and values [batch, new tokens, rank_v]."""
        self._k.append(c_k)
        self._v.append(c_v)

    def read(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the compressed keys and values of the first tokens, as floats."""
        return self._k.read(tokens), self._v.read(tokens)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is stored."""
        yield from self._k.tensors()
        yield from self._v.tensors()

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose or repeat rows."""
        self._k.change(change)
        self._v.change(change)

    def clear(self) -> None:
        """Forget all tokens."""
        self._k.clear()
        self._v.clear()
