"""Verification of an exported folder by its own records: hashes, gates, manifest; torch-free.

`fresh_process.verify_export` is the other half: it runs the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CompressError, SourceError, VerifyError
from ..models.source_card import is_text_name
from ..recipes.gates import Gate, failures, judge
from ..runtime.hashes import file_sha256
from ..runtime.kv.adapter import FILE_NAME as ADAPTER_NAME
from ..runtime.kv.adapter import check_contents, is_adapter, open_adapter
from ..runtime.validate import QUANT_METHOD, open_folder, read_json
from .recorded_recipe import check_recipe

REPORT_NAME = "report.json"
MAX_REPORT_BYTES = 16 * 2**20


_Read = Callable[[], dict[str, Any]]
"""Returns the report of the folder; what it is wanted for says what is missing where it cannot be read."""
_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?", re.ASCII)


class FolderError(VerifyError):
    """A folder does not match its own records.

    Attributes:
        result: what `verify_folder` would have returned, with the failed checks.
    """

    def __init__(self, result: dict[str, Any], hint: str | None = None) -> None:
        failed = "; ".join(f"{c['name']}: {c['detail']}" for c in result["checks"] if not c["ok"])
        super().__init__(
            f"{result['path']}: {failed}", hint=hint or "fetch the folder again, or export it again"
        )
        self.result = result


def verify_folder(
    folder: str | Path, *, name: str | None = None, elsewhere: Iterable[str] = ()
) -> dict[str, Any]:
    """Check an exported folder against its own report and manifest; no model is built.

    Args:
        folder: written by a run, or a download of one.
        name: what the result calls it; None: its path.
        elsewhere: files that belong to it but were not fetched; the report must list them, too.

    Returns:
        `path`, `verified` (True) and `checks`, a list of `{name, ok, detail}`.

    Raises:
        SourceError: there is no folder.
        FolderError: a check failed; all failures are in the message.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder")
    read = _once(lambda: _report(folder))
    checks = [
        _check("report", lambda: _check_report(read)),
        _check("files", lambda: _check_files(folder, read, set(elsewhere))),
        _check("gates", lambda: _check_gates(read)),
        _check("tensors", lambda: _check_tensors(folder)),
        _check("recipe", lambda: check_recipe(folder, read())),
    ]
    result = {"path": name or str(folder), "verified": all(check["ok"] for check in checks), "checks": checks}
    if not result["verified"]:
        raise FolderError(result)
    return result


def _check(name: str, body: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "detail": body()}
    except CompressError as error:
        return {"name": name, "ok": False, "detail": error.message}
    except OSError as error:
        return {"name": name, "ok": False, "detail": f"{error.filename}: {error.strerror}"}


def _once(read: _Read) -> _Read:
    """Return a function that reads at its first call; what could not be read fails every time."""
    found: list[dict[str, Any]] = []

    def again() -> dict[str, Any]:
        if not found:
            found.append(read())
        return found[0]

    return again


def _report(folder: Path) -> dict[str, Any]:
    if not (folder / REPORT_NAME).is_file():
        raise VerifyError(f"{REPORT_NAME} is missing")
    return read_json(folder / REPORT_NAME, MAX_REPORT_BYTES)


def recorded_environment(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a report says of its machine; empty where it says nothing that can be read."""
    environment = document.get("environment")
    return environment if isinstance(environment, Mapping) else {}


def recorded_device(document: Mapping[str, Any]) -> str | None:
    """Return the device that a report names, None where it names none.

    Raises:
        SourceError: it names something else.
    """
    device = recorded_environment(document).get("device")
    if device is not None and not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        raise SourceError(f"{REPORT_NAME}: environment.device {device!r} is neither cpu nor cuda")
    return device


def is_kept(row: Mapping[str, Any]) -> bool:
    """Return whether a row of `export.files` is of a licence that was in the repository before a push.

    No run wrote it, so none can write it again. Nothing but a licence is ever kept.
    """
    return row.get("kept") is True and is_text_name(str(row["name"]))


def listed_files(folder: Path) -> list[dict[str, Any]]:
    """Return `name`, `bytes` and `sha256` of every file that a folder's report lists.

    Raises:
        VerifyError: there is no report, or it lists none.
    """
    return _listed(lambda: _report(folder))


def _listed(read: _Read) -> list[dict[str, Any]]:
    try:
        files = read()["export"]["files"]
        return [{"name": str(f["name"]), "bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for f in files]
    except (SourceError, ValueError, KeyError, TypeError, OverflowError):
        raise VerifyError(f"{REPORT_NAME} has no readable export.files") from None


def _check_report(read: _Read) -> str:
    listed = _listed(read)
    rejected = read()["export"].get("rejected")
    if rejected:
        why = "; ".join(map(str, rejected)) if isinstance(rejected, list) else str(rejected)
        raise VerifyError(f"the run rejected this result: {why}")
    return f"{len(listed)} files listed"


def _check_files(folder: Path, read: _Read, elsewhere: set[str]) -> str:
    total = 0
    listed = _listed(read)
    for entry in listed:
        name = entry["name"]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise VerifyError(f"{name!r} is not a file of this folder")
        path = folder / name
        if not path.is_file():
            raise VerifyError(f"{name!r} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise VerifyError(f"{name!r} has {path.stat().st_size} bytes, the report says {entry['bytes']}")
        if file_sha256(path) != entry["sha256"]:
            raise VerifyError(f"{name!r} has another SHA-256 than the report says")
        total += entry["bytes"]
    extra = _unlisted(folder, {entry["name"] for entry in listed}, elsewhere)
    if extra:
        more = f", nor are {len(extra) - 1} more" if len(extra) > 1 else ""
        raise VerifyError(f"{extra[0]!r} is not in the report{more}")
    return f"{total} bytes match their SHA-256"


def _unlisted(folder: Path, listed: set[str], elsewhere: set[str]) -> list[str]:
    """Return what lies in the folder besides the listed files and the report, links to folders included.

    Hidden names do not count: downloads leave some (.cache, .gitattributes), and nothing loads them.
    """
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix() for path in found} | elsewhere
    return sorted(name for name in names - listed - {REPORT_NAME} if not name.startswith("."))


def _check_tensors(folder: Path) -> str:
    if is_adapter(folder):
        adapter = open_adapter(folder)
        check_contents(adapter)
        return f"{len(adapter.tensors)} factors are those of {ADAPTER_NAME} (SHA-256)"
    stored = open_folder(folder)
    count = len(stored.manifest.quantization)
    # Other formats than our own say in their own way which layers they quantize; their library reads it.
    quantized = f", {count} of the layers quantized" if stored.quant_method in (None, QUANT_METHOD) else ""
    return f"{len(stored.tensors)} tensors fit config and manifest{quantized}"


def _check_gates(read: _Read) -> str:
    """Judge the recipe's gates anew by the recorded metrics; the recorded rows must say the same."""
    try:
        document = read()
        required = {str(name): Gate.parse(text) for name, text in document["recipe"]["require"].items()}
        rows = judge(required, dict(document["evaluation"]["metrics"]))
        recorded = document["gates"]
    except (SourceError, ValueError, KeyError, TypeError, AttributeError):
        raise VerifyError(f"{REPORT_NAME} has no readable gates and metrics") from None
    if recorded != rows:
        raise VerifyError("the gates of the report are not those of its recipe and its metrics")
    if failures(rows):
        raise VerifyError("; ".join(failures(rows)))
    return f"{len(rows)} hold by the recorded figures" if rows else "the recipe requires nothing"
