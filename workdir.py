"""The work directory: finished stages under the hash of what made them, a lock, a journal.

    .compress/
      lock                       held by the one run that works here
      events.jsonl               what happened, one JSON object a line
      calibration/  reference/   recorded inputs and original outputs, by content hash
      measured/                  what stages measured and others can use again, by content hash
      stages/KEY/                checkpoint after a stage, with stage.json and the hashes of its files
      stages/KEY.working/        what an unfinished stage has kept so far

A stage folder gets its name by a rename after everything in it is on the disk: what has a final name
is whole. A changed recipe, input, seed or version changes the key, so old state is never reused.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StageError
from .recipes.secrets import redact
from .runtime.atomic import atomic_folder, remove_folder, sweep_partials
from .runtime.hashes import digest, file_sha256

__all__ = ["RECORD", "WorkDirectory", "digest", "file_sha256"]

RECORD = "stage.json"
_WORKING = ".working"


class WorkDirectory:
    """State of runs that survives a kill; see the module's docstring for its layout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calibration = root / "calibration"
        self.reference = root / "reference"
        self.measured = root / "measured"
        self._stages = root / "stages"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one run and clear what killed runs left half-written.

        Raises:
            StageError: another process works here.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StageError(
                    f"{self.root}: another run is working in this directory",
                    hint="wait for it, or give this run a directory of its own with --work-dir",
                ) from None
            for folder in (self._stages, self.calibration, self.reference):
                sweep_partials(folder)
            self._sweep_working()
            yield

    def _sweep_working(self) -> None:
        """Clear what stages kept that are finished: a kill between their last rename and its deletion."""
        for working in self._stages.glob(f"*{_WORKING}"):
            finished = working.with_name(working.name.removesuffix(_WORKING))
            if (finished / RECORD).is_file():
                remove_folder(working)

    def log(self, event: str, **fields: Any) -> None:
        """Append one event to the journal."""
        line = redact(json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str))
        with (self.root / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def stage_folder(self, key: str, method: str) -> Path:
        """Return where the stage with `key` is kept, whether or not it is there."""
        return self._stages / f"{method}-{key[:32]}"

    def working_folder(self, folder: Path) -> Path:
        """Return where the stage that is kept in `folder` keeps what it has so far; made here."""
        working = self._working(folder)
        working.mkdir(parents=True, exist_ok=True)
        return working

    def _working(self, folder: Path) -> Path:
        return folder.with_name(folder.name + _WORKING)

    def read_stage(self, folder: Path) -> dict[str, Any] | None:
        """Return the record of a finished stage, or None where it is absent or was damaged."""
        record_path = folder / RECORD
        if not record_path.is_file():
            return None
        record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
        for name, expected in record["files"].items():
            path = folder / name
            if not path.is_file() or file_sha256(path) != expected:
                self.log("stage_damaged", folder=folder.name, file=name)
                return None
        return record

    def write_stage(self, folder: Path, record: dict[str, Any], write: Callable[[Path], object]) -> None:
        """Save a finished stage: `write` fills a temporary folder, which then gets its name."""
        if folder.exists():  # damaged, or no longer wanted by a fresh run
            remove_folder(folder)
        with atomic_folder(folder) as temporary:
            write(temporary)
            files = {
                path.relative_to(temporary).as_posix(): file_sha256(path)
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            text = json.dumps({**record, "files": files}, indent=1)
            (temporary / RECORD).write_text(text + "\n", encoding="utf-8")
        if self._working(folder).exists():
            remove_folder(self._working(folder))
