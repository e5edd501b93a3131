"""Hold stored factors of a compressed cache against the manifest, before anything is built. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...errors import SourceError
from ..headers import TensorEntry
from .scheme import FACTOR_NAMES, FACTORS, KvCacheScheme, factor_tensors

_FLOATS = ("F32", "F16", "BF16")
_HINT = "the weights do not belong to this manifest, or were changed; export again"


def is_factor(name: str) -> bool:
    """Tell whether a tensor's name is that of a factor of a compressed cache."""
    parts = name.split(".")
    return len(parts) > 3 and parts[-3] == FACTORS and parts[-2] in FACTOR_NAMES and parts[-1] == "weight"


def check_factors(scheme: KvCacheScheme | None, tensors: Mapping[str, TensorEntry], where: str) -> None:
    """Refuse factors that are missing, superfluous, or of another shape or kind than the manifest says.

    Args:
        scheme: of the manifest; None: there must be no factors.
        tensors: of the folder, by the module's names.
        where: for the message.

    Raises:
        SourceError: naming the first tensor.
    """
    expected = {} if scheme is None else factor_tensors(scheme)
    for name, shape in expected.items():
        entry = tensors.get(name)
        if entry is None:
            raise SourceError(
                f"{where}: tensor {name} is missing; the cache cannot be compressed without it", hint=_HINT
            )
        if entry.shape != shape or entry.dtype not in _FLOATS:
            raise SourceError(
                f"{where}: tensor {name} is {entry.dtype} {list(entry.shape)}; the manifest implies"
                f" floating point {list(shape)}",
                hint=_HINT,
            )
    _refuse_others(tensors, expected, where)


def _refuse_others(tensors: Iterable[str], expected: Mapping[str, object], where: str) -> None:
    other = sorted(name for name in tensors if is_factor(name) and name not in expected)
    if other:
        raise SourceError(
            f"{where}: tensor {other[0]} is a factor of a cache that the manifest does not list",
            hint="the manifest is missing or was changed by hand; fetch or export the folder again",
        )
