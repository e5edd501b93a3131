"""Which half of the blocks should stay? Depth pruning of DiT: speed at real width, quality of the built-in.

    python benchmarks/tinyfusion.py                    # hours: 5 choices, 2 recoveries, 3 seeds
    python benchmarks/tinyfusion.py --quick            # minutes: 1 seed, short searches and recoveries
    python benchmarks/tinyfusion.py --part speed       # only one of the two parts

First one forward of DiT-XL/2 with random weights, of 28 blocks and of fewer, in processor seconds; it fails
where half the blocks are less than 1.8 times as fast. Then the built-in DiT with 4 of its 8 blocks: those
that TinyFusion learns, and those of the rules it is compared with, each recovered by plain fine-tuning and by
masked distillation, with equal steps on equal data. Samples of what comes out are judged by the built-in
classifier: Frechet distance of features to the training images', and the share that shows the class asked
for. Every result is printed when it is there, so a run that is broken off has told what it measured.

A seed chooses the calibration, the training samples, the search and the order of recovery. Samples are judged
from equal noise. `random` is the choice with the middle loss of three that are drawn. In distillation blocks
are matched at the ends of the groups where a choice was learned, and without groups each block that stays
with the one before the next that stays.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import parser, say, start, table
from _depth_speed import BLOCKS, speed_table
from compress.calibration.base import Calibration
from compress.calibration.recording import record
from compress.calibration.sampler import conditions_for, sample
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.evaluation.quality import Scores, balanced_classes, judge
from compress.models.base import OpenModel
from compress.models.builtin.classifier import load_scorer
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.depth import DepthSettings, TinyFusionSettings
from compress.recipes.loader import load_recipe
from compress.recipes.recovery import MaskedDistillSettings
from compress.recipes.schema import CalibrationSettings, Recipe
from compress.recipes.stages import StageSettings

LEARNED = "learned"
RULES: dict[str, dict[str, Any]] = {
    "oracle": {"by": "oracle"},
    "shortgpt": {"by": "shortgpt"},
    "sensitivity": {"by": "sensitivity"},
    "random": {"by": "random", "draws": 3, "pick": "middle"},
}
CHOICES = (LEARNED, *RULES)
RECOVERIES: dict[str, dict[str, Any]] = {
    "fine-tuning": {"answers": 0.0, "denoising": 1.0, "features": 0.0},
    "distillation": {},
}
AT_LEAST = 1.8
"""Times as fast as all blocks that half of them have to be."""
_JUDGED_ON = 7_000_000
_SILENT = SilentProgress()


@dataclass(frozen=True)
class Result:
    """A choice, a recovery, a seed.

    Attributes:
        scores: of samples of what came out.
        seconds: that training took; 0 without.
    """

    scores: Scores
    seconds: float

    def __str__(self) -> str:
        took = f", {self.seconds:.0f} s" if self.seconds else ""
        return f"feature-FID {self.scores.fid:.3f}, class agreement {self.scores.agreement:.1%}{took}"


@dataclass(frozen=True)
class Bench:
    """What all share.

    Attributes:
        recipe: the shipped one; its model, calibration and quality settings.
        search: its first stage, perhaps shortened.
        recovery: its second, perhaps shortened.
        samples: that a model is judged by.
    """

    recipe: Recipe
    search: TinyFusionSettings
    recovery: MaskedDistillSettings
    samples: int

    def opened(self) -> OpenModel:
        """Return the original."""
        return open_model(self.recipe.model, progress=_SILENT)

    def run_seed(self, seed: int, choices: Sequence[str], folder: Path) -> Iterator[tuple[str, str, Result]]:
        """Yield (choice, recovery or "", result), each when it is there."""
        shared = folder / "shared"
        shared.mkdir()
        calibration = record(
            self.opened(), self.recipe.calibration, seed=seed, cache=shared, progress=_SILENT
        )
        known: dict[tuple[Any, ...], Result] = {}
        for choice in choices:
            pruned, chooser = self.opened(), self.chooser(choice)
            told, took = self.applied(pruned, chooser, calibration, folder / choice, shared)
            kept = told["blocks"][BLOCKS]["kept"]
            say(f"seed {seed}, {choice}: keeps {kept} after {took:.0f} s")
            for name in ("", *RECOVERIES):
                # Rules that agree are recovered once: blocks, data and order are the same.
                same = (name, *kept, choice == LEARNED)
                if same not in known:
                    place = folder / f"{choice}-{name}"
                    known[same] = self.recovered(copy.deepcopy(pruned), name, calibration, place, shared)
                yield choice, name, known[same]

    def recovered(
        self, model: OpenModel, name: str, calibration: Calibration, folder: Path, shared: Path
    ) -> Result:
        """Train a pruned model, where a recovery is named, and judge it."""
        if not name:
            return Result(self.judged(model), 0.0)
        settings = MaskedDistillSettings.model_validate({**self.recovery.model_dump(), **RECOVERIES[name]})
        _, took = self.applied(model, settings, calibration, folder, shared)
        return Result(self.judged(model), took)

    def chooser(self, choice: str) -> StageSettings:
        """Return the stage that chooses."""
        return self.search if choice == LEARNED else DepthSettings.model_validate(RULES[choice])

    def applied(
        self, model: OpenModel, settings: StageSettings, calibration: Calibration, folder: Path, shared: Path
    ) -> tuple[dict[str, Any], float]:
        """Apply a stage in place; return (what is told of it, seconds)."""
        folder.mkdir()
        began = time.monotonic()
        workspace = Workspace(folder, shared, original=self.opened)
        told = registry.get(settings.method).apply(model, settings, calibration, workspace, _SILENT)
        return told, time.monotonic() - began

    def judged(self, model: OpenModel) -> Scores:
        """Draw samples of a model and score them."""
        scorer, quality = load_scorer(), self.recipe.evaluate.quality
        assert quality is not None
        every_class = CalibrationSettings(classes=tuple(range(scorer.classes)))
        drawn = sample(
            model, conditions_for(model, every_class, self.samples, _JUDGED_ON), steps=quality.steps,
            guidance_scale=quality.guidance_scale, seed=_JUDGED_ON, batch_size=quality.batch_size,
            progress=_SILENT,
        )  # fmt: skip
        return judge(scorer, drawn, balanced_classes(self.samples, scorer.classes))


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation (of the sample)."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def row(choice: str, results: dict[tuple[str, str], list[Result]]) -> list[str]:
    """Return the line of the table about one choice."""
    cells = [choice]
    for recovery in ("", *RECOVERIES):
        found = [item.scores for item in results[choice, recovery]]
        cells += [
            spread([item.fid for item in found], 3),
            spread([100 * item.agreement for item in found], 1),
        ]
    return cells


def quality_table(bench: Bench, seeds: Sequence[int], choices: Sequence[str]) -> None:
    """Measure the second part and print it, line by line and as a table."""
    scores = bench.judged(bench.opened())
    say(f"original: {Result(scores, 0.0)}, {bench.samples:,} samples")
    say(f"search: {bench.search.steps} steps; recovery: {bench.recovery.steps} steps of either kind\n")
    results: dict[tuple[str, str], list[Result]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            for choice, recovery, result in bench.run_seed(seed, choices, Path(folder)):
                say(f"seed {seed}, {choice}, {recovery or 'not recovered'}: {result}")
                results.setdefault((choice, recovery), []).append(result)
    say()
    kinds = ("pruned", *RECOVERIES)
    table(
        ["choice", *(f"{kind}: {what}" for kind in kinds for what in ("FID", "class %"))],
        [row(choice, results) for choice in choices],
    )


def options() -> argparse.ArgumentParser:
    """Return the command line."""
    found = parser(__doc__)
    found.add_argument("--part", choices=("speed", "quality"), help="one of the two parts (default both)")
    found.add_argument("--seeds", type=int, help="how many (default 3, quick 1)")
    found.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES, help="(default all)")
    found.add_argument("--search-steps", type=int, help="of the search (default: the recipe's, quick 20)")
    found.add_argument("--steps", type=int, help="of a recovery (default: the recipe's, quick 20)")
    found.add_argument("--samples", type=int, help="that are judged (default 2000, quick 100)")
    found.add_argument("--data", type=int, help="samples to train on (default: the recipe's, quick 64)")
    found.add_argument("--batch", type=int, default=1, help="items of a timed forward (default 1)")
    found.add_argument("--rounds", type=int, help="of the timing (default 6, quick 2)")
    return found


def prepared(arguments: argparse.Namespace) -> Bench:
    """Return the second part as the command line has it."""
    quick = arguments.quick
    data = arguments.data or (64 if quick else None)
    changed = [f"calibration.data.generate={data}"] if data else []
    if quick:
        changed += ["calibration.samples=4", "calibration.steps=4", "calibration.data.steps=4"]
    for index, (key, value) in enumerate(
        {"tinyfusion": arguments.search_steps, "distill": arguments.steps}.items()
    ):
        if value or quick:
            changed.append(f"stages.{index}.{key}.steps={value or 20}")
    recipe = load_recipe("dit_tinyfusion", overrides=changed).recipe
    search, recovery = (stage.settings for stage in recipe.stages)
    assert isinstance(search, TinyFusionSettings) and isinstance(recovery, MaskedDistillSettings)
    return Bench(recipe, search, recovery, arguments.samples or (100 if quick else 2000))


def main() -> None:
    """Measure and print both parts.

    Raises:
        SystemExit: half the blocks are not as much faster as they have to be.
    """
    arguments = options().parse_args()
    start("Half the blocks of DiT: speed, and which half", arguments)
    ratio = None
    if arguments.part != "quality":
        depths = (28, 14) if arguments.quick else (28, 19, 14, 7)
        rounds = arguments.rounds or (2 if arguments.quick else 6)
        ratio = speed_table(depths, batch=arguments.batch, rounds=rounds, seed=arguments.seed)[14]
    if arguments.part != "speed":
        seeds = range(arguments.seed, arguments.seed + (arguments.seeds or (1 if arguments.quick else 3)))
        quality_table(prepared(arguments), seeds, arguments.choices)
    if ratio is not None and ratio < AT_LEAST:
        sys.exit(f"half the blocks are {ratio:.2f} times as fast; they have to be {AT_LEAST}")


if __name__ == "__main__":
    main()
