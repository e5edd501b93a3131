"""What factors get wrong when the states between them are rounded as the cache rounds them.

The closed form knows nothing of rounding, and its errors are found from second moments alone. Rounded ones
need the tokens themselves: they are replayed once more, and looked at in parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...calibration.base import Calibration
from ...models.base import OpenModel
from ...progress import Progress
from ...runtime.kv.rounding import fake_quantize
from ...runtime.kv.scheme import KvCacheScheme, KvLayer
from .energies import ROWS_AT_ONCE, portions
from .factorise import KvFactors, weight_of

ROUNDED_BUDGET_BYTES = 2 * 2**30
"""Weights and factors of attentions that are measured in one replay; those of one are, however large."""
_FLOAT32_BYTES = 4

Errors = dict[str, float]
"""Side, `k` or `v` -> mean square error."""


@dataclass(frozen=True)
class Rounding:
    """How states are rounded between the factors.

    Attributes:
        bits: of a stored number.
        key_group: consecutive tokens of a key's channel that share a scale.
        value_group: channels of a value that do.
    """

    bits: int
    key_group: int
    value_group: int

    @classmethod
    def of(cls, scheme: KvCacheScheme, name: str) -> Rounding | None:
        """Return that of an attention; None: its states are not rounded."""
        if scheme.bits is None:
            return None
        return cls(scheme.bits, scheme.key_group, scheme.layers[name].value_group)

    def whole(self, x: Tensor) -> Tensor:
        """Return the tokens of sequences [sequences, tokens, h] that come in whole groups, [tokens, h]."""
        return x[:, : x.shape[1] // self.key_group * self.key_group].reshape(-1, x.shape[-1])

    def keys(self, c: Tensor) -> Tensor:
        """Round states of keys, [tokens, r]; tokens come in whole groups."""
        return fake_quantize(c[None], self.bits, "tokens", self.key_group)[0]

    def values(self, c: Tensor) -> Tensor:
        """Round states of values, [tokens, r]."""
        return fake_quantize(c[None], self.bits, "channels", self.value_group)[0]


def held_bytes(layer: KvLayer, sets: int) -> int:
    """Return what an attention holds while it is measured: the weights, and sets of factors."""
    factors = sets * (layer.hidden + layer.width) * (layer.rank_k + layer.rank_v)
    return _FLOAT32_BYTES * (2 * layer.hidden * layer.width + factors)


class _Layer:
    """Sums of squares of one attention, side by side for every set of factors."""

    def __init__(self, weights: Mapping[str, Tensor], sets: Sequence[KvFactors], rounding: Rounding) -> None:
        device = weights["k"].device
        self.weights, self.rounding = weights, rounding
        self.sets = [{key: t.to(device) for key, t in factors.tensors().items()} for factors in sets]
        self.sums = [torch.zeros(2, dtype=torch.float64, device=device) for _ in sets]
        self.tokens = 0

    def take(self, x: Tensor) -> None:
        """Take sequences [sequences, tokens, h]; tokens after the last whole group are left out."""
        group, rows = self.rounding.key_group, self.rounding.whole(x)
        if not len(rows):
            return
        for part in map(Tensor.float, rows.split(max(ROWS_AT_ONCE // group, 1) * group)):
            self.tokens += len(part)
            for side, index, rounded in (("k", 0, self.rounding.keys), ("v", 1, self.rounding.values)):
                exact = F.linear(part, self.weights[side])
                for factors, sums in zip(self.sets, self.sums, strict=True):
                    c = rounded(F.linear(part, factors[f"{side}_a"]))
                    missing = exact - F.linear(c, factors[f"{side}_b"])
                    sums[index] += missing.square().sum(dtype=torch.float64)

    def errors(self) -> list[Errors]:
        widths = (len(self.weights["k"]), len(self.weights["v"]))
        return [
            {side: float(sums[i]) / (self.tokens * widths[i]) for i, side in enumerate("kv")}
            for sums in self.sums
        ]


def rounded_errors(
    model: OpenModel,
    factors: Mapping[str, Sequence[KvFactors]],
    scheme: KvCacheScheme,
    calibration: Calibration,
    progress: Progress,
) -> dict[str, list[Errors] | None]:
    """Return the mean square errors of keys and values that are rebuilt from rounded states.

    Tokens of the calibration count as far as they come in whole groups, which is what the cache packs.

    Args:
        model: as it is without a compressed cache.
        factors: attention -> as many sets of factors of it, float32.
        scheme: of the cache; its numbers are rounded.
        calibration: to replay.
        progress: to report to.

    Returns:
        Attention -> errors of every set; None where no sequence is as long as a group.
    """
    found: dict[str, list[Errors] | None] = {}
    needed = {name: held_bytes(scheme.layers[name], len(sets)) for name, sets in factors.items()}
    for part in portions(needed, ROUNDED_BUDGET_BYTES):
        layers: dict[str, _Layer] = {}
        for name in part:
            rounding = Rounding.of(scheme, name)
            assert rounding is not None
            attention = model.module.get_submodule(name)
            weights = {
                side: weight_of(attention.get_submodule(f"{side}_proj"), name).float() for side in "kv"
            }
            layers[f"{name}.k_proj"] = _Layer(weights, factors[name], rounding)

        def observe(name: str, x: Tensor, timesteps: Tensor, layers: dict[str, _Layer] = layers) -> None:
            layers[name].take(x.detach())

        calibration.observe(model, list(layers), observe, progress)
        for name, layer in zip(part, layers.values(), strict=True):
            found[name] = layer.errors() if layer.tokens else None
    return found
