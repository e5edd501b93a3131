"""The scopes of a model under given settings: who competes, for which share; and what cannot be asked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch

from ...errors import PlanError
from ...recipes import patterns
from ...recipes.pruning import IsomorphicSettings, RatioSettings
from .classes import classes
from .groups import Group
from .scopes import Member, Scope, least_units, stuck
from .widths import Unit, Widths

PAPER = RatioSettings(width=0.5, heads=0.5, head_dim=0.25)
"""Proportions of a target without ratios: those of the paper's largest DeiT."""

_NONE = torch.zeros(0, dtype=torch.int64)
_WORDS: Mapping[Unit, str] = {
    "width": "residual channels that could be removed",
    "ff": "feed-forward networks that could lose channels",
    "heads": "attention heads that could be removed",
    "head_dim": "attention heads that could lose channels",
}


def competition(
    groups: Sequence[Group], settings: IsomorphicSettings, initial: Widths | None = None
) -> list[Scope]:
    """Return every scope from which something is asked, without order; `scopes.rank` adds it.

    Args:
        groups: of the model as it is now.
        settings: of the stage.
        initial: sizes before the first step; None: now.

    Raises:
        PlanError: a pattern matches no layer; a share is asked of what the model does not have, or of
            layers that cannot lose anything.
    """
    shares = settings.ratios or PAPER
    now = Widths.of(groups)
    initial = initial or now
    strict = settings.ratios is not None and initial == now  # later steps find layers at their least
    free = _without_kept(groups, settings)
    own = _by_pattern(free, shares)
    found = [
        scope
        for unit, share in (("width", shares.width), ("ff", shares.inner), ("head_dim", shares.head_dim))
        for scope in _of_unit(
            [group for group in free if group.name not in own], unit, share, settings, initial, strict
        )
    ]
    found += _of_heads(free, shares.heads, settings, initial, strict)
    found += _of_patterns(free, own, shares, settings, initial, strict)
    return _merged(found, shares, settings)


def check_shares(scopes: Sequence[Scope]) -> None:
    """Refuse shares, taken as they stand, that the least widths do not allow.

    Raises:
        PlanError: naming the scope and the share that is possible.
    """
    for scope in scopes:
        if scope.wanted() < scope.least:
            most = 1.0 - scope.least / scope.initial
            raise PlanError(
                f"ratios.{scope.setting}: {scope.share:g} of the {scope.initial} {_units(scope)} of"
                f" {scope.name} leaves {scope.wanted()}; its {len(scope.members)} layers keep at least"
                f" {scope.least}",
                hint=f"ask for at most {int(most * 1000) / 1000:g}, or lower round_to",
            )


def _units(scope: Scope) -> str:
    return {"heads": "heads", "head_dim": "head channels"}.get(scope.unit, "channels")


def _without_kept(groups: Sequence[Group], settings: IsomorphicSettings) -> list[Group]:
    """Return the groups that may lose something."""
    names = [group.name for group in groups]
    for pattern in patterns.unmatched(settings.keep, names):
        raise PlanError(f"keep: the pattern {pattern!r} matches no layer", hint=_near(pattern, names))
    kept = patterns.select(settings.keep, names)
    found = [group for group in groups if group.name not in kept]
    if not found:
        raise PlanError(
            f"keep: its patterns match all {len(names)} layers that could lose something, so nothing would be"
            " removed",
            hint="keep fewer layers, or leave the stage out",
        )
    return found


def _by_pattern(groups: Sequence[Group], shares: RatioSettings) -> dict[str, str]:
    """Return group -> the pattern of `ratios.modules` that its share comes from."""
    names = [group.name for group in groups]
    own = patterns.select(list(shares.modules), names)
    for pattern in shares.modules:
        if patterns.unmatched([pattern], names):
            raise PlanError(
                f"ratios.modules: the pattern {pattern!r} matches no layer", hint=_near(pattern, names)
            )
        if pattern not in own.values():
            raise PlanError(
                f"ratios.modules: all layers of the pattern {pattern!r} belong to patterns before it",
                hint="write the narrower pattern first",
            )
    return own


def _near(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names[:3])
    return f"layers are named by the one whose outputs are removed, such as {', '.join(near)}"


def _kind(unit: Unit) -> str:
    return "attention" if unit in ("heads", "head_dim") else unit


def _of_unit(
    groups: Sequence[Group],
    unit: str,
    share: float,
    settings: IsomorphicSettings,
    initial: Widths,
    strict: bool,
) -> list[Scope]:
    """Return one scope for every class of a kind: channels, or positions within heads."""
    named: Unit = "width" if unit == "width" else "ff" if unit == "ff" else "head_dim"
    chosen = [group for group in groups if group.kind == _kind(named)]
    if share == 0.0:
        return []
    ratios = settings.ratios or PAPER
    setting = "width" if named == "ff" and ratios.ff is None else named
    if not chosen:
        # An unset `ff` follows the width, so that it asks for nothing of its own.
        if strict and not (named == "ff" and setting == "width"):
            hint = "write ratios.ff for feed-forward networks" if named == "width" else None
            raise PlanError(
                f"ratios.{setting}: {share:g} is asked of {_WORDS[named]}, and there are none", hint=hint
            )
        return []
    scopes = [
        Scope(
            name, named, setting, share, settings.round_to, _members(members, named, settings, initial), _NONE
        )
        for name, members in classes(chosen, settings.ranking).items()
    ]
    return _that_can(scopes, strict)


def _of_heads(
    groups: Sequence[Group], share: float, settings: IsomorphicSettings, initial: Widths, strict: bool
) -> list[Scope]:
    """Return the one scope of all heads; under local ranking one for every layer."""
    attentions = [group for group in groups if group.kind == "attention"]
    if share == 0.0:
        return []
    if not attentions:
        if strict:
            raise PlanError(f"ratios.heads: {share:g} is asked of {_WORDS['heads']}, and there are none")
        return []
    local = settings.ranking == "local"
    sets = {f"{group.name} heads": [group] for group in attentions} if local else {"heads": attentions}
    scopes = [
        Scope(name, "heads", "heads", share, 1, _members(members, "heads", settings, initial), _NONE)
        for name, members in sets.items()
    ]
    return _that_can(scopes, strict)


def _of_patterns(
    groups: Sequence[Group],
    own: Mapping[str, str],
    shares: RatioSettings,
    settings: IsomorphicSettings,
    initial: Widths,
    strict: bool,
) -> list[Scope]:
    """Return scopes of the layers that a pattern gives a share of their own."""
    scopes = []
    for pattern, share in shares.modules.items():
        chosen = [group for group in groups if own.get(group.name) == pattern]
        for name, members in classes(chosen, settings.ranking).items() if share else ():
            unit: Unit = "head_dim" if members[0].kind == "attention" else members[0].kind
            scopes.append(
                Scope(
                    f"{name} ({pattern})", unit, f"modules.{pattern}", share, settings.round_to,
                    _members(members, unit, settings, initial), _NONE,
                )
            )  # fmt: skip
    return _that_can(scopes, strict)


def _members(
    groups: Sequence[Group], unit: Unit, settings: IsomorphicSettings, initial: Widths
) -> tuple[Member, ...]:
    now = Widths.of(groups)
    step = 1 if unit == "heads" else settings.round_to
    found = []
    for group in groups:
        size, before = now.size(group.name, unit), initial.size(group.name, unit)
        found.append(Member(group.name, size, before, least_units(before, size, step)))
    return tuple(found)


def _that_can(scopes: list[Scope], strict: bool) -> list[Scope]:
    """Refuse scopes in which no layer can lose a unit, or leave them out where nobody asked for them."""
    for scope in scopes:
        if strict and stuck(scope.members):
            sizes = sorted({member.initial for member in scope.members})
            raise PlanError(
                f"ratios.{scope.setting}: no layer of {scope.name} can lose {_units(scope)}: they have"
                f" {', '.join(map(str, sizes))} each, and widths are multiples of {scope.step}",
                hint="lower round_to, or leave this share out",
            )
    return [scope for scope in scopes if not stuck(scope.members)]


def _merged(scopes: list[Scope], shares: RatioSettings, settings: IsomorphicSettings) -> list[Scope]:
    """Under global ranking let all that takes its share from one key compete."""
    if settings.ranking != "global" or shares.ff is not None:
        return scopes
    joined = [scope for scope in scopes if scope.setting == "width"]
    if len(joined) < 2:
        return scopes
    members = tuple(member for scope in joined for member in scope.members)
    whole = Scope("width", "width", "width", shares.width, settings.round_to, members, _NONE)
    return [whole, *(scope for scope in scopes if scope.setting != "width")]
