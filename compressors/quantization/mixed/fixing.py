"""Bits that patterns of the recipe give to layers: each layer's from one answer, whatever their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

from ....errors import PlanError
from ....recipes.patterns import match

Fixed = dict[str, tuple[int, str]]
"""Layer -> bits and the pattern that they come from."""

_HINT = (
    "patterns describe full names, `*` stands for anything; layers that `keep`, the family or"
    " adaln_weight_bits leave in floating point take no part"
)


def by_pattern(
    key: str, patterns: Mapping[str, int], names: Collection[str], excluded: Mapping[str, str] | None = None
) -> Fixed:
    """Return which layers a setting of patterns and bits decides.

    Every pattern must decide a layer that no other one decides, and no layer may be given two numbers:
    then the order of the patterns, which no hash of a recipe keeps, means nothing.

    Args:
        key: name of the setting.
        patterns: of the setting -> bits.
        names: of all layers that are allocated.
        excluded: those of them that the setting cannot decide -> why.

    Raises:
        PlanError: naming the pattern, or the layer and both patterns.
    """
    matched = {pattern: [name for name in names if match(pattern, name)] for pattern in sorted(patterns)}
    excluded = excluded or {}
    fixed: Fixed = {}
    takes: dict[str, list[str]] = {}
    for pattern, found in matched.items():
        for name in found:
            if name in excluded:
                continue
            bits, first = fixed.setdefault(name, (patterns[pattern], pattern))
            takes.setdefault(name, []).append(pattern)
            if bits != patterns[pattern]:
                raise PlanError(
                    f"{key}: {name} is given {bits} bits by {first!r} and {patterns[pattern]} bits by"
                    f" {pattern!r}",
                    hint="narrow one of the two patterns; their order does not decide",
                )
    for pattern, found in matched.items():
        decided = [name for name in found if name not in excluded]
        if not decided:
            _refuse_idle(key, pattern, found, excluded)
        if all(len(takes[name]) > 1 for name in decided):
            other = next(item for item in takes[decided[0]] if item != pattern)
            raise PlanError(
                f"{key}: pattern {pattern!r} decides no layer that others do not decide as well; {decided[0]}"
                f" is also described by {other!r}",
                hint="leave one of them out",
            )
    return fixed


def _refuse_idle(key: str, pattern: str, found: list[str], excluded: Mapping[str, str]) -> NoReturn:
    if not found:
        raise PlanError(f"{key}: pattern {pattern!r} matches no layer that is allocated", hint=_HINT)
    raise PlanError(
        f"{key}: pattern {pattern!r} has no effect: {found[0]}: {excluded[found[0]]}",
        hint="leave it out, or describe other layers",
    )


def refuse_twice_decided(fixed: Fixed, modulations: Collection[str], adaln_weight_bits: int | None) -> None:
    """Refuse modulation layers that are given bits by `fixed` and by adaln_weight_bits below 16.

    Raises:
        PlanError: naming the layer.
    """
    if adaln_weight_bits in (None, 16):
        return
    for name in modulations:
        if name in fixed:
            bits, pattern = fixed[name]
            raise PlanError(
                f"fixed: {name} is given {bits} bits by {pattern!r} and {adaln_weight_bits} bits by"
                " adaln_weight_bits",
                hint="narrow the pattern, or leave adaln_weight_bits out",
            )
