"""One recipe after the other: read them all, carry them out, tell how each of them ended."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UsageError, VerifyError
from . import _github, _render
from ._errors import DEFECT, INTERRUPTED, Failure, classify
from ._tables import Table

if TYPE_CHECKING:
    from ..recipes.loader import LoadedRecipe
    from ..recipes.workers import Workers
    from ._output import Output
    from ._tables import Section

T = TypeVar("T")

_SECONDS = 1.0  # by which a file system may round the time of a change


@dataclass(frozen=True)
class How:
    """The options of `run` that no recipe holds; see `pipeline.run`."""

    work_dir: Path
    fresh: bool = False
    overwrite: bool | None = None
    strict: bool = False
    workers: Workers = 1


@dataclass
class Ending:
    """How one recipe ended.

    Attributes:
        recipe: as it was given.
        report: what the run returned; None where it failed.
        failure: None where it succeeded, or was not started.
        results: one report in the single form per folder, also of folders that were refused or could
            not be pushed; their `export.path` is where they lie.
        error: what was raised.
    """

    recipe: str
    report: dict[str, Any] | None = None
    failure: Failure | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = field(default=None, repr=False)

    @property
    def exit_code(self) -> int | None:
        """The exit code that this recipe alone would give; None: it was not started."""
        if self.failure is not None:
            return self.failure.exit_code
        return None if self.report is None else 0

    def to_json(self) -> dict[str, Any]:
        """Return the row of `runs` in the document of several recipes."""
        ending = {"report": self.report} if self.failure is None else self.failure.to_json()
        return {"recipe": self.recipe, "exit_code": self.exit_code, **ending}


def worst(codes: Sequence[int]) -> int:
    """Return the code that the whole command ends with: an interruption, a defect, else the largest."""
    for code in (INTERRUPTED, DEFECT):
        if code in codes:
            return code
    return max(codes, default=0)


def carry_out(sink: Output, recipes: Sequence[str], load: Callable[[str], LoadedRecipe], how: How) -> int:
    """Carry out recipes in order and return the exit code; every ending is told and passed to the CI.

    Nothing starts unless all of them can be read and none is in another's way.

    Args:
        sink: takes what is said.
        recipes: at least one.
        load: reads one of them.
        how: options for all of them.
    """
    endings = [Ending(name) for name in recipes]
    loaded: list[LoadedRecipe] = []
    for ending in endings:
        found = _attempt(sink, ending, partial(_load_apart, load, ending.recipe, tuple(loaded)))
        if found is not None:
            loaded.append(found)
        _tell(sink, ending)
    if len(loaded) == len(endings):
        for number, (ending, recipe) in enumerate(zip(endings, loaded, strict=True), 1):
            if len(endings) > 1:
                sink.message(f"[{number}/{len(endings)}] {ending.recipe}", "bold")
            _carry_out_one(sink, ending, recipe, how)
            if ending.exit_code == INTERRUPTED:
                break
    _tell_all(sink, endings)
    return worst([ending.exit_code for ending in endings if ending.exit_code is not None])


def _attempt(sink: Output, ending: Ending, body: Callable[[], T]) -> T | None:
    """Do something for one recipe; an error becomes its ending."""
    try:
        return body()
    except (Exception, KeyboardInterrupt) as error:
        ending.failure = classify(error, started=sink.started, log_folder=sink.log_folder)
        ending.error = error
    return None


def _tell(sink: Output, ending: Ending) -> None:
    if ending.failure is not None:
        sink.tell(ending.failure, ending.error)


def _load_apart(
    load: Callable[[str], LoadedRecipe], name: str, others: Sequence[LoadedRecipe]
) -> LoadedRecipe:
    """Load a recipe; refuse one whose results would be in the way of another recipe's.

    Raises:
        UsageError: naming both places.
    """
    from ..recipes.export import clash

    loaded = load(name)
    for other in others:
        found = clash([*other.recipe.export, *loaded.recipe.export])
        if found is not None:
            _, message, hint = found
            raise UsageError(f"{loaded.file} and {other.file}: {message}", hint=hint)
    return loaded


def _carry_out_one(sink: Output, ending: Ending, loaded: LoadedRecipe, how: How) -> None:
    from .. import pipeline

    sink.started = False
    began = time.time()

    def body() -> dict[str, Any]:
        with sink.progress() as progress:
            return pipeline.run(
                loaded,
                work_dir=how.work_dir,
                fresh=how.fresh,
                overwrite=how.overwrite,
                strict=how.strict,
                workers=how.workers,
                progress=progress,
            )

    ending.report = _attempt(sink, ending, body)
    sections: list[Section]
    if ending.report is not None:
        ending.results = _render.single_reports(ending.report)
        sections = _render.report(ending.report)
    else:
        # Only these end a run that has given folders their names; others left what was there before.
        pushed = getattr(ending.error, "pushed", None)
        named = isinstance(ending.error, VerifyError) or pushed is not None
        ending.results = _left_behind(loaded, began, pushed or {}) if named else []
        sections = [section for result in ending.results for section in _render.judgement(result)]
    if not sink.as_json:
        sink.result(ending.report, sections)
    _tell(sink, ending)
    _summarise(sink, ending, sections)


def _left_behind(
    loaded: LoadedRecipe, began: float, pushed: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the reports of the folders that a failed run left: refused ones, and good ones beside them."""
    from ..preflight import rejected_places

    found: list[dict[str, Any]] = []
    for export in loaded.recipe.export:
        for folder in (export.path, *takewhile(os.path.lexists, rejected_places(export.path))):
            path = folder / "report.json"
            if not path.is_file() or path.stat().st_mtime < began - _SECONDS:  # none, or an earlier run's
                continue
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            push = {"push": pushed[str(folder)]} if str(folder) in pushed else {}
            found.append({**report, "export": {**report["export"], "path": str(folder), **push}})
    return found


def _summarise(sink: Output, ending: Ending, sections: Sequence[Section]) -> None:
    """Append one recipe's part to the job summary, as soon as it has ended."""
    name, failure = Path(ending.recipe).stem, ending.failure
    if failure is None:
        title, extra = f"compress: {name}", []
    else:
        rejected = isinstance(ending.error, VerifyError) and ending.error.pushed is None
        title = f"compress: {name} {'FAILED' if not rejected else 'was REJECTED'}"
        extra = [f"exit code {failure.exit_code}: {failure.message}"]
        extra += [f"hint: {failure.hint}"] if failure.hint else []
    _warn(sink, _github.summarise(title, [*extra, *sections]))


def _tell_all(sink: Output, endings: Sequence[Ending]) -> None:
    """Show the whole, pass the outputs on, and say what to do next."""
    several = len(endings) > 1
    if several:
        table = overview(endings)
        sink.result({"runs": [ending.to_json() for ending in endings]}, [table])
        _warn(sink, _github.summarise("compress: all recipes", [table]))
    elif sink.as_json:
        (ending,) = endings
        sink.document(ending.report if ending.failure is None else ending.failure.to_json())
    codes = [ending.exit_code for ending in endings if ending.exit_code is not None]
    rows = [(ending.recipe, result) for ending in endings for result in ending.results]
    complete = all(ending.results for ending in endings)
    _warn(sink, _github.write_outputs(_github.outputs_of(rows, worst(codes), complete=complete)))
    if not several and endings[0].failure is None:
        sink.hint(next_command(endings[0].results[0]))


def next_command(result: dict[str, Any]) -> str:
    """Return what a user may want to do with a result."""
    push = result["export"].get("push")
    if push is None:
        return shlex.join(["compress", "inspect", result["export"]["path"]])
    words = ["compress", "verify", push["repo"]]
    return shlex.join([*words, "--revision", push["commit"]] if push.get("commit") else words)


def overview(endings: Sequence[Ending]) -> Table:
    """Return one row per recipe: how it ended, and where its results lie."""
    rows = []
    for ending in endings:
        if ending.exit_code is None:
            how = "not started"
        elif ending.failure is None:
            how = "done"
        else:
            how = f"exit code {ending.exit_code}: {ending.failure.kind}"
        places = [str(result["export"]["path"]) for result in ending.results]
        pushes = [result["export"]["push"] for result in ending.results if "push" in result["export"]]
        rows.append([ending.recipe, how, ", ".join([*places, *(push["url"] for push in pushes)])])
    return Table("recipes", ["recipe", "ending", "results"], rows)


def _warn(sink: Output, message: str | None) -> None:
    if message is not None:
        sink.warning(message)
