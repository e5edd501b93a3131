"""A program of its own: aligns in a child that dies at the n-th rename, then once more; for every n.

Children are forked, so that what takes seconds to import is imported once; no thread runs before.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import SamModel  # noqa: F401  (what the children need)

# Test folders are no packages; this makes their relative imports work here, too.
_TESTS = types.ModuleType("tests")
_TESTS.__path__ = [str(Path(__file__).resolve().parents[3])]
sys.modules["tests"] = _TESTS
from tests.compressors.pruning.sam.learners import (  # noqa: E402
    ScriptedJudge,
    Told,
    models,
    run_align,
    settings_of,
)

STEPS, SCRIPT = (0, 3, 5, 8, 10, 12), (1.0, 3.0, 2.0, 4.0, 4.5, 2.0)


def left_of(folder: Path) -> Sequence[float]:
    """Return the values that are still asked for, by how many steps the state on disk has."""
    path = folder / "training.safetensors"
    if not path.is_file():
        return SCRIPT
    with safe_open(path, framework="pt") as file:
        done = len(file.get_tensor("losses"))
    return [value for step, value in zip(STEPS, SCRIPT, strict=True) if step > done]


def die_at(number: int, after: bool) -> None:
    """Kill this process just before or just after its n-th rename: nothing else makes a file whole."""
    rename, done = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        done.append(target)
        if len(done) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = rename(path, target)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Path.replace = replace


def align_apart(folder: Path, death: tuple[int, bool] | None = None) -> int:
    """Align in a child; return its status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        if death is not None:
            die_at(*death)
        original, first, _ = models()
        judge, told = ScriptedJudge(*left_of(folder)), Told()
        found = run_align(first, original, judge, folder, settings=settings_of(steps=12), progress=told)
        assert not told.warnings, told.warnings
        save_file(
            {name: item.detach() for name, item in first.vision_encoder.named_parameters()}, folder / "end"
        )
        (folder / "told").write_text(f"{found.losses} {found.rates} {found.epochs} {found.best_step}")
        print(folder.name, "resumed at", found.resumed_at, flush=True)
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def ends(folder: Path) -> list[bytes]:
    """Return the bytes of what an aligning ended with."""
    return [(folder / name).read_bytes() for name in ("end", "told")]


def main(root: Path) -> None:
    """Kill at every rename until there is none any more; print how often."""
    assert align_apart(root / "whole") == 0
    deaths, alive = 0, False
    while not alive:
        for after in (False, True):
            number = deaths // 2 + 1
            folder = root / f"{number}-{after}"
            status = align_apart(folder, (number, after))
            alive = not os.WIFSIGNALED(status)
            if alive:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL and not (folder / "end").exists()
            deaths += 1
            assert align_apart(folder) == 0
            assert ends(folder) == ends(root / "whole"), folder
            left = sorted(path.name for path in folder.iterdir())
            assert left == ["aligned.json", "best-10.safetensors", "end", "told"], left
    assert status == 0
    print("deaths", deaths)


main(Path(sys.argv[1]))
