"""Who should compete with whom? Rankings of the built-in ViT at equal cost, with equal recovery.

    python benchmarks/vit_isomorphic.py            # the shipped recipe's recovery, 3 seeds
    python benchmarks/vit_isomorphic.py --quick    # 1 seed, a short recovery

Isomorphic sub-structures among themselves (the method), everything of a kind together (global), every layer
by itself (local), and torch-pruning's own isomorphic pruner at the same proportions; all by the same Taylor
scores' images, cut to the same multiply-accumulates, recovered by the same training on the same images in
the same order, and judged on test images that none of them saw. The seed chooses the calibration images and
orders the training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import parser, say, start, table
from _torch_pruning import gradients, macs, pruned_to
from compress.calibration.classification import ClassificationCalibration
from compress.calibration.image_sets import ImageSet
from compress.calibration.recording import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from compress.recipes.pruning import IsomorphicSettings
from compress.recipes.recovery import FinetuneSettings
from compress.recipes.schema import Recipe
from torch import nn

RANKINGS = ("isomorphic", "global", "local")
PEER = "torch-pruning"
_SILENT = SilentProgress()


@dataclass(frozen=True)
class Result:
    """One way, one seed.

    Attributes:
        macs: multiply-accumulates after pruning.
        pruned: accuracy without recovery.
        recovered: accuracy after it.
        seconds: of the recovery.
    """

    macs: int
    pruned: float
    recovered: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What all ways share.

    Attributes:
        recipe: the shipped one; its model, calibration and stages.
        recovery: its second stage, perhaps shortened.
    """

    recipe: Recipe
    recovery: FinetuneSettings

    def settings(self, ranking: str) -> IsomorphicSettings:
        """Return the recipe's pruning with another ranking and without baselines."""
        own = self.recipe.stages[0].settings
        return own.model_copy(update={"ranking": ranking, "baselines": ()})

    def opened(self) -> OpenModel:
        """Return the original."""
        return open_model(self.recipe.model, progress=_SILENT)

    def run_seed(self, seed: int, peer: bool) -> dict[str, Result]:
        """Prune and recover in all ways with one seed."""
        results: dict[str, Result] = {}
        shares: dict[str, Any] = {}
        for ranking in RANKINGS:
            model = self.opened()
            calibration = self.recorded(model, seed)
            with tempfile.TemporaryDirectory() as folder:
                workspace = self._workspace(Path(folder))
                details = registry.get("isomorphic").apply(
                    model, self.settings(ranking), calibration, workspace, _SILENT
                )
            if ranking == "isomorphic":
                shares = details["ratios"]
            results[ranking] = self._recovered(model, calibration)
            say(f"seed {seed}, {ranking}: {results[ranking]}")
        if peer:
            model = self.opened()
            calibration = self.recorded(model, seed)
            wanted = results["isomorphic"].macs
            model.module = self._peer(model.module, calibration, shares, wanted)
            results[PEER] = self._recovered(model, calibration)
            say(f"seed {seed}, {PEER}: {results[PEER]}")
        return results

    def recorded(self, model: OpenModel, seed: int) -> ClassificationCalibration:
        """Return the calibration images of a seed."""
        found = record(model, self.recipe.calibration, seed=seed, cache=None, progress=_SILENT)
        assert isinstance(found, ClassificationCalibration)
        return found

    def _workspace(self, folder: Path) -> Workspace:
        (folder / "stage").mkdir()
        (folder / "shared").mkdir()
        return Workspace(folder / "stage", folder / "shared", original=self.opened)

    def _peer(
        self,
        module: nn.Module,
        calibration: ClassificationCalibration,
        shares: Mapping[str, Mapping[str, Any]],
        wanted: int,
    ) -> nn.Module:
        labels = calibration.labels
        assert labels is not None
        batches = (
            (call["pixel_values"], labels[list(rows)])
            for call, rows in zip(calibration.calls(), calibration.batches(), strict=True)
        )
        stored, module = next(module.parameters()).dtype, module.float()
        summed = gradients(module, batches)
        proportions = {row["setting"]: row["share"] for row in shares.values()}
        round_to = self.settings("isomorphic").round_to
        return pruned_to(module, summed, proportions, round_to, wanted).requires_grad_(False).to(stored)

    def _recovered(self, model: OpenModel, calibration: ClassificationCalibration) -> Result:
        """Measure, train and measure again."""
        judged = calibration.pools.held_out.all()
        cost, before, started = macs(model.module), accuracy(model.module, judged), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            workspace = self._workspace(Path(folder))
            registry.get("finetune").apply(model, self.recovery, calibration, workspace, _SILENT)
        seconds = time.monotonic() - started
        return Result(cost, before, accuracy(model.module, judged), seconds)


@torch.no_grad()
def accuracy(module: nn.Module, images: ImageSet, batch: int = 500) -> float:
    """Return the share of images whose most likely class is their label."""
    labels = images.labels
    assert labels is not None
    module.eval()
    hits = 0
    for first in range(0, len(images), batch):
        rows = range(first, min(first + batch, len(images)))
        found = module(pixel_values=images.pixels(rows)).logits.argmax(dim=-1)
        hits += int((found == labels[list(rows)]).sum())
    return hits / len(images)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation (of the sample), in percent."""
    mean = f"{statistics.mean(values):.2%}"
    return f"{mean} +- {statistics.stdev(values) * 100:.2f}" if len(values) > 1 else mean


def row(way: str, results: list[Result], original: float, dense: int) -> list[str]:
    """Return the line of a table about one way."""
    recovered = [item.recovered for item in results]
    return [
        way,
        f"{statistics.mean(item.macs for item in results) / dense:.3f}",
        spread([item.pruned for item in results]),
        spread(recovered),
        f"{(original - statistics.mean(recovered)) * 100:+.2f}",
        f"{min(recovered):.2%}",
        f"{statistics.mean(item.seconds for item in results):.0f}",
    ]


def shortened(recovery: FinetuneSettings, epochs: float | None) -> FinetuneSettings:
    """Return the recovery with another length, checked as a recipe's is."""
    if epochs is None:
        return recovery
    return FinetuneSettings.model_validate({**recovery.model_dump(), "epochs": epochs, "steps": None})


def options() -> argparse.ArgumentParser:
    """Return the command line."""
    found = parser(__doc__)
    found.add_argument("--seeds", type=int, help="how many (default 3, quick 1)")
    found.add_argument("--epochs", type=float, help="of the recovery (default: the recipe's, quick 2)")
    found.add_argument("--no-peer", action="store_true", help="leave torch-pruning's own pruner out")
    return found


def main() -> None:
    """Measure and print one table."""
    arguments = options().parse_args()
    start("Isomorphic, global and local ranking of the built-in ViT", arguments)
    recipe = load_recipe("vit_isomorphic").recipe
    recovery = recipe.stages[1].settings
    assert isinstance(recovery, FinetuneSettings)
    epochs = arguments.epochs or (2.0 if arguments.quick else None)
    bench = Bench(recipe, shortened(recovery, epochs))
    seeds = arguments.seeds or (1 if arguments.quick else 3)

    model = bench.opened()
    judged = bench.recorded(model, arguments.seed).pools.held_out.all()
    original, dense = accuracy(model.module, judged), macs(model.module)
    say(f"original: {original:.2%} of {len(judged):,} test images, {dense:,} multiply-accumulates")
    say(f"recovery: {bench.recovery.epochs:g} epochs, the original's answers and labels\n")
    run = partial(bench.run_seed, peer=not arguments.no_peer)
    runs = [run(arguments.seed + index) for index in range(seeds)]
    say()
    table(
        ["ranking", "macs", "pruned", "recovered", "points lost", "worst seed", "s to recover"],
        [row(way, [run[way] for run in runs], original, dense) for way in runs[0]],
    )


if __name__ == "__main__":
    main()
