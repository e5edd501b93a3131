"""What an individual would ship as, shown on the open model without cutting it.

While it is shown, the module computes what the cut one does: every router has the rows of the experts that
stay, and so weighs among these alone, whether or not its class divides by their sum. Experts that stay as
they are are not copied: the router's picks are translated to their old places. Merged ones are computed in
float32, rounded to the model's dtype as they are when they are stored, and kept for the next individual with
the same coefficients in that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....errors import StageError
from ....models.base import OpenModel
from ....models.expert_choice import checked_experts
from ....models.experts import mixed
from ....models.mixtures import ACTIVE_NAMES, COUNT_NAMES, Mixture, mixtures
from ....runtime.mapped_router import mapped
from .genome import Coefficients, Individual, chosen, is_one_hot
from .layer_groups import LayerGroup, assign

_Merged = tuple[bytes, dict[str, Tensor]]


class Candidates:
    """The individuals of one model.

    Args:
        model: open, whole, its experts in floating point.
        groups: of layers, of `layer_groups`; every mixture is in one.
        active: experts per token of what is shown; None: as many as the model has.

    Raises:
        PlanError: a mixture is in no group, or a group without one.
    """

    def __init__(self, model: OpenModel, groups: Sequence[LayerGroup], active: int | None = None) -> None:
        self._config, self._groups, self._active = model.config, tuple(groups), active
        found = mixtures(model.module)
        places = assign(self._groups, [mixture.name for mixture in found])
        self._layers = [(mixture, places[mixture.name]) for mixture in found]
        self._merged: dict[int, _Merged] = {}
        self.merges = 0
        """How often the experts of a layer have been merged."""

    @property
    def groups(self) -> int:
        """How many groups of layers individuals have."""
        return len(self._groups)

    @contextmanager
    def shown(self, individual: Individual) -> Iterator[None]:
        """Let the module compute as the cut one; afterwards it is as before, bit for bit, whatever happens.

        One individual at a time: within the context the model has no other.

        Args:
            individual: with as many groups as the model's layers fall into.

        Raises:
            PlanError: what stays cannot be routed; see `models.expert_choice.checked_experts`.
            StageError: the coefficients are of another model, or not finite.
        """
        self._check(individual)
        with ExitStack() as undo, torch.no_grad():
            if is_one_hot(individual.router):
                kept = kept_of(individual, self._groups)
                checked_experts(self._config, kept, self._active)
                for mixture, group in self._layers:
                    order = np.argsort(chosen(individual.router)[group])
                    self._show_rows(
                        mixture, sorted(kept[mixture.layer]), individual.experts[group][order], undo
                    )
            else:
                for mixture, group in self._layers:
                    self._show_mapped(mixture, individual.router[group], individual.experts[group], undo)
            yield

    def forget(self) -> None:
        """Drop the merged experts that are kept."""
        self._merged.clear()

    def _check(self, individual: Individual) -> None:
        shape = individual.router.shape
        wanted = (len(self._groups), self._layers[0][0].count)
        if (shape[0], shape[2]) != wanted:
            raise StageError(
                f"coefficients {list(shape)}; the model has {wanted[0]} groups of layers, with {wanted[1]}"
                " experts in a layer"
            )
        if not (np.isfinite(individual.router).all() and np.isfinite(individual.experts).all()):
            raise StageError("coefficients of experts that are not finite")

    def _show_rows(self, mixture: Mixture, kept: Sequence[int], rows: Coefficients, undo: ExitStack) -> None:
        """Show a router with some of its rows, and experts by `rows`, in the order of `kept`."""
        router = mixture.router
        for name, tensor in mixture.router_tensors().items():
            _put(router, name, tensor[torch.tensor(kept, device=tensor.device)], undo)
        _count(router, len(kept), self._active, undo)
        if isinstance(router, nn.Linear):
            _set(router, "out_features", len(kept), undo)
        self._show_experts(mixture, router, rows, undo)

    def _show_mapped(
        self, mixture: Mixture, mapping: Coefficients, rows: Coefficients, undo: ExitStack
    ) -> None:
        """Show a router whose weights are mixed by `mapping`."""
        name = self._config["_class_name"]
        router = mapped(mixture.router, torch.from_numpy(mapping.copy()), name, active=self._active)
        _set(mixture.block, mixture.router_name, router, undo)
        self._show_experts(mixture, router, rows, undo)

    def _show_experts(self, mixture: Mixture, router: nn.Module, rows: Coefficients, undo: ExitStack) -> None:
        places = _places(rows)
        if places is not None:
            handle = router.register_forward_hook(_translation(places))
            undo.callback(handle.remove)
            return
        for name, tensor in self._merged_experts(mixture, rows).items():
            _put(mixture.experts, name, tensor, undo)
        _count(mixture.experts, len(rows), None, undo)

    def _merged_experts(self, mixture: Mixture, rows: Coefficients) -> dict[str, Tensor]:
        key = rows.tobytes()
        kept = self._merged.get(mixture.layer)
        if kept is not None and kept[0] == key:
            return kept[1]
        del kept
        self._merged.pop(mixture.layer, None)  # so that there are never two of a layer
        weights = torch.from_numpy(rows.copy())
        made = {name: mixed(tensor, weights) for name, tensor in mixture.expert_tensors().items()}
        self._merged[mixture.layer] = (key, made)
        self.merges += 1
        return made


def kept_of(individual: Individual, groups: Sequence[LayerGroup]) -> dict[int, tuple[int, ...]]:
    """Return layer -> the expert whose row of the router every new expert has, in the individual's order.

    Args:
        individual: whose router is one-hot.
        groups: of layers.

    Raises:
        StageError: it mixes rows of the router.
    """
    if not is_one_hot(individual.router):
        raise StageError("the router's weights are mixed, so they are not those of experts that stay")
    picked = chosen(individual.router)
    return {
        layer: tuple(picked[place].tolist()) for place, group in enumerate(groups) for layer in group.layers
    }


def mixing_of(individual: Individual, groups: Sequence[LayerGroup]) -> dict[int, Tensor]:
    """Return layer -> [kept, experts] float32: coefficients of the old experts, in the order of `kept_of`.

    Layers in which every expert that stays is as it was are left out.

    Args:
        individual: of any kind.
        groups: of layers.
    """
    return {
        layer: torch.from_numpy(individual.experts[place].copy())
        for place, group in enumerate(groups)
        if not np.array_equal(individual.experts[place], individual.router[place])
        for layer in group.layers
    }


def _places(rows: Coefficients) -> Tensor | None:
    """Return the old expert of every new one, where none is a mixture; two may be the same."""
    single = (np.count_nonzero(rows, axis=1) == 1) & (rows.max(axis=1) == 1.0)
    return torch.from_numpy(rows.argmax(axis=1)) if bool(single.all()) else None


def _translation(places: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    """Return a hook that gives a router's picks their old places; all other outputs stay."""

    def translate(router: nn.Module, args: Any, output: Any) -> Any:
        logits, weights, indices = output
        return logits, weights, places.to(indices.device)[indices]

    return translate


def _put(owner: nn.Module, name: str, tensor: Tensor, undo: ExitStack) -> None:
    """Put a tensor in the place of a parameter or a buffer."""
    before = getattr(owner, name)
    value = nn.Parameter(tensor, requires_grad=False) if isinstance(before, nn.Parameter) else tensor
    _set(owner, name, value, undo)


def _count(owner: nn.Module, count: int | None, active: int | None, undo: ExitStack) -> None:
    """Tell a module how many experts there are, and how many a token goes through."""
    said: Mapping[str, int | None] = {
        **dict.fromkeys(COUNT_NAMES, count),
        **dict.fromkeys(ACTIVE_NAMES, active),
    }
    for name, value in said.items():
        if value is not None and name in vars(owner):
            _set(owner, name, value, undo)


def _set(owner: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
