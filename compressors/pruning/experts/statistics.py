"""What routers do while a model runs: what they were given, how often they chose an expert, how they weigh.

Everything is taken while batches pass and summed at once; no hidden state is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....calibration.sampler import place
from ....errors import StageError
from ....models.mixtures import Mixture, mixtures
from ....progress import Progress, step

DECODER = "model"
"""What embeds tokens and holds the layers; the head comes behind it."""


@dataclass(frozen=True)
class Routed:
    """What one router was given and what it returned; tokens of padding are left out.

    Attributes:
        hidden: [tokens, width] that went in.
        logits: [tokens, experts].
        weights: [tokens, active] of the chosen experts' outputs.
        indices: [tokens, active], the chosen experts.
        samples: [tokens], the number of the item that a token belongs to, from 0 over all batches.
    """

    hidden: Tensor
    logits: Tensor
    weights: Tensor
    indices: Tensor
    samples: Tensor

    def of(self, items: Tensor) -> Routed:
        """Return what belongs to items of these numbers."""
        inside = torch.isin(self.samples, items.to(self.samples.device))
        return self if bool(inside.all()) else self._part(inside)

    def split(self, tokens: int) -> Iterator[Routed]:
        """Yield parts of so many tokens, which share memory with this."""
        for start in range(0, len(self.hidden), tokens):
            yield self._part(slice(start, start + tokens))

    def _part(self, rows: Tensor | slice) -> Routed:
        return Routed(
            self.hidden[rows], self.logits[rows], self.weights[rows], self.indices[rows], self.samples[rows]
        )


See = Callable[[Mixture, Routed], None]


class RoutingSums:
    """How often each expert of each layer was chosen, and with how much weight in all.

    Args:
        experts: of a layer.
        layers: numbers of the layers that have experts.

    Attributes:
        counts: layer -> [experts] float64, tokens that were sent to the expert.
        weights: layer -> [experts] float64, sum of its routing weights over those tokens.
    """

    def __init__(self, experts: int, layers: Iterable[int]) -> None:
        self.counts = {layer: torch.zeros(experts, dtype=torch.float64) for layer in layers}
        self.weights = {layer: torch.zeros_like(count) for layer, count in self.counts.items()}

    def update(self, mixture: Mixture, routed: Routed) -> None:
        """Take one batch of one layer."""
        # Written into dense rows and summed along them: as a scattered sum it would depend on the order in
        # which a GPU's threads arrive.
        chosen = dense_weights(torch.ones_like(routed.weights), routed.indices, mixture.count)
        weights = dense_weights(routed.weights, routed.indices, mixture.count)
        self.counts[mixture.layer] += chosen.sum(dim=0, dtype=torch.float64).cpu()
        self.weights[mixture.layer] += weights.sum(dim=0, dtype=torch.float64).cpu()


def dense_weights(weights: Tensor, indices: Tensor, experts: int) -> Tensor:
    """Return [tokens, experts] float32: the weight of every expert, 0 where it is not chosen."""
    return weights.new_zeros((len(weights), experts), dtype=torch.float32).scatter_(
        1, indices, weights.to(torch.float32)
    )


@torch.no_grad()
def observe(
    module: nn.Module,
    calls: Iterable[dict[str, Any]],
    see: Sequence[See],
    *,
    label: str,
    progress: Progress,
) -> int:
    """Run the decoder over batches and show what every router does.

    The head and the cache of keys are left out, since no router sees them.

    Args:
        module: of a stock class, in evaluation mode.
        calls: keyword arguments of plain forwards: `input_ids` [batch, tokens], and `attention_mask` of the
            same shape where there is padding.
        see: each called for every layer with a mixture in every forward.
        label: of the step that progress tells.
        progress: told after every batch.

    Returns:
        how many items there were.

    Raises:
        StageError: there is no batch, or a layer's router was not called.
    """
    total = len(calls) if isinstance(calls, Sized) else None
    decoder, seen, items = module.get_submodule(DECODER), set[int](), 0
    tokens: list[Tensor] = []  # of the batch that is running: the item of each token, -1 for padding

    def told(mixture: Mixture, routed: Routed) -> None:
        seen.add(mixture.layer)
        for one in see:
            one(mixture, routed)

    with _watched(module, tokens, told), step(progress, label, total):
        for call in calls:
            placed = place(call, module)
            tokens[:] = [_items(placed, items)]
            decoder(**{**placed, "use_cache": False})
            items += len(placed["input_ids"])
            progress.advance()
    missing = [mixture.layer for mixture in mixtures(module) if mixture.layer not in seen]
    if missing:
        why = "there is no batch" if not items else f"no forward reaches the router of layer {missing[0]}"
        raise StageError(f"{label}: {why}")
    return items


def token_mask(call: dict[str, Any]) -> Tensor:
    """Return [batch, tokens] bool: which tokens of a forward are no padding.

    Args:
        call: its keyword arguments; a mask may cover tokens of earlier forwards as well.

    Raises:
        StageError: the mask is of another kind.
    """
    ids, mask = call["input_ids"], call.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.ndim != 2 or mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]:
        raise StageError(
            f"attention_mask {list(mask.shape)} does not say which of {list(ids.shape)} tokens pad"
        )
    return mask[:, -ids.shape[1] :].bool()


@contextmanager
def _watched(module: nn.Module, tokens: list[Tensor], see: See) -> Iterator[None]:
    def hook(mixture: Mixture) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            rows = tokens[0]
            real = rows >= 0
            logits, weights, indices = (part[real] for part in output)
            hidden = args[0].reshape(len(rows), -1)[real]
            see(mixture, Routed(hidden, logits, weights, indices, rows[real]))

        return after

    with ExitStack() as hooks:
        for mixture in mixtures(module):
            hooks.callback(mixture.router.register_forward_hook(hook(mixture)).remove)
        yield


def _items(call: dict[str, Any], before: int) -> Tensor:
    """Return [batch * tokens]: the number of each token's item, -1 where it is padding."""
    mask = token_mask(call)
    numbers = torch.arange(before, before + len(mask), device=mask.device)[:, None].expand(mask.shape)
    return torch.where(mask, numbers, -1).reshape(-1)
