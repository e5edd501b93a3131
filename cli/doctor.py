"""`compress doctor`: what this machine has for compressing and running models."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from ..runtime.cpu import INTEGER_FLAGS, processor
from . import _options
from ._tables import Table
from ._units import size

_REQUIRED = (
    "torch", "diffusers", "transformers", "accelerate", "torch-pruning", "safetensors", "huggingface-hub",
    "numpy", "pillow", "pydantic",
)  # fmt: skip
_OPTIONAL = ("torchao", "sdnq", "optimum-quanto", "compressed-tensors", "bitsandbytes", "matplotlib", "ray")


def doctor(
    context: typer.Context,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Check this installation and this machine.

    Exit code 1 where something that is needed fails.
    """
    sink = _options.sink(context, as_json, quiet, debug)
    checks = [*_packages(), *_machine()]
    if all(check["status"] != "fail" for check in checks):  # without torch there is nothing to try
        checks += _torch()
    healthy = all(check["status"] != "fail" for check in checks)
    rows = [[check["name"], check["status"], check["detail"]] for check in checks]
    sink.result({"healthy": healthy, "checks": checks}, [Table("", ["check", "", "found"], rows)])
    if not healthy:
        raise typer.Exit(1)


def _check(name: str, status: str, detail: str) -> dict[str, str]:
    return {"name": name, "status": status, "detail": detail}


def _packages() -> list[dict[str, str]]:
    from ..version import __version__

    checks = [_check("compress", "ok", __version__), _check("python", "ok", platform.python_version())]
    for names, absent in ((_REQUIRED, "fail"), (_OPTIONAL, "warn")):
        for name in names:
            try:
                checks.append(_check(name, "ok", metadata.version(name)))
            except metadata.PackageNotFoundError:
                checks.append(
                    _check(name, absent, "not installed" + ("" if absent == "fail" else " (optional)"))
                )
    return checks


def _machine() -> list[dict[str, str]]:
    _, flags = processor()
    fast = not INTEGER_FLAGS.isdisjoint(flags)
    named = ", ".join(flags) or "none of those that matter"
    free = shutil.disk_usage(Path.cwd()).free
    memory = _available_memory()
    return [
        _check("cpu", "ok", f"{os.cpu_count()} cores, {platform.machine()}"),
        _check("cpu integer instructions", "ok" if fast else "warn", named),
        _check("free memory", "ok", "unknown" if memory is None else size(memory)),
        _check("free disk here", "ok" if free > 2e9 else "warn", size(free)),
    ]


def _available_memory() -> int | None:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    for line in info.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _torch() -> list[dict[str, str]]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [_check("torch starts", "fail", str(error))]
    checks = [
        _check("torch threads", "ok", str(torch.get_num_threads())),
        _integer_gemm(torch, "cpu"),
    ]
    if not torch.cuda.is_available():
        return [*checks, _check("gpu", "ok", "none")]
    name = torch.cuda.get_device_name(0)
    total = torch.cuda.get_device_properties(0).total_memory
    return [*checks, _check("gpu", "ok", f"{name}, {size(total)}"), _integer_gemm(torch, "cuda")]


def _integer_gemm(torch: Any, device: str) -> dict[str, str]:
    """Multiply two int8 matrices and compare with the exact product."""
    label = f"integer matrix product ({device})"
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-128, 128, (32, 64), dtype=torch.int8, generator=generator)
    right = torch.randint(-128, 128, (64, 32), dtype=torch.int8, generator=generator)
    exact = (left.to(torch.int64) @ right.to(torch.int64)).to(torch.int32)
    try:
        product = torch._int_mm(left.to(device), right.to(device)).cpu()
    except RuntimeError as error:
        return _check(label, "fail", str(error).splitlines()[0])
    equal = bool(torch.equal(product, exact))
    return _check(label, "ok" if equal else "fail", "exact" if equal else "gives wrong numbers")
