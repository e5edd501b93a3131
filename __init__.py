"""compress: turn a pretrained checkpoint into a smaller, faster, verified one.

    import compress
    report = compress.run("recipes/dit_w4a8.yaml")
    model = compress.load("out/dit-w4a8")

Importing this package imports neither torch nor a model library; the names below are loaded when
they are first used. Where diffusers is imported (before or after), its `from_pretrained` learns to
read checkpoints of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .runtime.registration import install as _install
from .version import __version__

__all__ = ["__version__", "load", "plan", "run"]

if TYPE_CHECKING:
    from .pipeline import plan, run
    from .runtime.load import load

_HOMES = {"run": "pipeline", "plan": "pipeline", "load": "runtime.load"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


# Test runners import the root of a checkout once more, under the name of its folder; the classes of
# that second copy must not be the ones that diffusers gets to know.
if __name__ == "compress":
    _install()
