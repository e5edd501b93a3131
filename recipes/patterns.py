"""Patterns of layer names: anchored globs over the full dotted name, `*` crosses dots.

A pattern never matches a part of a name: `blocks.1` is not `blocks.11`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)


def match(pattern: str, name: str) -> bool:
    """Tell whether `pattern` describes the whole of `name`; `*` stands for any characters."""
    return _compile(pattern).fullmatch(name) is not None


def select(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Return the matched names, in their own order, each with the first pattern that matches it."""
    compiled = [(pattern, _compile(pattern)) for pattern in patterns]
    chosen: dict[str, str] = {}
    for name in names:
        for pattern, expression in compiled:
            if expression.fullmatch(name):
                chosen[name] = pattern
                break
    return chosen


def unmatched(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the patterns that match none of `names`; each of them is a mistake in a recipe."""
    known = list(names)
    return [pattern for pattern in patterns if not any(map(_compile(pattern).fullmatch, known))]
