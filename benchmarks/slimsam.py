"""What counts in SlimSAM? Ways to slim the built-in Segment Anything model at equal steps, over 3 seeds.

    python benchmarks/slimsam.py            # 3 seeds
    python benchmarks/slimsam.py --quick    # 1 seed, few steps

Alternate slimming beside one step, inner features beside outputs alone, disturbed Taylor scores beside weight
magnitude and chance, the paper's way beside the official code's (tables from zero, keys not folded), layers
that compete beside uniform ones. Every way takes as many steps in all, on the same images in the same order,
and is judged on held-out images. The seed chooses the images of scores and of the choice, the noise, and the
order of the training. Nothing here fails when a claim of the paper does not show: the model is a toy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import parser, say, start, table
from _sam import Judge, OtherScores, Quality, milliseconds, scored_by
from compress.calibration.recording import record
from compress.calibration.segmentation import SegmentationCalibration
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from compress.recipes.schema import Recipe
from compress.recipes.slimsam import SlimSamSettings
from torch import nn

_SILENT = SilentProgress()


@dataclass(frozen=True)
class Way:
    """One line of the table.

    Attributes:
        name: in the table.
        changes: of the shipped recipe's settings.
        scores: other scores than the method's.
    """

    name: str
    changes: Mapping[str, Any]
    scores: OtherScores | None = None


WAYS = (
    Way("as shipped", {}),
    Way("one step", {"slimming": "one_step"}),
    Way("outputs alone", {"features": False}),
    Way("magnitude", {}, "magnitude"),
    Way("random", {}, "random"),
    Way("tables from zero", {"rel_pos": "zero"}),
    Way("keys not folded", {"attn_scale": "reset"}),
    Way("global", {"ranking": "global"}),
)
DEEP = (
    Way("as shipped, r 0.75", {"ratio": 0.75}),
    Way("one step, r 0.75", {"ratio": 0.75, "slimming": "one_step"}),
)


@dataclass(frozen=True)
class Result:
    """One way, one seed.

    Attributes:
        pruned: output error on the choice images after each pruning.
        quality: of the result, on held-out images.
        parameters: of the encoder.
        macs: of the encoder: with attention products, without.
        seconds: of the stage.
        module: the result.
    """

    pruned: list[float]
    quality: Quality
    parameters: int
    macs: tuple[int, int]
    seconds: float
    module: nn.Module


@dataclass(frozen=True)
class Bench:
    """What all ways share.

    Attributes:
        recipe: the shipped one: model, calibration and the settings that a way changes.
        steps: of both alignings together.
        samples: held-out images.
    """

    recipe: Recipe
    steps: int
    samples: int

    def opened(self) -> OpenModel:
        """Return the original."""
        return open_model(self.recipe.model, progress=_SILENT)

    def settings(self, way: Way) -> SlimSamSettings:
        """Return the settings of a way: `steps` is the sum, and one step has them in one aligning."""
        own = self.recipe.stages[0].settings.model_dump(exclude_unset=True)
        once = way.changes.get("slimming") == "one_step"
        steps = self.steps if once else self.steps // 2
        unused = {
            "epochs",
            *(("feature_weight", "feature_epochs") if once or not way.changes.get("features", True) else ()),
        }
        kept = {name: value for name, value in own.items() if name not in unused}
        return SlimSamSettings.model_validate({**kept, **way.changes, "steps": steps})

    def recorded(self, model: OpenModel, seed: int) -> SegmentationCalibration:
        """Return the images of a seed."""
        found = record(model, self.recipe.calibration, seed=seed, cache=None, progress=_SILENT)
        assert isinstance(found, SegmentationCalibration)
        return found

    def judge(self, model: OpenModel, seed: int) -> Judge:
        """Return who measures: on the same images for every seed."""
        scenes = self.recorded(model, seed).pools.held_out.first(self.samples, annotated=True)
        return Judge(scenes, model.module, seed)

    def run(self, way: Way, seed: int, judge: Judge) -> Result:
        """Slim in one way with one seed, and measure."""
        model = self.opened()
        calibration, began = self.recorded(model, seed), time.monotonic()
        with tempfile.TemporaryDirectory() as folder, scored_by(way.scores, seed):
            (Path(folder) / "stage").mkdir()
            (Path(folder) / "shared").mkdir()
            workspace = Workspace(Path(folder) / "stage", Path(folder) / "shared", original=self.opened)
            details = registry.get("slimsam").apply(
                model, self.settings(way), calibration, workspace, _SILENT
            )
        seconds = time.monotonic() - began
        pruned = [phase["output_error"] for phase in details["phases"] if phase["kind"] == "pruning"]
        macs = (details["macs"]["encoder"][1], details["macs"]["encoder_linear_conv"][1])
        quality = judge.measure(model.module)
        return Result(pruned, quality, details["parameters"]["encoder"][1], macs, seconds, model.module)


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation (of the sample)."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def row(way: str, results: Sequence[Result]) -> list[str]:
    """Return the line of a table about one way."""

    def mean(value: Callable[[Result], float]) -> float:
        return statistics.mean(value(item) for item in results)

    errors = zip(*(item.pruned for item in results), strict=True)
    return [
        way,
        " / ".join(f"{statistics.mean(values):.3f}" for values in errors),
        spread([item.quality.error for item in results], 4),
        spread([item.quality.agreement for item in results], 4),
        spread([item.quality.miou for item in results], 4),
        f"{mean(lambda item: item.parameters) / 1e3:.0f}",
        f"{mean(lambda item: item.macs[0]) / 1e6:.1f} / {mean(lambda item: item.macs[1]) / 1e6:.1f}",
        f"{mean(lambda item: item.seconds):.0f}",
    ]


HEADER = [
    "way", "error after each pruning", "error at the end", "mIoU to the original", "mIoU to the truth",
    "thousand parameters", "million MACs", "s",
]  # fmt: skip


def options() -> argparse.ArgumentParser:
    """Return the command line."""
    found = parser(__doc__)
    found.add_argument("--seeds", type=int, help="how many (default 3, quick 1)")
    found.add_argument("--steps", type=int, help="of both alignings together (default 120, quick 8)")
    found.add_argument("--samples", type=int, help="held-out images (default 64, quick 6)")
    found.add_argument("--ways", nargs="*", help="names of the table (default: all)")
    return found


def prepared(arguments: argparse.Namespace) -> Bench:
    """Return what all ways share, as the command line has it."""
    steps, samples = (8, 6) if arguments.quick else (120, 64)
    recipe = load_recipe("sam_slimsam").recipe
    return Bench(recipe, arguments.steps or steps, arguments.samples or samples)


def main() -> None:
    """Measure and print the tables."""
    arguments = options().parse_args()
    start("Ways to slim the built-in Segment Anything model", arguments)
    bench = prepared(arguments)
    ways = [way for way in (*WAYS, *DEEP) if not arguments.ways or way.name in arguments.ways]
    seeds = range(arguments.seed, arguments.seed + (arguments.seeds or (1 if arguments.quick else 3)))
    original = bench.opened()
    judge = bench.judge(original, arguments.seed)
    say(f"original: mIoU to the truth {judge.measure(original.module).miou:.4f} on {bench.samples} images")
    say(f"each way: {bench.steps} steps in all, {len(seeds)} seed(s)\n")
    results: dict[str, list[Result]] = {}
    for way in ways:
        for seed in seeds:
            found = bench.run(way, seed, judge)
            results.setdefault(way.name, []).append(found)
            say(f"{way.name}, seed {seed}: {found.pruned} {found.quality} in {found.seconds:.0f} s")
    say()
    table(HEADER, [row(name, found) for name, found in results.items()])
    tell_latency(original, results, rounds=3 if arguments.quick else 30)


def tell_latency(original: OpenModel, results: Mapping[str, list[Result]], rounds: int) -> None:
    """Time one image through the original encoder and those of a way per width, which take turns."""
    by_size = {found[0].parameters: (name, found[0].module) for name, found in reversed(results.items())}
    modules = {"original": original.module, **dict(reversed(by_size.values()))}
    side = original.config["vision_config"]["image_size"]
    times = milliseconds(list(modules.values()), side, rounds)
    table(
        ["encoder", "ms an image", "times the original"],
        [[name, f"{ms:.2f}", f"{times[0] / ms:.2f}"] for name, ms in zip(modules, times, strict=True)],
    )


if __name__ == "__main__":
    main()
