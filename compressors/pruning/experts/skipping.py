"""Dynamic skipping: a token leaves out its second expert where that weighs little (arXiv 2402.14800).

For models that send a token to two experts. Of each layer the median of the ratio of the smaller weight to
the larger one is measured; tokens with a ratio below it go through one expert from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....models.base import OpenModel
from ....models.expert_choice import mixture_shape
from ....models.mixtures import Mixture, mixtures
from ....progress import Progress
from .statistics import DECODER, Routed, observe, token_mask

_TWO = 2
_BINS = 2**16
"""Steps of a ratio, which is from 0 to 1: medians are rounded down to one of these."""


@dataclass
class Skipped:
    """How much was left out.

    Attributes:
        tokens: that routers saw, padding not among them, summed over layers.
        skipped: of these, how many left an expert out.
    """

    tokens: int = 0
    skipped: int = 0

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token went through; 2 before anything was computed."""
        return _TWO - self.skipped / self.tokens if self.tokens else float(_TWO)


def thresholds(
    model: OpenModel, calls: Iterable[dict[str, Any]], *, progress: Progress
) -> dict[int, float] | None:
    """Measure the median ratio of every layer.

    Args:
        model: the original.
        calls: keyword arguments of plain forwards, as `observe` takes them.
        progress: told after every batch.

    Returns:
        layer -> median, rounded down to a multiple of 1 / 65,536; None for models that do not send a token to
        two experts.

    Raises:
        StageError: as `observe`.
    """
    if mixture_shape(model.config).routing.active != _TWO:
        return None
    counts = {mixture.layer: torch.zeros(_BINS + 1, dtype=torch.int64) for mixture in mixtures(model.module)}

    def see(mixture: Mixture, routed: Routed) -> None:
        steps = (_ratios(routed.weights) * _BINS).to(torch.int64).cpu()
        counts[mixture.layer] += torch.bincount(steps, minlength=_BINS + 1)

    observe(model.module, calls, [see], label="measuring ratios of weights", progress=progress)
    return {layer: _median(values) / _BINS for layer, values in counts.items()}


@contextmanager
def skipping(model: OpenModel, medians: Mapping[int, float]) -> Iterator[Skipped]:
    """Let tokens leave out their second expert within the context.

    Where the router makes the weights of the chosen experts add up to a constant, the remaining expert gets
    all of it; elsewhere it keeps its own weight. The expert that is left out is computed with a weight of 0,
    which gives the same output; what it would save in time does not show.

    Args:
        model: the module itself is run, by whatever means; it is as before afterwards.
        medians: of `thresholds`.

    Yields:
        what was skipped so far.
    """
    found = Skipped()
    mask: list[Tensor] = []  # of the forward that is running

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = kwargs if not args else {**kwargs, "input_ids": args[0]}
        mask[:] = [token_mask(named).reshape(-1)]

    def hook(mixture: Mixture, median: float, renormalises: bool) -> Any:
        def after(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            logits, weights, indices = output
            skip = _ratios(weights) < median
            found.tokens += int(mask[0].sum())
            found.skipped += int((skip & mask[0]).sum())
            return logits, _without_second(weights, skip, renormalises), indices

        return after

    known = mixture_shape(model.config).routing.ignores_absent
    with ExitStack() as hooks:
        decoder = model.module.get_submodule(DECODER)
        hooks.callback(decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
        for mixture in mixtures(model.module):
            renormalises = bool(getattr(mixture.router, "norm_topk_prob", known))
            after = hook(mixture, medians[mixture.layer], renormalises)
            hooks.callback(mixture.router.register_forward_hook(after).remove)
        yield found


def _ratios(weights: Tensor) -> Tensor:
    """Return [tokens] float32, from 0 to 1: the smaller of two weights by the larger; 0 where both are 0."""
    values = weights.to(torch.float32)
    larger = values.amax(dim=-1)
    ratios = values.amin(dim=-1) / larger.clamp_min(torch.finfo(torch.float32).tiny)
    return ratios.clamp(0.0, 1.0)


def _without_second(weights: Tensor, skip: Tensor, renormalises: bool) -> Tensor:
    """Return the weights [tokens, 2] with the smaller one at 0 where `skip` says so."""
    first = torch.nn.functional.one_hot(weights.argmax(dim=-1), _TWO).to(weights.dtype)
    alone = first * (weights.sum(dim=-1, keepdim=True) if renormalises else weights)
    return torch.where(skip[:, None], alone, weights)


def _median(counts: Tensor) -> int:
    """Return the step that holds the median; of an even number of tokens, the lower of the two."""
    middle = (int(counts.sum()) - 1) // 2
    return int((counts.cumsum(dim=0) <= middle).sum())
