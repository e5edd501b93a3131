"""`report.json`: what a run did, with exactly the top keys of the contract; gates; the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SourceError
from .recipes.gates import Gate
from .runtime.cpu import processor
from .version import __version__

if TYPE_CHECKING:
    from .models.base import ModelSpec

FILE_NAME = "report.json"
TOP_KEYS = ("recipe", "model", "stages", "evaluation", "gates", "export", "environment")
TIMING_KEYS = frozenset({"seconds", "cpu_seconds", "peak_rss_bytes", "resumed", "finished_at"})
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "torchao", "scipy")
_DRAWN_WITH = ("matplotlib", "pillow")


def versions() -> dict[str, str]:
    """Return the versions that decide the bytes of a result's tensors."""
    return {
        "compress": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def reset_peak_rss() -> None:
    """Start a new measurement of the peak where the kernel allows it; else the peak is the process's."""
    control = Path("/proc/self/clear_refs")
    if os.access(control, os.W_OK):
        try:
            control.write_text("5")
        except OSError:  # refused inside some containers: the figure is then an upper bound
            return


def peak_rss_bytes() -> int:
    """Return the peak resident memory since `reset_peak_rss`, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Measured:
    """Seconds and peak memory of a `measured` body; filled when it ends."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def measured() -> Iterator[Measured]:
    """Time a body and take its peak resident memory."""
    result = Measured()
    reset_peak_rss()
    started = time.monotonic()
    try:
        yield result
    finally:
        result.seconds = round(time.monotonic() - started, 3)
        result.peak_rss_bytes = peak_rss_bytes()


def check_gates(gates: Mapping[str, Gate], metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Hold the measured metrics against `require`; a metric that was not measured fails its gate."""
    rows: list[dict[str, Any]] = []
    for name, gate in gates.items():
        value = metrics.get(name)
        rows.append(
            {
                "metric": name,
                "expected": str(gate),
                "measured": value,
                "passed": value is not None and gate.holds(value),
            }
        )
    return rows


def environment(seed: int, device: str, threads: int, started: float) -> dict[str, Any]:
    """Describe the machine and the cost of the whole run."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    name, flags = processor()
    return {
        "versions": {**versions(), **{package: _version(package) for package in _DRAWN_WITH}},
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "processor": " ".join([name, *flags]),
        "device": device,
        **_accelerator(device),
        "threads": threads,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _accelerator(device: str) -> dict[str, str]:
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"accelerator": torch.cuda.get_device_name(device)}


def without_timings(value: Any) -> Any:
    """Return a report without the figures that differ between two runs of one recipe."""
    if isinstance(value, Mapping):
        return {key: without_timings(item) for key, item in value.items() if key not in TIMING_KEYS}
    if isinstance(value, list | tuple):
        return [without_timings(item) for item in value]
    return value


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """Describe the source and its size: the report's `model`."""
    return {
        "id": spec.source.id,
        "revision": spec.source.revision,
        "class": spec.config.get("_class_name"),
        "family": spec.family.name,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "hashes": dict(spec.source.hashes),
        **spec.source.card.to_json(),
        **spec.size().to_json(),
    }


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of an exported folder.

    Raises:
        SourceError: there is none, or it is not one of ours.
    """
    path = folder / FILE_NAME
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = all(isinstance(document[key], dict) for key in ("model", "export"))
    except OSError:
        raise SourceError(
            f"{folder}: holds no {FILE_NAME}", hint="name a folder that `compress run` wrote"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: not a report of a run: {error}") from None
    if not complete:
        raise SourceError(f"{path}: not a report of a run")
    return document
