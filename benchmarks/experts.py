"""Which experts should stay? EEP and simpler rules on the built-in mixture of experts.

    python benchmarks/experts.py                     # 2 tasks, 4 and 2 of 8 experts, 3 searches of each
    python benchmarks/experts.py --quick             # 1 task, 4 experts, 1 short search
    python benchmarks/experts.py --json experts.json

The model does six tasks; each search keeps experts for one of them. Fitness is the share of right tokens on
128 strings; everything in the table is measured on 512 others, as models that stock code could open (but for
`free`). `random` is the mean of 30 choices with their standard deviation. EEP chooses experts, then merges
them: with random choices to start from, as published; with those of the three rules among them; and, with
these, while the router's weights are mixed as well (`free`). Seconds are those of all evaluations of one
search.

It fails where the method does not do what it is for: where the chosen experts are not better on the test
strings than the mean random choice in every setting, and by 2 standard deviations in three of four; worse on
the train strings than the best rule that they started from; or where merging ends worse there than choosing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import parser, say, start, table
from compress.calibration.text import NoText
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.experts import HEURISTICS, EepSettings
from compress.recipes.schema import ModelRef

MODEL = "builtin:moe"
TASKS = ("sort", "prefix_sum")
KEPT = (4, 2)
SEARCHES: dict[str, dict[str, Any]] = {
    "random start": {"seed_heuristics": False},
    "with the rules": {},
    "free": {"router": "free", "export": "custom"},
}
DEVIATIONS = 2.0
"""How far above the mean random choice the chosen experts have to be, in most settings."""
_CHOSEN, _FOUND, _SEARCH = "eep: experts chosen", "eep", "evolution"


class Watch(SilentProgress):
    """Measures how long the evaluations of a search take.

    Attributes:
        seconds: of all of them.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._open: list[tuple[str, float]] = []

    def start(self, label: str, total: int | None) -> None:
        """Remember when a step began."""
        self._open.append((label, time.monotonic()))

    def finish(self, completed: bool = True) -> None:
        """Add the time of a step, if it is the one that is measured."""
        label, began = self._open.pop()
        if label == _SEARCH:
            self.seconds += time.monotonic() - began


@dataclass(frozen=True)
class Result:
    """One search.

    Attributes:
        rows: name -> what the report has of it.
        seconds: of its evaluations.
    """

    rows: Mapping[str, Mapping[str, Any]]
    seconds: float

    @property
    def chosen(self) -> Mapping[str, Any]:
        """What the first phase ended with; the same as the end where merging found nothing better."""
        return self.rows.get(_CHOSEN, self.rows[_FOUND])

    @property
    def found(self) -> Mapping[str, Any]:
        """What the search ended with."""
        return self.rows[_FOUND]

    @property
    def deviations(self) -> float:
        """How many standard deviations the chosen experts are above the mean random choice."""
        chance = self.rows["random"]
        return (self.chosen["accuracy"] - chance["accuracy"]) / max(chance["deviation"], 1e-9)


def searched(task: str, kept: int, name: str, arguments: argparse.Namespace) -> Result:
    """Search once and return its scores.

    Args:
        task: whose accuracy counts.
        kept: experts of a layer that stay.
        name: of `SEARCHES`.
        arguments: the command line.
    """
    budget = {"prune_evals": 40, "total_evals": 60, "random_draws": 8} if arguments.quick else {}
    settings = EepSettings.model_validate({
        "keep_experts": kept, "fitness": {"by": "tokens", "task": task}, **budget, **SEARCHES[name],
    })  # fmt: skip
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(ModelRef(id=arguments.model), progress=SilentProgress())
        workspace = Workspace(Path(folder), Path(folder))
        told = registry.get(settings.method).apply(model, settings, NoText(arguments.seed), workspace, watch)
    return Result({row["name"]: row for row in told["scores"]}, watch.seconds)


def percent(row: Mapping[str, Any]) -> str:
    """Return an accuracy, with its spread where there is one."""
    spread = f"+-{100 * row['deviation']:.1f}" if row.get("deviation") is not None else ""
    return f"{100 * row['accuracy']:.1f}{spread}"


def line(setting: str, results: Mapping[str, Result]) -> list[str]:
    """Return the row of the table about one setting."""
    first = next(iter(results.values()))
    cells = [setting, *(percent(first.rows[name]) for name in ("original", "random", *HEURISTICS))]
    cells += [f"{percent(result.chosen)} -> {percent(result.found)}" for result in results.values()]
    seeded = results.get("with the rules", first)
    return [*cells, f"{seeded.deviations:.1f}", f"{max(one.seconds for one in results.values()):.0f}"]


def problems(settings: Mapping[str, Mapping[str, Result]], quick: bool) -> list[str]:
    """Return what the method did not do; see the module."""
    found, near = [], 0
    for setting, results in settings.items():
        for name, result in results.items():
            rows, chosen = result.rows, result.chosen
            if chosen["accuracy"] <= rows["random"]["accuracy"]:
                found.append(
                    f"{setting}, {name}: the chosen experts are not better than the mean random choice"
                )
            if result.found["train"] < chosen["train"]:
                found.append(f"{setting}, {name}: merging ended worse than choosing did")
            best = max(rows[rule]["train"] for rule in HEURISTICS)
            if name != "random start" and chosen["train"] < best:
                found.append(f"{setting}, {name}: worse than a rule that it started from")
        near += "with the rules" in results and results["with the rules"].deviations < DEVIATIONS
    if near > 1 and not quick:
        found.append(f"{near} of {len(settings)} settings: less than {DEVIATIONS:g} deviations above random")
    return found


def write_json(file: Path, settings: Mapping[str, Mapping[str, Result]]) -> None:
    """Write all scores and times."""
    values = {
        setting: {
            name: {"scores": list(result.rows.values()), "seconds": round(result.seconds, 1)}
            for name, result in results.items()
        }
        for setting, results in settings.items()
    }
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def options() -> argparse.ArgumentParser:
    """Return the command line."""
    found = parser(__doc__)
    found.add_argument(
        "--model", default=MODEL, help=f"another mixture with items of these tasks (default {MODEL})"
    )
    found.add_argument(
        "--searches", nargs="+", choices=tuple(SEARCHES), help="(default all; quick: with the rules)"
    )
    found.add_argument("--json", type=Path, help="file for all scores")
    found.add_argument("--tasks", nargs="+", default=None, help=f"(default {' '.join(TASKS)}; quick: sort)")
    found.add_argument("--kept", nargs="+", type=int, default=None, help="experts (default 4 2; quick: 4)")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises:
        SystemExit: the method does not do what it is for.
    """
    arguments = options().parse_args(argv)
    quick = arguments.quick
    start("EEP on the built-in mixture of experts: right tokens on unseen strings, %", arguments)
    settings: dict[str, dict[str, Result]] = {}
    for task in arguments.tasks or (TASKS[:1] if quick else TASKS):
        for kept in arguments.kept or (KEPT[:1] if quick else KEPT):
            results = settings.setdefault(f"{task}, {kept}", {})
            for name in arguments.searches or (("with the rules",) if quick else SEARCHES):
                results[name] = searched(task, kept, name, arguments)
                told = f"{percent(results[name].chosen)} -> {percent(results[name].found)}"
                say(f"{task}, {kept}, {name}: {told} in {results[name].seconds:.0f} s")
    say()
    searches = list(next(iter(settings.values())))
    table(
        ["task, experts", "original", "random", *HEURISTICS, *(f"EEP, {name}" for name in searches),
         "deviations", "seconds"],
        [line(setting, results) for setting, results in settings.items()],
    )  # fmt: skip
    if arguments.json:
        write_json(arguments.json, settings)
    if found := problems(settings, quick):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
