"""What `--workers` says: processes on this machine, or a Ray cluster. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import UsageError

_COUNT = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class RaySettings:
    """Work goes to actors of a Ray cluster, one per device.

    Attributes:
        address: `ray://HOST:PORT`; None: as `ray.init` finds one: the environment's RAY_ADDRESS, else a
            cluster that runs on this machine, else one that is started here and ended again.
        workers: at most so many; None: as many as there are devices.
    """

    address: str | None = None
    workers: int | None = None

    def __str__(self) -> str:
        if self.address is not None:
            return self.address
        return "ray" if self.workers is None else f"ray:{self.workers}"


Workers = int | RaySettings


def read_workers(given: str | Workers) -> Workers:
    """Return what is asked for by `N`, `ray`, `ray:N` or `ray://HOST:PORT`.

    Args:
        given: the text; what is none is returned as it is.

    Raises:
        UsageError: it is none of them, less than 1, or Ray is asked for and not installed.
    """
    found = _read(given) if isinstance(given, str) else given
    count = found.workers if isinstance(found, RaySettings) else found
    if count is not None and count < 1:
        raise UsageError(f"--workers {given}: at least one is needed")
    if isinstance(found, RaySettings) and find_spec("ray") is None:
        raise UsageError(
            f"--workers {given}: the package ray is not installed",
            hint='pip install "compress[ray]", or write a number of processes',
        )
    return found


def _read(text: str) -> Workers:
    kind, _, rest = text.partition(":")
    if _COUNT.fullmatch(text):
        return int(text)
    if text == "ray":
        return RaySettings()
    if kind == "ray" and _COUNT.fullmatch(rest):
        return RaySettings(workers=int(rest))
    if kind == "ray" and re.fullmatch(r"//[^/\s]+:[0-9]+", rest):
        return RaySettings(address=text)
    raise UsageError(
        f"--workers {text}: no number of processes, and no Ray cluster",
        hint="write N, ray, ray:N or ray://HOST:PORT",
    )
