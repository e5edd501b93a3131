"""What the benchmarks share: the machine's description, tables, deviations, one thread."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from compress.evaluation.speed import interleaved_minima
from compress.runtime.cpu import processor
from torch import Tensor

__all__ = ["interleaved_minima"]

Result = TypeVar("Result")
REPOSITORY = Path(__file__).resolve().parents[1]
ABSENT = "not installed"
_ISA = "ONEDNN_MAX_CPU_ISA"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="a smaller case that ends in about a minute")
    options.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    options.add_argument(
        "--isa",
        help="limit oneDNN to an older CPU, as AVX512_CORE_VNNI or AVX512_CORE_BF16 (without AMX)",
    )
    options.add_argument("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    return options


def say(text: str = "") -> None:
    """Print one line at once, so that a pipe shows progress."""
    print(text, flush=True)


def start(title: str, arguments: argparse.Namespace) -> None:
    """Set the number of threads and say what is measured, on which machine, with which versions."""
    if arguments.isa and os.environ.get(_ISA) != arguments.isa:
        # oneDNN reads the variable when it is loaded, which has happened by now.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, _ISA: arguments.isa})
    threads = arguments.threads
    torch.set_num_threads(threads)
    name, flags = processor()
    versions = ", ".join(f"{library} {version(library)}" for library in ("torch", "diffusers", "torchao"))
    say(f"\n## {title}\n")
    say(f"CPU: {name}; {' '.join(flags) or 'no vector flags known'}")
    if _ISA in os.environ:
        say(f"oneDNN limited to {os.environ[_ISA]} (torch's own kernels are not)")
    say(f"{versions}; threads: {threads}; other load (1 min): {os.getloadavg()[0]:.1f}\n")


def version(library: str) -> str:
    """Return the installed version, or "not installed"."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ABSENT


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    say(line(header))
    say(
        "| "
        + " | ".join("-" * (width - 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
        + " |"
    )
    for row in rows:
        say(line(row))
    say()


def attempt(label: str, action: Callable[[], Result]) -> Result | None:
    """Return what `action` gives; None, with a printed line that says why, where it fails.

    Compilers and other libraries fail in their own ways; the other candidates are still measured.
    """
    try:
        return action()
    except Exception as error:
        words = " ".join(line for line in str(error).splitlines() if "error" in line.lower())
        say(f"{label}: failed: {type(error).__name__}: {(words or str(error))[:200]}")
        return None


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Return 10 log10(signal power / error power) in dB."""
    error = (value.double() - reference.double()).square().mean()
    return float(10 * torch.log10(reference.double().square().mean() / error.clamp_min(1e-300)))
