"""The processor by name, and those of its vector extensions that decide the speed of integer products."""

from __future__ import annotations

import platform
from pathlib import Path

VECTOR_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)
INTEGER_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


def processor() -> tuple[str, list[str]]:
    """Return the processor's name and those of `VECTOR_FLAGS` that it has; none where unknown."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return name, [flag for flag in VECTOR_FLAGS if flag in flags]
