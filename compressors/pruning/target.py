"""Find the shares that meet a limit, without cutting anything.

Scores do not depend on the shares, so they are computed once; a scalar that multiplies all shares is then
bisected against the analytic count. Widths move in steps, and a step of the residual stream is a large
one: so the coarsest scope is held where the bisection ends and the others go on, finest last, and what
is left at the end goes to single layers. The limit is never exceeded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ...errors import PlanError
from ...models.base import ModelSpec, count_parameters
from ...recipes.pruning import IsomorphicSettings, TargetSettings
from .cutting import cut_shapes
from .groups import Group
from .scopes import Scope, next_width
from .selection import widths_at
from .widths import Unit, Widths

_COARSE: tuple[Unit, ...] = ("width", "heads", "head_dim", "ff")
_HALVINGS = 40
_CLOSE = 0.9995  # of a limit: nothing finer is worth a count
_NEAR = 0.995  # of a limit: worth another search
Limits = Mapping[str, float]


@dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes:
        macs: of one forward at the reference input.
        parameters: identical copies counted once.
        bytes: of its tensors.
    """

    macs: int
    parameters: int
    bytes: int

    def load(self, limits: Limits) -> float:
        """Return the largest part of a limit that is used; above 1 one is exceeded."""
        return max(getattr(self, name) / limit for name, limit in limits.items())


class Counter:
    """Counts what a model takes at given widths, from shapes alone.

    Args:
        spec: of the model as it is now.
        groups: of the same.
    """

    def __init__(self, spec: ModelSpec, groups: Sequence[Group]) -> None:
        self._spec = spec
        self._groups = groups
        self._shapes = {name: tensor.shape for name, tensor in spec.tensors.items()}

    def cost(self, widths: Widths) -> Cost:
        """Count."""
        spec = self._spec
        shapes = cut_shapes(self._shapes, self._groups, widths.flat(), widths.heads)
        stored = (name for name in shapes if name not in spec.shared)
        return Cost(
            spec.family.macs(spec.config, shapes=shapes),
            count_parameters(spec.config, shapes, spec.shared),
            sum(prod(shapes[name]) * spec.tensors[name].dtype.itemsize for name in stored),
        )


def limits_of(target: TargetSettings, original: Cost) -> dict[str, float]:
    """Return the limits as counts: values of at most 1 are shares of the original's."""
    asked = {name: getattr(target, name) for name in ("macs", "parameters", "bytes")}
    return {
        name: value * getattr(original, name) if value <= 1 else value
        for name, value in asked.items()
        if value is not None
    }


@dataclass(frozen=True)
class Found:
    """Widths that keep the limits.

    Attributes:
        scale: of the shares, where the bisection of all scopes together ended.
        widths: of all groups.
        cost: what the model takes then.
    """

    scale: float
    widths: Widths
    cost: Cost

    def to_json(self, target: TargetSettings, limits: Limits) -> dict[str, Any]:
        """Return what was asked and what was reached."""
        asked = target.model_dump(mode="json", exclude_none=True)
        return {
            name: {
                "asked": asked[name],
                "limit": limit,
                "reached": getattr(self.cost, name),
                "used": round(getattr(self.cost, name) / limit, 6),
            }
            for name, limit in limits.items()
        }


class Search:
    """Looks for widths that keep limits.

    Args:
        groups: of the model as it is now.
        scopes: ranked.
        settings: of the stage.
        count: gives the cost of widths.
        limits: by the name of a cost.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scopes: Sequence[Scope],
        settings: IsomorphicSettings,
        count: Callable[[Widths], Cost],
        limits: Limits,
    ) -> None:
        self._groups = groups
        self._scopes = scopes
        self._settings = settings
        self._count = count
        self._limits = limits

    def find(self, *, strict: bool = True) -> Found:
        """Search.

        Args:
            strict: refuse limits that the model keeps as it is; not so in later steps of a schedule.

        Raises:
            PlanError: nothing has to be removed, or the least widths still exceed a limit.
        """
        self._refuse(strict)
        highest = max(1.0 / scope.share for scope in self._scopes)
        first = self._bisect({}, highest)
        best = self._settle({}, first)
        cost = self._count(best)
        for unit in _COARSE:
            if cost.load(self._limits) >= _NEAR:
                break
            wider = self._with_one_more(unit, first)
            if not wider or self._load(wider, highest) > 1.0:
                continue
            tried = self._settle(wider, self._bisect(wider, highest))
            if self._count(tried).load(self._limits) > cost.load(self._limits):
                best, cost = tried, self._count(tried)
        return Found(first, best, cost)

    def _settle(self, fixed: Mapping[str, int], scale: float) -> Widths:
        """Hold one kind after the other, coarsest first, and give what that leaves to the kinds after it."""
        held = dict(fixed)
        for unit in _COARSE:
            new = {
                scope.name: scope.total(scale)
                for scope in self._scopes
                if scope.unit == unit and scope.name not in fixed
            }
            held |= new
            if new and len(held) < len(self._scopes) and self._load(held, scale) < _CLOSE:
                scale = self._bisect(held, scale)
        return self._fill(self._widths(held, scale))

    def _with_one_more(self, unit: Unit, scale: float) -> dict[str, int]:
        """Return the totals of a kind one step above those of a scale: other kinds can give more."""
        found = {}
        for scope in self._scopes:
            total = scope.total(scale)
            if scope.unit == unit and total < scope.size:
                found[scope.name] = min(total - total % scope.step + scope.step, scope.size)
        return found

    def _refuse(self, strict: bool) -> None:
        now = self._count(Widths.of(self._groups))
        if strict and now.load(self._limits) <= 1.0:
            raise PlanError(
                f"target: the model takes {self._told(now)} and keeps it already; nothing would be removed",
                hint="lower the target; at most 1 is a share of the original's",
            )
        least = self._count(self._at(lambda scope: scope.least))
        if least.load(self._limits) > 1.0:
            raise PlanError(
                f"target: {_figures(self._limits)} cannot be reached; with everything removed that the"
                f" settings allow the model takes {self._told(least)}, of {self._told(now)} now",
                hint="allow the model to take more, lower round_to, or give ratios for more kinds of layers",
            )

    def _told(self, cost: Cost) -> str:
        return _figures({name: getattr(cost, name) for name in self._limits})

    def _at(self, total_of: Callable[[Scope], int]) -> Widths:
        return widths_at(self._groups, self._scopes, self._settings, total_of)

    def _widths(self, fixed: Mapping[str, int], scale: float) -> Widths:
        return self._at(lambda scope: fixed.get(scope.name, scope.total(scale)))

    def _load(self, fixed: Mapping[str, int], scale: float) -> float:
        return self._count(self._widths(fixed, scale)).load(self._limits)

    def _bisect(self, fixed: Mapping[str, int], highest: float) -> float:
        """Return the least scale found that keeps the limits; `highest` is known to keep them."""
        low, high = 0.0, highest
        if self._load(fixed, low) <= 1.0:
            return low
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._load(fixed, middle) <= 1.0:
                high = middle
            else:
                low = middle
        return high

    def _fill(self, widths: Widths) -> Widths:
        """Give what is left to single layers: the next by their scores, finest kind first."""
        for unit in ("ff", "head_dim", "heads"):
            for scope in self._scopes:
                if scope.unit == unit or (unit == "ff" and scope.unit == "width"):
                    widths = self._fill_scope(widths, scope)
        return widths

    def _fill_scope(self, widths: Widths, scope: Scope) -> Widths:
        for place in _places_after(scope, widths):
            if self._count(widths).load(self._limits) >= _CLOSE:
                break
            member = scope.members[place]
            higher = next_width(widths.size(member.group, scope.unit), member, scope.step)
            if higher is None:
                continue
            wider = widths.with_size(member.group, scope.unit, higher)
            if self._count(wider).load(self._limits) <= 1.0:
                widths = wider
        return widths


def _places_after(scope: Scope, widths: Widths) -> list[int]:
    """Return members in the order in which their next units come, each once per round, few rounds."""
    kept = sum(widths.size(member.group, scope.unit) for member in scope.members)
    order = list(dict.fromkeys(scope.order[max(kept - scope.least, 0) :].tolist()))
    return order * 2


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:,.0f} {name}" for name, value in values.items())
