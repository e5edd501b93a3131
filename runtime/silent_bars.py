"""Progress bars that other packages draw while they load something, kept from the terminal meanwhile.

Whoever calls us has a display of progress of their own, or wants none. What the packages log or warn of is
left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import ModuleType
from typing import Any

_ONE_AT_A_TIME = Lock()  # two that overlap would put each other's stand-ins back


@contextmanager
def silent_bars(*packages: str) -> Iterator[None]:
    """Let the modules of packages that are imported draw no bar of tqdm; afterwards they do as before.

    Nothing of tqdm itself is changed, so the bars of all others go on.

    Args:
        packages: import names.
    """
    starts = tuple(f"{package}." for package in packages)
    with _ONE_AT_A_TIME:
        found = [
            (module, bar)
            for name, module in list(sys.modules.items())
            if f"{name}.".startswith(starts) and callable(bar := _bar(module))
        ]
        for module, bar in found:
            module.tqdm = partial(_silent, bar)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module, bar in found:
                module.tqdm = bar  # type: ignore[attr-defined]


def _silent(bar: Any, *arguments: Any, **named: Any) -> Any:
    return bar(*arguments, **{**named, "disable": True})  # also where a caller says that it is shown


def _bar(module: ModuleType | None) -> object:
    """Return what a module calls for a bar. Its dictionary is read, for lazy modules import what is asked."""
    return vars(module).get("tqdm") if isinstance(module, ModuleType) else None
