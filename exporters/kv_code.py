"""The code that lies beside the weights of a model whose compressed cache needs no package of ours.

It is the very source of `runtime.kv` and of what that imports, laid flat: whatever is corrected there is so
in the next export. It needs torch and transformers alone; what of ours it would need besides (strict parsing
of a scheme, a look at what is supported) is done before it is written, and short stand-ins take the place.
Nothing of ours runs it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

from ..runtime.kv.custom_config import KEY, own_class, own_type
from ..runtime.kv.scheme import FACTOR_NAMES, FACTORS
from .custom_code import LICENCE

CONFIGURATION, MODELING = "configuration_cskv", "modeling_cskv"
_ROOM = Path(__file__).parents[1]
_FIRST = "runtime.kv.attach"
_OTHERS = frozenset({"torch", "transformers", *sys.stdlib_module_names})
_RELATIVE = re.compile(r"^(\s*)from\s+\.+[\w.]*\s+import")
_CONFIGURATION = Template(
    LICENCE
    + '''"""Config of a language model with a compressed key-value cache (CSKV, arXiv 2409.10593)."""

from typing import Any

from transformers import $config


class $own_config($config):
    """As the stock config, with how the cache is compressed."""

    model_type = "$model_type"
    $key: Any = None


__all__ = ["$own_config"]
'''
)
_MODELING = Template(
    LICENCE
    + '''"""Language model with a compressed key-value cache (CSKV, arXiv 2409.10593).

`generate` uses the compressed cache by itself; with `past_key_values=DynamicCache()` it uses a plain one.
For a cache of your own: `new_cache(model)` of cskv_attach.py.
"""

from transformers import $stock

from .$configuration import $own_config
from .cskv_attach import put_kv_cache
from .cskv_scheme import KvCacheScheme


class $own_class($stock):
    """The stock class with such a cache."""

    config_class = $own_config

    def __init__(self, config):
        super().__init__(config)
        put_kv_cache(self, KvCacheScheme.of(config.$key))

    # The library looks at the source of a class's module for what the class can do; this is the stock one's.
    @classmethod
    def _can_set_experts_implementation(cls):
        return $stock._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls):
        return $stock._can_set_attn_implementation()


__all__ = ["$own_class"]
'''
)
_ERRORS = '''"""What can go wrong: a message, and what to do about it."""


class _Error(ValueError):
    def __init__(self, message, *, hint=None):
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message, self.hint = message, hint


class PlanError(_Error):
    pass


class SourceError(_Error):
    pass


class UsageError(_Error):
    pass
'''
_SUPPORT = '''"""What can have a compressed cache: this model, which was looked at before this was written."""


def unsupported(config):
    return None
'''
_SCHEME = Template(
    '''"""What is stored of a compressed key-value cache: ranks per attention, window, bits."""

from dataclasses import dataclass

FACTORS = "$factors"
FACTOR_NAMES = $names


@dataclass(frozen=True)
class KvLayer:
    """Ranks of one attention."""

    hidden: int
    width: int
    rank_k: int
    rank_v: int
    value_group: int

    @property
    def factor_shapes(self):
        return {
            "k_a": (self.rank_k, self.hidden), "k_b": (self.width, self.rank_k),
            "v_a": (self.rank_v, self.hidden), "v_b": (self.width, self.rank_v),
        }


@dataclass(frozen=True)
class KvCacheScheme:
    """How the cache of a model is compressed."""

    layers: dict
    window: int
    mode: str
    bits: int | None
    key_group: int

    @classmethod
    def of(cls, values):
        layers = {name: KvLayer(**layer) for name, layer in values["layers"].items()}
        return cls(**{**values, "layers": layers})
'''
)
_STAND_INS: Mapping[str, str] = {
    "errors": _ERRORS,
    "runtime.kv.support": _SUPPORT,
    "runtime.kv.scheme": _SCHEME.substitute(factors=FACTORS, names=FACTOR_NAMES),
}


def auto_map(class_name: str) -> dict[str, str]:
    """Return where transformers finds the classes that stand for a stock class."""
    own_config, own = _names(class_name)
    return {
        "AutoConfig": f"{CONFIGURATION}.{own_config}", "AutoModelForCausalLM": f"{MODELING}.{own}",
    }  # fmt: skip


def code_files(class_name: str, config_class: str, model_type: str) -> dict[str, str]:
    """Return file name -> text.

    Args:
        class_name: of the stock class.
        config_class: of its config.
        model_type: of its config.
    """
    own_config, own = _names(class_name)
    words = {
        "stock": class_name, "config": config_class, "own_class": own, "own_config": own_config,
        "model_type": own_type(model_type), "configuration": CONFIGURATION, "key": KEY,
    }  # fmt: skip
    return {
        f"{CONFIGURATION}.py": _CONFIGURATION.substitute(words),
        f"{MODELING}.py": _MODELING.substitute(words),
        **{f"{_flat(name)}.py": text for name, text in _sources().items()},
    }


def _names(class_name: str) -> tuple[str, str]:
    own = own_class(class_name)
    return own.replace("ForCausalLM", "Config"), own


def _flat(module: str) -> str:
    return f"cskv_{module.rpartition('.')[2]}"


def _sources() -> dict[str, str]:
    """Return module -> text of all that the cache needs, from the first module on."""
    found: dict[str, str] = {}
    waiting = [_FIRST]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        if module in _STAND_INS:
            found[module] = LICENCE + _STAND_INS[module]
            continue
        text = (_ROOM / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
        found[module], needed = _laid_flat(module, text)
        waiting += needed
    return dict(sorted(found.items()))


def _laid_flat(module: str, text: str) -> tuple[str, list[str]]:
    """Return a module's text with imports from beside it, and the modules that it needs.

    Raises:
        ValueError: it imports another package than torch and transformers.
    """
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    hidden = set(_type_checking_lines(tree))
    needed = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno not in hidden:
            target = _target(module, node)
            if target is not None:
                start = node.lineno - 1
                lines[start] = _RELATIVE.sub(rf"\1from .{_flat(target)} import", lines[start])
                needed.append(target)
    kept = [line for number, line in enumerate(lines, 1) if number not in hidden]
    return LICENCE + "".join(kept), needed


def _target(module: str, node: ast.Import | ast.ImportFrom) -> str | None:
    """Return the module of ours that a statement imports from; None of torch and the like."""
    if isinstance(node, ast.ImportFrom) and node.level:
        above = module.split(".")[: -node.level]
        return ".".join([*above, *(node.module or "").split(".")]).strip(".")
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
    others = [name for name in names if name.partition(".")[0] not in _OTHERS]
    if others:
        raise ValueError(f"{module} imports {others[0]}, which code beside weights cannot need")
    return None


def _type_checking_lines(tree: ast.Module) -> Iterator[int]:
    """Yield the lines that only a type checker reads."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)
