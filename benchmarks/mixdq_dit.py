"""Ways to spend the same bytes on the built-in DiT: the integer program and what it is held against.

For every budget, all methods get the same bytes and choose among the same rounded layers. The error is
measured on trajectories that nothing was rounded, measured or decided on: signal to error of the
denoiser's output, dB, all weights quantized together, activations in floating point.

- power: least sum of measured error powers, solved exactly (what the stage does by default). `predicted`
  is that sum, `bound` what no allocation of these layers can fall below in it; a second bound, for bits
  in quarters, says how much the offered bits leave out.
- dB-sum: largest sum of decibels, the objective of MixDQ's public code, solved exactly.
- greedy: the largest gain per byte, one step at a time, on the losses of `power`.
- weight error: least sum of |W - W^|^2 / |W|^2 times the number of weights, solved exactly.
- even: the most equal bits that fit; what is left raises layers in their order.
- random: the best measured of 20 random allocations that use the bytes.

Twice: with the paper's grids (symmetric, one scale per row, min-max, rounded to nearest), and with the
settings of the shipped recipe.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from _common import REPOSITORY, parser, say, start, table
from _mixed import Prepared, prepared
from compress.calibration.similarity import decibels
from compress.compressors.allocation import Allocation, Budget, Choice, allocate
from compress.compressors.quantization.mixed.baselines import at_random, by_weight_error, evenly, greedily
from compress.compressors.quantization.mixed.candidates import AllocatingSettings
from compress.compressors.quantization.mixed.decision_report import predicted_error
from compress.compressors.quantization.mixed.offers import nominal_bits
from compress.compressors.quantization.mixed.problem import (
    allocated_weights,
    mean_bits,
    stored_bytes,
    weight_program,
)
from compress.recipes.loader import load_recipe
from compress.recipes.schema import CalibrationSettings
from compress.recipes.stages import MixdqSettings

Chosen = Mapping[str, str]
Curve = dict[float, dict[str, tuple[int, float]]]
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
SHOWN = (3.5, 4.0)
RANDOM = 20
METHODS = ("power", "dB-sum", "greedy", "weight error", "even", "random")
PAPER_BITS = (2, 3, 4, 6, 8)


class Methods:
    """All ways to choose, on one prepared model."""

    def __init__(self, ready: Prepared, seed: int) -> None:
        self._ready, self._seed = ready, seed
        self._power = weight_program(ready.layers, ready.table, "power").items
        self._decibels = weight_program(ready.layers, ready.table, "mixdq").items
        self._weighted = {
            entry.site.name: {
                label: error * entry.weights for label, error in ready.weight_errors[entry.site.name].items()
            }
            for entry in ready.layers
        }

    def limit_bytes(self, bits: float) -> int:
        """Return the bytes of all layers at `bits` per weight, scales and biases included."""
        fewest = {item.name: min(item.choices, key=lambda c: nominal_bits(c.label)) for item in self._power}
        overhead = sum(choice.costs["bytes"] - choice.costs["bits"] // 8 for choice in fewest.values())
        return overhead + int(bits * allocated_weights(self._ready.layers)) // 8

    def solve(self, limit: int) -> Allocation:
        """Return the answer of the integer program."""
        return allocate(self._power, [Budget("bytes", limit)])

    def finest_db(self, limit: int) -> float:
        """Return what the program would predict if bits came in quarters, losses between those measured."""
        finer = []
        for item in self._power:
            known = sorted(item.choices, key=lambda choice: choice.costs["bytes"])
            choices = [known[-1]]
            for low, high in pairwise(known):
                steps = 4 * (nominal_bits(high.label) - nominal_bits(low.label))
                extra = high.costs["bytes"] - low.costs["bytes"]
                choices += [
                    Choice(
                        f"{low.label} + {step}/4",
                        low.loss * (high.loss / low.loss) ** (step / steps),
                        {"bytes": low.costs["bytes"] + step * extra // steps},
                    )
                    for step in range(steps)
                ]
            finer.append(replace(item, choices=tuple(choices)))
        return _db(allocate(finer, [Budget("bytes", limit)]).loss)

    def choose(self, method: str, limit: int) -> Chosen:
        """Return item -> label of a method at a number of bytes."""
        ways: Mapping[str, Callable[[], Chosen]] = {
            "power": lambda: self.solve(limit).choices,
            "dB-sum": lambda: allocate(self._decibels, [Budget("bytes", limit)]).choices,
            "greedy": lambda: greedily(self._power, limit),
            "weight error": lambda: by_weight_error(self._power, self._weighted, limit),
            "even": lambda: evenly(self._power, limit),
            "random": lambda: self._best_of_random(limit),
        }
        return ways[method]()

    def _best_of_random(self, limit: int) -> Chosen:
        generator = random.Random(self._seed)
        drawn = [at_random(self._power, limit, generator) for _ in range(RANDOM)]
        return min(drawn, key=self._ready.error)


def _db(error: float | None) -> float:
    return decibels(1.0, error) if error is not None else float("nan")


def compare(ready: Prepared, budgets: Sequence[float], seed: int) -> Curve:
    """Measure all methods at all budgets; print a table for each of `SHOWN`.

    Returns:
        budget in mean bits -> method -> (bytes of all tensors, dB).
    """
    methods = Methods(ready, seed)
    found: Curve = {}
    for bits in budgets:
        limit = methods.limit_bytes(bits)
        answer = methods.solve(limit)
        rows = []
        found[bits] = {}
        for method in METHODS:
            chosen = methods.choose(method, limit)
            size = ready.fixed_bytes + stored_bytes(ready.layers, chosen)
            measured = _db(ready.error(chosen))
            found[bits][method] = (size, measured)
            predicted = _db(predicted_error(ready.layers, ready.table, chosen))
            mean = mean_bits(ready.layers, chosen)
            rows.append([method, f"{size:,}", f"{mean:.3f}", f"{predicted:.2f}", f"{measured:.2f}"])
        if bits in SHOWN:
            say(f"{bits:g} bits per allocated weight: at most {ready.fixed_bytes + limit:,} bytes\n")
            table(["method", "bytes", "mean bits", "predicted dB", "measured dB"], rows)
            proof = f"bound {_db(answer.lower_bound):.3f} dB ({answer.certificate}, {answer.found_by})"
            ahead = [
                f"{found[bits]['power'][1] - found[bits][method][1]:+.2f} dB to {method}"
                for method in METHODS[1:]
            ]
            proof += f"; with bits in quarters the bound were {methods.finest_db(limit):.2f} dB"
            say(f"{proof}; power: {', '.join(ahead)}\n")
    return found


def show_curve(found: Curve) -> None:
    """Print measured dB over budgets."""
    rows = [[method, *(f"{by_method[method][1]:.2f}" for by_method in found.values())] for method in METHODS]
    sizes = ["bytes", *(f"{max(size for size, _ in by_method.values()):,}" for by_method in found.values())]
    table(["measured dB at mean bits", *(f"{bits:g}" for bits in found)], [sizes, *rows])


def draw_curve(found: Curve, title: str, path: Path) -> None:
    """Draw measured dB over bytes of all methods."""
    from compress.exporters.drawing import new_figure, plain_defaults, save, tidy

    styles = {
        "power": ("#1f2933", "o", "-"),
        "greedy": ("#2f6db3", "+", ":"), "weight error": ("#2a9d8f", "s", "--"),
        "even": ("#d9772b", "D", "--"), "random": ("#8a5fb0", "^", ":"), "dB-sum": ("#b02a4c", "v", "-."),
    }  # fmt: skip
    with plain_defaults():
        figure = new_figure(8.2, 4.2)
        axes = figure.subplots()
        for method in METHODS:
            colour, marker, line = styles[method]
            points = [by_method[method] for by_method in found.values()]
            axes.plot(
                [size / 1e6 for size, _ in points], [value for _, value in points], color=colour,
                marker=marker, linestyle=line, markersize=5, linewidth=1.5, label=method,
            )  # fmt: skip
        axes.set(xlabel="MB of all tensors", ylabel="SQNR of the denoiser, dB (unseen trajectories)")
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=8.5)
        tidy(axes)
        save(figure, path)


def setups(quick: bool) -> dict[str, tuple[AllocatingSettings, CalibrationSettings]]:
    """Return title -> (settings of the stage, calibration)."""
    recipe = load_recipe(REPOSITORY / "recipes" / "dit_mixdq_w4a8.yaml").recipe
    calibration = recipe.calibration
    shipped = recipe.stages[0].settings
    paper = MixdqSettings.model_validate(
        {
            "budget": {"mean_bits": 4.0},
            "bits": PAPER_BITS,
            "clip": "minmax",
            "sensitivity": {"samples": 8, "steps": 8},
        }
    )
    if quick:
        calibration = calibration.model_copy(update={"samples": 8, "steps": 10})
        smaller = {"samples": 4, "steps": 4}
        paper = paper.model_copy(update={"sensitivity": paper.sensitivity.model_copy(update=smaller)})
        return {"The paper's grids": (paper, calibration)}
    return {
        "The paper's grids": (paper, calibration),
        "The shipped recipe's settings": (shipped, calibration),
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--model", default="builtin:dit", help="another DiT (default builtin:dit)")
    options.add_argument("--output", type=Path, help="folder for a picture of each curve")
    arguments = options.parse_args()
    start(f"Bit allocations on {arguments.model}", arguments)
    budgets = SHOWN if arguments.quick else BUDGETS
    unseen = (4, 5) if arguments.quick else (8, 10)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (title, (settings, calibration)) in enumerate(setups(arguments.quick).items()):
            say(f"### {title}\n")
            folder = Path(scratch) / str(number)
            folder.mkdir()
            with prepared(arguments.model, settings, calibration, folder, arguments.seed, unseen) as ready:
                say(
                    f"{len(ready.table.rows)} sensitivities in {ready.seconds:.0f} s; measured on {unseen[0]}"
                    f" unseen trajectories, {unseen[1]} steps of each; original"
                    f" {ready.original_bytes:,} bytes\n"
                )
                found = compare(ready, budgets, arguments.seed)
            show_curve(found)
            if arguments.output:
                arguments.output.mkdir(parents=True, exist_ok=True)
                draw_curve(found, title, arguments.output / f"mixdq_dit_{number}.png")


if __name__ == "__main__":
    main()
