"""`report.json`: what a run did, with exactly the top keys of the contract; gates; the machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SourceError
from .exporters.verify import MAX_REPORT_BYTES, REPORT_NAME
from .models.origins import all_removals, blocks_of_first
from .runtime.cpu import processor
from .runtime.validate import read_json
from .version import __version__

if TYPE_CHECKING:
    from .models.base import ModelSpec

FILE_NAME = REPORT_NAME
TOP_KEYS = ("recipe", "model", "stages", "evaluation", "gates", "export", "environment")
TIMING_KEYS = frozenset(
    {
        "seconds", "cpu_seconds", "peak_rss_bytes", "peak_accelerator_bytes", "resumed", "finished_at",
        "original_seconds", "speedup",
    }
)  # fmt: skip
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "torchao", "scipy")
_DRAWN_WITH = ("matplotlib", "pillow")
# They read, build and move what others decide: recorded, but no reason to make a stage again.
_MOVED_WITH = ("accelerate", "huggingface_hub", "hf_xet")
_BYTES_OF_MAXRSS = 1 if sys.platform == "darwin" else 1024


class _Highest:
    """The peak from before the last reset: the kernel keeps one counter for the whole process."""

    bytes: int = 0


_HIGHEST = _Highest()


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
    _HIGHEST.bytes = max(_HIGHEST.bytes, peak_rss_bytes())
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_OF_MAXRSS


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended, in seconds."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _largest_child_bytes() -> int:
    """Return the largest peak of the children that have ended; at least this process's at their start."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _BYTES_OF_MAXRSS


def _reset_for_run() -> float:
    """Start the peak of a run, and return the clock."""
    reset_peak_rss()
    _HIGHEST.bytes = 0
    return time.monotonic()


@dataclass(frozen=True)
class Started:
    """When a run began: a process may make several, and each reports its own cost.

    Attributes:
        seconds: of the monotonic clock.
        cpu_seconds: that had been used by then.
        largest_child_bytes: of what had been started by then.
    """

    seconds: float = field(default_factory=_reset_for_run)
    cpu_seconds: float = field(default_factory=cpu_seconds)
    largest_child_bytes: int = field(default_factory=_largest_child_bytes)

    def peak_rss_bytes(self) -> int:
        """Return the peak since then of the largest of the run's processes."""
        child = _largest_child_bytes()
        return max(_HIGHEST.bytes, peak_rss_bytes(), child if child > self.largest_child_bytes else 0)


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


def environment(seed: int, device: str, threads: int, started: Started) -> dict[str, Any]:
    """Describe the machine and the cost of the run so far.

    Args:
        seed: of the run.
        device: that it used.
        threads: of its arithmetic.
        started: when it began.

    Returns:
        The report's `environment`. `cpu_seconds` counts the processes that the run started, too;
        `peak_rss_bytes` is that of the largest of them.
    """
    name, flags = processor()
    return {
        "versions": {
            **versions(),
            **{package: _version(package) for package in (*_DRAWN_WITH, *_MOVED_WITH)},
        },
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "processor": " ".join([name, *flags]),
        "device": device,
        **_accelerator(device),
        "threads": threads,
        "seed": seed,
        "seconds": round(time.monotonic() - started.seconds, 3),
        "cpu_seconds": round(cpu_seconds() - started.cpu_seconds, 3),
        "peak_rss_bytes": started.peak_rss_bytes(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _accelerator(device: str) -> dict[str, str | int]:
    if not device.startswith("cuda"):
        return {}
    import torch

    return {
        "accelerator": torch.cuda.get_device_name(device),
        "peak_accelerator_bytes": torch.cuda.max_memory_allocated(device),
    }


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
        **_depth_of(spec.source.origins),
        **spec.size().to_json(),
    }


def _depth_of(origins: str | None) -> dict[str, Any]:
    """Say of a source which blocks earlier runs left of the very first model, and from what they came."""
    if origins is None:
        return {}
    return {"depth": {"blocks": blocks_of_first(origins), "removals": all_removals(origins)}}


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of an exported folder.

    Raises:
        SourceError: there is none, or it is not one of ours.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise SourceError(f"{folder}: holds no {FILE_NAME}", hint="name a folder that `compress run` wrote")
    document = read_json(path, MAX_REPORT_BYTES)
    if not all(isinstance(document.get(key), dict) for key in ("model", "export")):
        raise SourceError(f"{path}: not a report of a run")
    return document
