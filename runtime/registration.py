"""Teach diffusers' and transformers' `from_pretrained` to read our checkpoints, importing neither.

`import compress` must stay light, so the registration waits: a hook on the import system adds our
classes to the mappings of a library's `quantizers.auto` right after that module has been executed, or at
once where it already was. Torch-free until then.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGETS: Mapping[str, str] = {
    "diffusers.quantizers.auto": "diffusers_quantizer",
    "transformers.quantizers.auto": "transformers_quantizer",
}
"""Module of a library that maps methods to classes -> our module with the classes for it."""

_MAPPINGS = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")


def install() -> None:
    """Register now where a library's quantizers are imported, else when they will be; idempotent."""
    waiting = False
    for target in TARGETS:
        module = sys.modules.get(target)
        if module is not None and all(hasattr(module, name) for name in _MAPPINGS):
            register(module)
        else:
            waiting = True
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(module: ModuleType) -> None:
    """Add our classes to the mappings of `module`, an imported key of `TARGETS`."""
    ours = import_module(f".{TARGETS[module.__name__]}", __package__)
    module.AUTO_QUANTIZATION_CONFIG_MAPPING[ours.QUANT_METHOD] = ours.CompressConfig
    module.AUTO_QUANTIZER_MAPPING[ours.QUANT_METHOD] = ours.CompressQuantizer


class _Finder(MetaPathFinder):
    """Finds the targets through the other finders and wraps their loaders."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Other packages install hooks that ask every finder in turn, ours included.
        if fullname not in TARGETS or self._searching:
            return None
        self._searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes the module as its own loader would, then registers."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        # Who looks at the module afterwards (inspect, pickle, resources) must see its real loader.
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        register(module)
