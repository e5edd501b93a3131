"""Peak memory of a whole run on DiT-XL/2 with random bf16 weights: W4A8, 4 samples x 4 steps.

Writes the checkpoint into a temporary folder, runs `compress run` on it as a user would, and prints
the peak resident memory of its largest process (from the kernel) and of all its processes together
(sampled), beside 1.6 x the bf16 weights + 1.5 GB. The evaluation is the default one but for its
number of steps, which does not change the peak: calls are kept on disk.

The exit status is that of the run; where that succeeds it is 1 if the largest process is over budget.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from _common import parser, say, start, table
from _dit_xl import write_random

ALLOWANCE_BYTES = 1_500_000_000
WEIGHTS_FACTOR = 1.6
_POLL_SECONDS = 0.05


def recipe(model: Path, target: Path, batch_size: int) -> dict[str, Any]:
    """Return the recipe of the measured run; the evaluation's batch is the default one."""
    return {
        "model": str(model),
        "calibration": {"samples": 4, "steps": 4, "guidance_scale": 4.0, "batch_size": batch_size},
        "stages": [{"vidit_q": {"weight_bits": 4, "activation_bits": 8, "adaln_weight_bits": 8}}],
        "evaluate": {"fidelity": {"steps": 2}},
        "export": {"path": str(target)},
    }


def _tree_bytes(process: psutil.Process) -> int:
    """Return the resident bytes of a process and all below it; pages that they share count twice."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        return total
    return total


def watch(command: list[str], folder: Path, threads: int) -> tuple[int, int, float]:
    """Run a command.

    Returns:
        Its exit status, the peak bytes of the process tree, and the seconds it took.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, _tree_bytes(process))
            time.sleep(_POLL_SECONDS)
    return child.returncode, peak, time.perf_counter() - began


def measure(folder: Path, arguments: argparse.Namespace) -> int:
    """Write the model, run, and print; return the exit status."""
    blocks = 4 if arguments.quick else 28
    model = write_random(folder / "model", blocks, torch.bfloat16, arguments.seed)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    target = folder / "out"
    (folder / "recipe.json").write_text(json.dumps(recipe(model, target, arguments.batch_size)))
    program = "import sys; from compress.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "run", "recipe.json", "--quiet"]
    status, tree, seconds = watch(command, folder, arguments.threads)
    largest = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    budget = WEIGHTS_FACTOR * weights + ALLOWANCE_BYTES
    written = sum(path.stat().st_size for path in target.glob("*.safetensors")) if target.is_dir() else 0
    say(f"{blocks} blocks; exit status {status} after {seconds:.0f} s")
    table(
        ["", "bytes", "of the budget"],
        [
            ["bf16 weights", f"{weights:,}", ""],
            ["budget: 1.6 x weights + 1.5 GB", f"{budget:,.0f}", "100 %"],
            ["peak of the largest process", f"{largest:,}", f"{100 * largest / budget:.0f} %"],
            ["peak of all processes together", f"{tree:,}", f"{100 * tree / budget:.0f} %"],
            ["weights written", f"{written:,}", ""],
        ],
    )
    return status or verdict(largest, budget)


def verdict(largest: int, budget: float) -> int:
    """Return the exit status for the peak bytes of the largest process, and say why where it is over."""
    if largest <= budget:
        return 0
    say(f"OVER BUDGET: the largest process took {largest:,} bytes, {budget:,.0f} are allowed")
    return 1


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=4, help="samples computed together (default 4)")
    options.add_argument("--scratch", type=Path, help="folder for about 4 GB (default: the system's)")
    arguments = options.parse_args()
    start("Peak memory of a W4A8 run on DiT-XL/2", arguments)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        sys.exit(measure(Path(scratch), arguments))


if __name__ == "__main__":
    main()
