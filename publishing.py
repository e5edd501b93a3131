"""The end of a run: every variant gets its name or is set aside, and what the recipe pushes is pushed.

All variants lie under hidden names until the last of them is finished. Those that hold get their
names, the others are kept as NAME.rejected, and their reports say why under `export.rejected`. Only
a run in which every variant holds pushes anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import preflight
from .errors import (
    CompressError,
    HubError,
    InterruptedPush,
    StageError,
    TagTakenError,
    UsageError,
    VerifyError,
)
from .recipes.export import ExportSettings, PushSettings
from .runtime.atomic import commit_folder, replace_folder, sync_tree
from .state import Run
from .variants import Variant, record_rejection

LISTED_KEYS = ("evaluation", "gates", "export")
"""Top keys of the report that are lists where a run makes several variants."""


def settle(state: Run, variants: Sequence[Variant]) -> dict[str, Any]:
    """Give every folder its final name, or keep it as NAME.rejected; nothing foreign is replaced.

    Returns:
        The report of the run: of one variant its own, of several one with lists, see `combined`.

    Raises:
        UsageError: something that compress did not write has appeared under a name meanwhile.
        VerifyError: the verification, a gate, or under `strict` a warning speaks against a variant.
    """
    reasons = [_reasons(state, variant) for variant in variants]
    places = [_place(variant, why) for variant, why in zip(variants, reasons, strict=True)]
    for variant, place, why in zip(variants, places, reasons, strict=True):
        preflight.check_target(place, overwrite=bool(why) or overwrites(state, variant.export))
    for variant, why in zip(variants, reasons, strict=True):
        if why:
            record_rejection(variant, why)
    for variant in variants:  # the slow part comes first, so that the names follow close on each other
        sync_tree(variant.folder)
    for variant, place, why in zip(variants, places, reasons, strict=True):
        if place.exists():
            replace_folder(variant.folder, place)
        else:
            commit_folder(variant.folder, place)
        if why:
            state.work.log("rejected", path=str(place), reasons=why)
        else:
            state.work.log("published", path=str(place))
    if any(reasons):
        raise _rejection(variants, places, reasons)
    return combined([variant.document for variant in variants])


def overwrites(state: Run, export: ExportSettings) -> bool:
    """Tell whether an older result under this export's name may be replaced."""
    return export.overwrite if state.overwrite is None else state.overwrite


def combined(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one report of a run: `evaluation`, `gates` and `export` become lists where it made several."""
    if len(documents) == 1:
        return documents[0]
    # The last one was finished last: its `environment` holds the time and the memory of the whole run.
    return {
        key: [document[key] for document in documents] if key in LISTED_KEYS else value
        for key, value in documents[-1].items()
    }


def push_all(state: Run, document: dict[str, Any]) -> None:
    """Push what the recipe says, in its order, and note under `export.push` where it went.

    Args:
        state: the run.
        document: what `settle` returned; gets the results. The folders' own reports stay as they are:
            they are what was pushed.

    Raises:
        HubError: the network or the Hub refused.
        VerifyError: what came back from the Hub is not what was sent.
        UsageError: a file holds an access token.
        StageError: this machine's disk, or anything else, refused.
        InterruptedPush: somebody ended it.
        The folders stay, the hint has the commands that push what is left, and `pushed` says what is on
        the Hub already.
    """
    exports = state.recipe.export
    if not any(export.push for export in exports):
        return
    from .exporters import hub

    parts = document["export"] if isinstance(document["export"], list) else [document["export"]]
    for export, part in zip(exports, parts, strict=True):
        if export.push is not None and not part["verified"]:
            raise VerifyError(
                f"{export.path}: was not executed when it was verified, so nothing was pushed",
                hint="its notes in report.json say why; the folder itself is finished",
            )
    pushes = [(export.path, export.push) for export in exports if export.push is not None]
    done: dict[str, Mapping[str, Any]] = {}
    for index, (path, push) in enumerate(pushes):
        try:
            done[str(path)] = hub.push_folder(Path(path), push, progress=state.progress).to_json()
            _log(state, "pushed", path=str(path), **done[str(path)])
        except (CompressError, InterruptedPush, KeyboardInterrupt, OSError) as error:
            told = _not_pushed(error, pushes[index:], done)
            _log(state, "push_failed", path=str(path), repo=push.repo, error=told.message)
            raise told from error
    for export, part in zip(exports, parts, strict=True):
        if export.push is not None:
            part["push"] = done[str(export.path)]


def _log(state: Run, event: str, **fields: Any) -> None:
    """Log what became of a push; a journal that cannot be written must not hide it."""
    try:
        state.work.log(event, **fields)
    except OSError as error:
        state.progress.warn(f"the journal misses that {fields['path']} was {event}: {error}")


def _not_pushed(
    error: BaseException, left: Sequence[tuple[Path, PushSettings]], done: Mapping[str, Mapping[str, Any]]
) -> CompressError | InterruptedPush:
    """Say what is on the disk and on the Hub, and how to push the rest without running the recipe again."""
    path, first = left[0]
    if isinstance(error, TagTakenError):
        first = first.model_copy(update={"tag": None})
    commands = [preflight.push_command(folder, push) for folder, push in [(path, first), *left[1:]]]
    hint = getattr(error, "hint", None)
    cause = f"{hint}; then " if hint else ""
    hint = f"{cause}push the finished folder{'s' if len(commands) > 1 else ''} by: {' && '.join(commands)}"
    push = getattr(error, "push", None)
    head = f"{path} is finished" + ("" if push else " but was not pushed")
    told: CompressError | InterruptedPush
    if isinstance(error, KeyboardInterrupt):
        told = InterruptedPush(f"{head}: {getattr(error, 'message', 'interrupted')}", hint=hint, push=push)
    else:
        # What else refuses after hours of work, such as a full disk, is no matter of the plan any more.
        kinds = (HubError, VerifyError, UsageError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), StageError)
        told = kind(f"{head}: {getattr(error, 'message', error)}", hint=hint, push=push)
    told.pushed = {**done, str(path): push} if push else dict(done)
    return told


def _reasons(state: Run, variant: Variant) -> list[str]:
    """Return what speaks against publishing."""
    reasons = [
        f"{row['metric']} is {_figure(row['measured'])}, required {row['expected']}"
        for row in variant.document["gates"]
        if not row["passed"]
    ]
    if variant.failure is not None:
        reasons.insert(0, variant.failure)
    if state.strict:
        reasons.extend(f"warning under --strict: {message}" for message in state.progress.messages)
    return reasons


def _place(variant: Variant, reasons: Sequence[str]) -> Path:
    target = Path(variant.export.path)
    if not reasons:
        return target
    # Nothing foreign is replaced, and nothing foreign may cost the run's result or hide why it was refused.
    return next(place for place in preflight.rejected_places(target) if not _taken(place))


def _taken(place: Path) -> bool:
    return place.is_symlink() or (place.exists() and preflight.not_ours(place) is not None)


def _rejection(
    variants: Sequence[Variant], places: Sequence[Path], reasons: Sequence[Sequence[str]]
) -> VerifyError:
    rejected = [
        (variant.export.path, place, why)
        for variant, place, why in zip(variants, places, reasons, strict=True)
        if why
    ]
    kept = ", ".join(str(place) for _, place, _ in rejected)
    if len(variants) == 1:
        hint = f"nothing was published; the result is kept in {kept}"
        return VerifyError("; ".join(reasons[0]), hint=hint)
    message = "; ".join(f"{path}: {', '.join(why)}" for path, _, why in rejected)
    passed = ", ".join(str(place) for place, why in zip(places, reasons, strict=True) if not why)
    hint = f"nothing was pushed; what was refused is kept in {kept}"
    return VerifyError(message, hint=hint + (f", what passed is in {passed}" if passed else ""))


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
