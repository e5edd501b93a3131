"""What `--workers` says: processes on this machine, or actors of a Ray cluster. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import UsageError
from .stage_base import StageSettings

_WRITTEN = re.compile(r"(?P<count>[0-9]{1,6})|ray(:(?P<most>[0-9]{1,6}))?")


@dataclass(frozen=True)
class RaySettings:
    """Work goes to actors of a Ray cluster, one per device.

    Which cluster is `ray.init`'s to find: that of the environment's RAY_ADDRESS, else the one that
    `ray start` has started on this machine, else one that is started now and ended afterwards.

    Attributes:
        workers: at most so many; None: as many as there are devices.
    """

    workers: int | None = None

    def __str__(self) -> str:
        return "ray" if self.workers is None else f"ray:{self.workers}"


Workers = int | RaySettings


def read_workers(given: str | Workers) -> Workers:
    """Return what is asked for by `N`, `ray` or `ray:N`.

    Args:
        given: the text; what is none is checked and returned as it is.

    Raises:
        UsageError: it is none of them, or less than 1, or Ray is asked for and not installed.
    """
    found = _read(given) if isinstance(given, str) else given
    count = found.workers if isinstance(found, RaySettings) else found
    if count is not None and count < 1:
        raise UsageError(f"--workers {given}: at least one is needed")
    if isinstance(found, RaySettings) and find_spec("ray") is None:
        raise UsageError(
            f"--workers {given}: the package ray is not installed",
            hint='`pip install "compress[ray]"`, or write a number of processes',
        )
    return found


def workers_for(stages: Iterable[StageSettings], given: str | Workers) -> Workers:
    """Return what is asked for, where a recipe can use it.

    Args:
        stages: of the recipe.
        given: as of `read_workers`.

    Raises:
        UsageError: as `read_workers`; or no stage hands its work to a Ray cluster.
    """
    found = read_workers(given)
    if isinstance(found, RaySettings) and not any(stage.uses_ray for stage in stages):
        raise UsageError(
            f"--workers {given}: no stage of this recipe uses a Ray cluster",
            hint="write a number of processes; a search of eep is what a cluster is used for",
        )
    return found


def _read(text: str) -> Workers:
    written = _WRITTEN.fullmatch(text)
    if written is None:
        address = text.startswith("ray://")
        raise UsageError(
            f"--workers {text}: neither a number of processes nor a Ray cluster",
            hint="write ray, and the address into the environment as RAY_ADDRESS"
            if address
            else "write N, ray, or ray:N for at most N actors",
        )
    if written["count"] is not None:
        return int(written["count"])
    return RaySettings(None if written["most"] is None else int(written["most"]))
