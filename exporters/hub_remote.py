"""What was pushed, downloaded again into an empty cache and verified as a user would get it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import CompressError, PlanError, VerifyError
from ..progress import Progress, step
from .hub_bundle import Bundle
from .hub_repository import RemoteRepository
from .verify import REPORT_NAME, verify_folder

_SPARE_BYTES = 16 << 20


def check_room(place: Path, size: int) -> None:
    """Refuse a push whose download would not fit on the disk.

    Raises:
        PlanError: with both numbers.
    """
    free = shutil.disk_usage(place).free
    if free < size + _SPARE_BYTES:
        raise PlanError(
            f"{place}: {free / 1e9:.2f} GB are free, and the download that verifies the push takes"
            f" {size / 1e9:.2f} GB",
            hint="free some space, or push with --no-verify-remote",
        )


def verify_remote(
    repository: RemoteRepository, commit: str, bundle: Bundle, scratch: Path, progress: Progress
) -> tuple[str, ...]:
    """Download a commit into an empty cache, check it, and run it next to the folder it came from.

    Args:
        repository: that was pushed to.
        commit: that was made.
        bundle: what it should hold.
        scratch: an empty folder; removed by the caller.
        progress: gets one step.

    Returns:
        What could not be checked, one sentence each.

    Raises:
        HubError: the download failed.
        VerifyError: the commit is not what was sent, or computes something else.
    """
    from .folder_comparison import compare_folders

    where = f"{repository.repo}@{commit}"
    with step(progress, f"verify {repository.repo}@{commit[:12]}"):
        snapshot = Path(
            repository.ask(
                f"downloading the commit {commit} to verify it",
                lambda: repository.api.snapshot_download(repository.repo, revision=commit, cache_dir=scratch),
            )
        )
        try:
            verify_folder(snapshot)
        except CompressError as error:
            raise _damaged(where, error.message.replace(f"{snapshot}: ", "")) from None
        if (snapshot / REPORT_NAME).read_bytes() != bundle.report:
            raise _damaged(where, f"{REPORT_NAME} is not the one that was sent")
        device = str(bundle.document["environment"].get("device", "cpu"))
        comparison = compare_folders(bundle.folder, snapshot, device=device, progress=progress)
    if comparison.failure is not None:
        raise _damaged(where, comparison.failure)
    return comparison.notes


def _damaged(where: str, why: str) -> VerifyError:
    return VerifyError(
        f"{where}: does not verify after a download: {why}",
        hint="do not use this commit; push again, and see that the Hub gives back what it was sent",
    )
