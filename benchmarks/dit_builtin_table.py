"""Methods and options on the built-in DiT at equal conditions: one table per bit width.

Every row starts from the same weights, sees the same recorded calibration, and is compared with the
original under the same seeds, by the library's own evaluator. Columns: SQNR of the denoiser's output
on the original's inputs (mean over the steps, and the worst step), PSNR and SSIM of whole samples,
tensor bytes, average bits per weight, bytes of the blocks' linears against bf16, and, unless --quick,
how many points of class agreement the samples lose.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import REPOSITORY, parser, say, start, table
from compress.calibration.diffusion import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.evaluation.evaluator import Evaluator
from compress.evaluation.size import size_metrics
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, ModelRef, Recipe
from compress.recipes.stages import STAGES

Settings = Mapping[str, Any]
WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
# The published method (v2 of its public code), without anything that is not in the paper: one exponent
# for all layers, which `faithful + exponent per layer group` compares with the sweep.
FAITHFUL: Settings = {
    "act_exponent": 0.5,
    "rotation": "hadamard",
    "clip": "minmax",
    "rounding": "nearest",
    "weight_symmetric": False,
}
SHIPPED = "shipped recipe's settings"
COLUMNS = (
    ("sqnr_db", "SQNR dB", "{:.2f}"),
    ("sqnr_db_worst_step", "worst step", "{:.2f}"),
    ("psnr_db", "PSNR dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("bytes", "bytes", "{:,.0f}"),
    ("bits_per_weight", "bits", "{:.2f}"),
    ("linear_bytes_ratio", "linears", "{:.3f}"),
    ("class_agreement_drop", "agreement lost", "{:+.3f}"),
    ("fid", "FID", "{:.3f}"),
)


def variants(shipped: Settings) -> list[tuple[str, str, Settings]]:
    """Return (label, method, settings without the bits) of every row.

    Args:
        shipped: settings of the shipped W4A8 recipe.
    """
    groups = {"group_size": 64, "weight_symmetric": True}
    return [
        ("rtn, min-max (the paper's grids)", "rtn", {"clip": "minmax"}),
        ("rtn, default", "rtn", {}),
        ("smoothquant, min-max", "smoothquant", {"clip": "minmax"}),
        ("smoothquant, default", "smoothquant", {}),
        ("vidit_q, faithful", "vidit_q", FAITHFUL),
        ("faithful, no rotation", "vidit_q", {**FAITHFUL, "rotation": "none"}),
        ("faithful, block rotation", "vidit_q", {**FAITHFUL, "rotation": "block"}),
        ("faithful + exponent per layer group", "vidit_q", {**FAITHFUL, "act_exponent": "sweep"}),
        ("faithful + mse clip", "vidit_q", {**FAITHFUL, "clip": "mse"}),
        ("faithful + gptq", "vidit_q", {**FAITHFUL, "rounding": "gptq"}),
        ("faithful + groups of 64", "vidit_q", {**FAITHFUL, "group_size": 64}),
        ("faithful + groups of 64, symmetric", "vidit_q", {**FAITHFUL, **groups}),
        ("faithful + low rank 16", "vidit_q", {**FAITHFUL, "low_rank": 16}),
        ("faithful + adaLN 8", "vidit_q", {**FAITHFUL, "adaln_weight_bits": 8}),
        ("vidit_q, default", "vidit_q", {}),
        (SHIPPED, "vidit_q", shipped),
        ("shipped, nearest instead of gptq", "vidit_q", {**shipped, "rounding": "nearest"}),
        ("shipped, no groups", "vidit_q", {**shipped, "group_size": None}),
        ("rtn at the shipped grids", "rtn", _grids(shipped)),
        ("smoothquant at the shipped grids", "smoothquant", _grids(shipped)),
    ]


def _grids(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name in STAGES["rtn"].model_fields}


def shipped_recipe() -> Recipe:
    """Return the shipped W4A8 recipe: every row is calibrated and measured as it says."""
    return load_recipe(REPOSITORY / "recipes" / "dit_w4a8.yaml").recipe


def shipped_settings() -> Settings:
    """Return what the shipped recipe says about its stage, without the bits."""
    settings = shipped_recipe().stages[0].settings.model_dump(exclude_unset=True)
    return {name: value for name, value in settings.items() if name not in ("weight_bits", "activation_bits")}


def mixed_settings(size_bytes: int, activation_bits: int) -> Settings:
    """Return the shipped allocating recipe's settings, for a model of so many bytes."""
    recipe = load_recipe(REPOSITORY / "recipes" / "dit_mixdq_w4a8.yaml").recipe
    settings = recipe.stages[0].settings.model_dump(exclude_unset=True)
    return {**settings, "budget": {"bytes": size_bytes}, "activation_bits": (activation_bits,)}


def conditions(quick: bool) -> tuple[CalibrationSettings, EvaluateSettings]:
    """Return the shipped recipe's calibration and evaluation, without the errors per layer.

    Args:
        quick: 8 samples of 10 steps for both, and no quality.
    """
    recipe = shipped_recipe()
    calibration, evaluate = recipe.calibration, recipe.evaluate.model_copy(update={"layers": False})
    if quick and evaluate.fidelity is not None:
        fewer = {"samples": 8, "steps": 10}
        calibration = calibration.model_copy(update=fewer)
        fidelity = evaluate.fidelity.model_copy(update=fewer)
        evaluate = evaluate.model_copy(update={"fidelity": fidelity, "quality": None})
    return calibration, evaluate


class Bench:
    """The recorded original, and what every row is measured against."""

    def __init__(self, model: str, cache: Path, seed: int, quick: bool) -> None:
        self._ref = ModelRef(id=model)
        self._silent = SilentProgress()
        calibration, evaluate = conditions(quick)
        original = open_model(self._ref, progress=self._silent)
        self._calibration = record(
            original, calibration, seed=seed, cache=cache / "calibration", progress=self._silent
        )
        self._evaluator = Evaluator(evaluate, seed)
        self._reference = self._evaluator.reference(original, cache / "reference", self._silent)
        self.original_bytes = original.spec.size().bytes

    def measure(self, method: str, settings: Settings) -> tuple[dict[str, float], float]:
        """Return the metrics of one method at one setting, and the seconds that its stage took."""
        model = open_model(self._ref, progress=self._silent)
        began = time.perf_counter()
        parsed = STAGES[method].model_validate(dict(settings))
        with tempfile.TemporaryDirectory() as scratch:
            workspace = Workspace(Path(scratch), Path(scratch))
            registry.get(method).apply(model, parsed, self._calibration, workspace, self._silent)
        seconds = time.perf_counter() - began
        metrics = dict(self._evaluator.compare(model, self._reference, self._silent).metrics)
        return {**metrics, **size_metrics(model)}, seconds


def _print(title: str, measured: Mapping[str, tuple[dict[str, float], float]]) -> None:
    """Print one table, of the columns that were measured."""
    columns = [column for column in COLUMNS if any(column[0] in metrics for metrics, _ in measured.values())]
    rows = [
        [label, *(form.format(metrics[name]) for name, _, form in columns), f"{seconds:.1f}"]
        for label, (metrics, seconds) in measured.items()
    ]
    say()
    table([title, *(name for _, name, _ in columns), "stage s"], rows)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--model", default="builtin:dit", help="another DiT (default builtin:dit)")
    options.add_argument("--widths", nargs="*", choices=WIDTHS, help="bit widths (default all)")
    arguments = options.parse_args()
    widths = arguments.widths or (["W4A8"] if arguments.quick else list(WIDTHS))
    start(f"Methods and options on {arguments.model}", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments.model, Path(scratch), arguments.seed, arguments.quick)
        say(f"bytes of the original: {bench.original_bytes:,}\n")
        for width in widths:
            bits = dict(zip(("weight_bits", "activation_bits"), WIDTHS[width], strict=True))
            measured = {}
            for label, method, settings in variants(shipped_settings()):
                measured[label] = bench.measure(method, {**settings, **bits})
                say(f"{width}: {label}: SQNR {measured[label][0]['sqnr_db']:.2f} dB")
            size = int(measured[SHIPPED][0]["bytes"])
            measured["mixdq in as many bytes"] = bench.measure(
                "mixdq", mixed_settings(size, WIDTHS[width][1])
            )
            _print(width, measured)


if __name__ == "__main__":
    main()
