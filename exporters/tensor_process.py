"""A written checkpoint with fewer experts, compared with its source by a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..progress import Progress, step
from ..recipes.secrets import TOKEN_VARIABLES
from .tensors_seen import TENSORS_ALONE

_WORKER = f"{__package__}.tensor_comparison"
_MOST_TOLD = 3


def compare_in_fresh_process(
    source: Path,
    written: Path,
    kept: Mapping[int, Sequence[int]],
    *,
    active: int | None,
    dtype: str,
    size_bytes: int,
    progress: Progress,
) -> tuple[str | None, str]:
    """Let a new process hold a written folder against its source; see `tensor_comparison.compare`.

    Args:
        source: folder of the component that was cut.
        written: folder of what is left.
        kept: decoder layer -> experts that were to stay.
        active: experts per token that were wanted; None: as many as before.
        dtype: safetensors code that the weights were to be written in.
        size_bytes: of the written tensors, for the progress.
        progress: gets one step, in bytes.

    Returns:
        What speaks against the folder, in one sentence, or None; and what was compared, for the report.
    """
    request = {
        "source": str(source.resolve()), "written": str(written.resolve()), "active": active, "dtype": dtype,
        "kept": {str(layer): list(experts) for layer, experts in kept.items()},
    }  # fmt: skip
    with step(progress, "compare tensors in a fresh process", size_bytes):
        answer = _ask(request, progress)
    if isinstance(answer, str):
        return f"the tensors could not be compared with the source: {answer}", ""
    differences = [_without(written, text) for text in answer["differences"]]
    if differences:
        more = len(differences) - _MOST_TOLD
        told = "; ".join(differences[:_MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
        return f"compared with the source in a fresh process: {told}", ""
    return None, f"{TENSORS_ALONE} ({answer['tensors']:,} tensors)"


def _ask(request: Mapping[str, Any], progress: Progress) -> dict[str, Any] | str:
    """Return the last line that the process wrote, or why there is none."""
    # It reads what may come from elsewhere and asks nobody for anything: it needs no token.
    environment = {name: value for name, value in os.environ.items() if name not in TOKEN_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as asked,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
    ):
        json.dump(request, asked)
        asked.seek(0)
        with subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER], env=environment, text=True, stdin=asked,
            stdout=subprocess.PIPE, stderr=errors,
        ) as process:  # fmt: skip
            try:
                answer = _listen(process, progress)
                process.wait()
            finally:
                process.kill()  # of no effect where it has ended
        if process.returncode == 0 and answer is not None:
            return answer
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()] or ["no message"]
        return f"the process ended with {process.returncode}: {lines[-1]}"


def _listen(process: subprocess.Popen[str], progress: Progress) -> dict[str, Any] | None:
    """Pass on how far the process is, and return its answer."""
    if process.stdout is None:
        raise ValueError("the process was started without a pipe")
    answer: dict[str, Any] | None = None
    for line in process.stdout:
        told: dict[str, Any] = json.loads(line)
        if "advance" in told:
            progress.advance(told["advance"], told["name"])
        else:
            answer = told
    return answer


def _without(folder: Path, text: str) -> str:
    """Leave out where the folder lies: a card is read elsewhere, and the folder gets another name."""
    place = str(folder.resolve())
    return text.replace(f"{place}{os.sep}", "").replace(place, "the folder")
