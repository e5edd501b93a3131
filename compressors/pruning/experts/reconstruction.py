"""How far the output of a mixture moves when only some of its experts stay (NAEE, arXiv 2402.14800).

All subsets are compared where there are few, else some that are drawn. The output of an expert does not
depend on which others stay. So for a chunk of tokens all experts are computed once, and with them the
products of all pairs of outputs; the distance of a subset is then a small quadratic form in the differences
of the weights, whatever the width of the model.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ....models.mixtures import Mixture
from ....runtime.modules import place
from .genome import Space, chosen, random_choice
from .statistics import Routed, dense_weights

ALL = 10_000
"""So many subsets of a layer, or fewer, are all compared."""
DRAWN, DRAWN_OF_MANY = 5_000, 2_000
"""Subsets that are drawn where there are more; the smaller number for layers of more than `MANY` experts."""
MANY = 60
SAMPLES = 64
"""Items of the calibration batch, at most."""
_OUTPUTS = 32 * 2**20  # bytes of the outputs of all experts for one chunk of tokens
_WEIGHTS = 4 * 2**20  # bytes of the weights of some subsets for it: smaller than a cache
_TOKENS = 1024
_OF_EXPERTS, _OF_KEPT = 4, 12  # float32 numbers for each weight, and for each logit of an expert that stays
_OF_CHANNELS = 6  # and for each channel of a token while an expert computes
_CORRECTION = "e_score_correction_bias"

Subsets = NDArray[np.int64]
"""[subsets, kept], every row ascending, no two rows equal."""


def compared(space: Space) -> int:
    """Return how many subsets of a layer are compared."""
    every = Space(1, space.kept, space.experts, space.pools).choices
    return every if every <= ALL else (DRAWN_OF_MANY if space.experts > MANY else DRAWN)


def calibration_items(items: int | None, seed: int) -> Tensor:
    """Return the numbers of the items whose outputs are compared, ascending.

    Args:
        items: how many there are, of which 64 are drawn at most; None: unknown, so the first 64.
        seed: of the draw.
    """
    if items is None:
        return torch.arange(SAMPLES)
    drawn = np.random.default_rng(seed).permutation(items)[:SAMPLES]
    return torch.from_numpy(np.sort(drawn))


def subsets(space: Space, seed: int, group: int) -> Subsets:
    """Return the subsets that are compared for a group of layers.

    All there are, in lexicographic order, if that is at most 10,000; else 5,000 that are drawn, 2,000 of more
    than 60 experts. Where the router has groups of experts, each subset has equally many of each.

    Args:
        space: of the individuals.
        seed: of the draws.
        group: place of the group of layers; each has draws of its own.
    """
    one, wanted = Space(1, space.kept, space.experts, space.pools), compared(space)
    if wanted == one.choices:
        size, count = one.experts // one.pools, one.kept // one.pools
        pools = [
            itertools.combinations(range(pool * size, (pool + 1) * size), count) for pool in range(one.pools)
        ]
        return np.array([sum(parts, ()) for parts in itertools.product(*pools)], dtype=np.int64)
    generator = np.random.default_rng([seed, group])
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < wanted:
        drawn[tuple(chosen(random_choice(one, generator).router)[0].tolist())] = None
    return np.array(list(drawn), dtype=np.int64)


class SubsetErrors:
    """Squared Frobenius norm of what the output of a layer changes by, for every subset of its experts.

    The output of a subset is that of the layer cut down to it: the router has the rows of the subset alone,
    and weighs by them. Shared experts change nothing and are left out.

    Args:
        mixture: not changed.
        choices: subsets to compare.
        active: experts per token of the cut layer; None: as many as before.

    Attributes:
        total: [subsets] float64.
    """

    def __init__(self, mixture: Mixture, choices: Subsets, active: int | None) -> None:
        self.total = torch.zeros(len(choices), dtype=torch.float64)
        self._choices = torch.from_numpy(choices)
        self._router = _plain_router(mixture, choices.shape[1], active)

    @torch.no_grad()
    def update(self, mixture: Mixture, routed: Routed) -> None:
        """Take one batch of the layer."""
        rows, columns = _chunk(mixture.count, routed.hidden.shape[-1])
        for part in routed.split(rows):
            self._add(mixture, part, columns)

    def _add(self, mixture: Mixture, part: Routed, columns: int) -> None:
        """Take some tokens, so many subsets at a time."""
        products = _products(mixture, part.hidden)
        full = dense_weights(part.weights, part.indices, mixture.count)
        for first in range(0, len(self._choices), columns):
            block = slice(first, first + columns)
            change = self._weights(mixture, part.logits, self._choices[block].to(full.device))
            change -= full[:, None]
            errors = torch.bmm(change, products).mul_(change).sum(dim=-1).clamp_min_(0.0)
            self.total[block] += errors.sum(dim=0, dtype=torch.float64).cpu()

    def _weights(self, mixture: Mixture, logits: Tensor, choices: Tensor) -> Tensor:
        """Return [tokens, choices, experts]: the weights that the router of every cut layer gives."""
        shape = (len(logits), *choices.shape)
        of_all = choices.expand(shape).reshape(-1, shape[-1])
        router: Any = self._router
        if router.weight.dtype != logits.dtype:
            place(router, "weight", router.weight.to(logits.dtype), requires_grad=False)
        if hasattr(router, _CORRECTION):
            # Added to the scores of all tokens, so it may as well differ from row to row.
            correction = mixture.router_tensors()[_CORRECTION]
            place(router, _CORRECTION, correction[of_all], requires_grad=False)
        _, weights, indices = router(logits[:, choices].reshape(-1, shape[-1]))
        dense = dense_weights(weights, of_all.gather(1, indices), mixture.count)
        return dense.view(shape[0], shape[1], -1)


def work_bytes(space: Space, width: int, inner: int) -> int:
    """Return how many bytes `SubsetErrors.update` needs at most beside the model and the batch.

    Args:
        space: of the individuals.
        width: of the residual stream.
        inner: channels inside an expert.
    """
    rows, columns = _chunk(space.experts, width)
    outputs = rows * (
        space.experts * (width + space.experts) + _OF_CHANNELS * (width + inner + space.experts)
    )
    combined = rows * min(columns, compared(space)) * (_OF_EXPERTS * space.experts + _OF_KEPT * space.kept)
    return 4 * (outputs + combined)


def _chunk(experts: int, width: int) -> tuple[int, int]:
    """Return how many tokens, and how many subsets, are computed together."""
    rows = min(_TOKENS, max(1, _OUTPUTS // (4 * experts * max(width, experts))))
    return rows, max(1, _WEIGHTS // (4 * rows * experts))


def _products(mixture: Mixture, hidden: Tensor) -> Tensor:
    """Return [tokens, experts, experts] float32: products of the outputs of all pairs of experts."""
    outputs = hidden.new_empty((len(hidden), mixture.count, hidden.shape[-1]), dtype=torch.float32)
    ones = hidden.new_ones((len(hidden), 1))
    for expert in range(mixture.count):
        index = torch.full((len(hidden), 1), expert, dtype=torch.int64, device=hidden.device)
        outputs[:, expert] = mixture.experts(hidden, index, ones)
    return torch.bmm(outputs, outputs.transpose(1, 2))


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _plain_router(mixture: Mixture, kept: int, active: int | None) -> nn.Module:
    """Return a router that is given logits of `kept` experts in place of hidden states and does the rest.

    Its matrix is the identity, so a product with it is exact; its bias is in the logits already.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in _own(mixture.router)}
    router = copy.deepcopy(mixture.router, shared)
    for name, tensor in mixture.router_tensors().items():
        empty = torch.eye(kept, device=tensor.device) if tensor.ndim == 2 else tensor.new_zeros(kept)
        place(router, name, empty, requires_grad=False)
    counts: Any = router
    counts.num_experts, counts.top_k = kept, mixture.active if active is None else active
    if hasattr(router, "hidden_dim"):
        counts.hidden_dim = kept
    return router
