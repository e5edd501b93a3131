"""Nearest names, so that every refusal of a name says which one was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 24


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is closest to `name`, or None where nothing is close."""
    by_folded = {candidate.casefold().replace("-", "_"): candidate for candidate in allowed}
    found = difflib.get_close_matches(name.casefold().replace("-", "_"), by_folded, n=1, cutoff=0.55)
    return by_folded[found[0]] if found else None


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Return a hint for a name that does not exist: the nearest one and what else there is."""
    names = sorted(allowed)
    close = nearest(name, names)
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    known = f"known here: {listed}" if names else "no names are known here"
    return f"did you mean {close!r}? {known}" if close else known
