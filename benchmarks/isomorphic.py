"""What pruning costs and brings at the size of ViT-B/16, with random weights.

    python benchmarks/isomorphic.py --threads 2    # minutes
    python benchmarks/isomorphic.py --quick        # ViT-Ti, a few images

Prints where the time of one isomorphic pruning goes (groups, scores on 64 images, decision, cut, check) and
its peak memory, beside torch-pruning's pruner at the same shares on the same images; then one forward of
the dense and of both pruned models, taking turns; then how near `target: {macs:}` comes to what was asked,
on models of four families, by the analytic count and by what torch counts in a real forward.

Random weights say nothing of accuracy. `vit_isomorphic.py` does that, on a trained model.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import attempt, parser, say, start, table
from _random_models import CLASSIFIERS, MODELS, write_images, write_model
from _torch_pruning import gradients, macs, pruned
from compress.calibration.base import Observer
from compress.calibration.classification import ClassificationCalibration
from compress.calibration.objectives import objective_for
from compress.calibration.recording import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.pruning.checking import check
from compress.compressors.pruning.cutting import cut
from compress.compressors.pruning.deciding import Moment, cost_of, decide, score_groups
from compress.compressors.pruning.graph import find_groups
from compress.compressors.pruning.widths import Widths
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import Progress, SilentProgress
from compress.recipes.pruning import IsomorphicSettings
from compress.recipes.schema import CalibrationSettings, ModelRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SHARES = {"width": 0.5, "heads": 0.5, "head_dim": 0.25}
"""Of the published DeiT-4.2G."""
ROUND_TO = 8
TARGET = 0.5
LIMIT_SECONDS = 90.0
_SILENT = SilentProgress()


@dataclass
class Clock:
    """Wall and processor seconds of named parts."""

    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time of the body to a part."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        before = self.parts.get(name, (0.0, 0.0))
        self.parts[name] = (before[0] + time.perf_counter() - wall, before[1] + time.process_time() - cpu)

    def total(self) -> tuple[float, float]:
        """Return wall and processor seconds of all parts."""
        return sum(wall for wall, _ in self.parts.values()), sum(cpu for _, cpu in self.parts.values())


@dataclass(frozen=True)
class NoData:
    """A calibration without samples, for what looks at weights alone."""

    seed: int
    key: str = "no data"
    samples: int = 0

    def observe(self, model: OpenModel, names: Sequence[str], observer: Observer, progress: Progress) -> None:
        """There is nothing to observe."""
        raise NotImplementedError


def peak_gb() -> float:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def opened(folder: Path) -> OpenModel:
    """Open a written model."""
    return open_model(ModelRef(id=str(folder)), progress=_SILENT)


def prune(folder: Path, images: Path, arguments: argparse.Namespace) -> tuple[OpenModel, Clock, float]:
    """Prune by its parts what the stage does in one call; return the model, times, and memory."""
    settings = IsomorphicSettings.model_validate({"ratios": SHARES, "round_to": ROUND_TO})
    clock = Clock()
    model = opened(folder)
    calibration = recorded(model, images, arguments)
    with clock.timing("groups"):
        groups = find_groups(model)
    objective = objective_for(model, calibration, settings.loss)
    with clock.timing("scores"):
        scored = score_groups(model, groups, settings, objective, folder / "work", _SILENT)
    with clock.timing("decision"):
        moment = Moment(0, 1, Widths.of(groups), cost_of(model.spec))
        decision = decide(model, groups, scored, settings, moment, calibration.samples)
    with clock.timing("cut"):
        cut(model, groups, decision.selection, attn_scale=settings.attn_scale)
    with clock.timing("check"):
        check(model)
    return model, clock, peak_gb()


def recorded(model: OpenModel, images: Path, arguments: argparse.Namespace) -> ClassificationCalibration:
    """Choose the calibration images."""
    settings = CalibrationSettings(
        images=images, samples=arguments.images, batch_size=min(arguments.batch, arguments.images)
    )
    found = record(model, settings, seed=arguments.seed, cache=None, progress=_SILENT)
    assert isinstance(found, ClassificationCalibration)
    return found


def prune_by_peer(folder: Path, images: Path, arguments: argparse.Namespace) -> tuple[Any, Clock]:
    """Do the same with torch-pruning's pruner; return the module and times."""
    clock = Clock()
    model = opened(folder)
    calibration = recorded(model, images, arguments)
    labels = calibration.labels
    assert labels is not None
    model.module.requires_grad_(True)
    with clock.timing("scores"):
        batches = (
            (call["pixel_values"], labels[list(rows)])
            for call, rows in zip(calibration.calls(), calibration.batches(), strict=True)
        )
        summed = gradients(model.module, batches)
    model.module.requires_grad_(False)
    with clock.timing("groups, decision, cut"):
        module = pruned(model.module, summed, SHARES, ROUND_TO)
    return module, clock


def cost_rows(name: str, clock: Clock, memory: float | None) -> list[list[str]]:
    """Return the lines of a table about one way of pruning."""
    rows = [[f"{name}: {part}", f"{wall:.2f}", f"{cpu:.2f}", ""] for part, (wall, cpu) in clock.parts.items()]
    wall, cpu = clock.total()
    shown = "" if memory is None else f"{memory:.2f}"
    return [*rows, [f"**{name}: all**", f"{wall:.2f}", f"{cpu:.2f}", shown]]


def latencies(
    calls: Sequence[Callable[[], object]], rounds: int, warm_up: int = 3
) -> list[tuple[float, float]]:
    """Return least and median seconds of each call; the calls take turns."""
    seen: list[list[float]] = [[] for _ in calls]
    for round_ in range(warm_up + rounds):
        for times, call in zip(seen, calls, strict=True):
            began = time.perf_counter()
            call()
            if round_ >= warm_up:
                times.append(time.perf_counter() - began)
    return [(min(times), statistics.median(times)) for times in seen]


@torch.no_grad()
def latency_table(modules: dict[str, Any], side: int, arguments: argparse.Namespace) -> None:
    """Time one forward of one image through every module."""
    generator = torch.Generator().manual_seed(arguments.seed)
    pixels = torch.randn(1, 3, side, side, generator=generator)

    def call(module: Any) -> Callable[[], object]:
        return lambda: module(pixel_values=pixels)

    found = latencies([call(module.eval()) for module in modules.values()], arguments.rounds)
    dense = found[0]
    rows = [
        [
            name, f"{sum(value.numel() for value in module.parameters()) / 1e6:.2f}",
            f"{macs(module) / 1e9:.3f}", f"{least * 1e3:.1f}", f"{middle * 1e3:.1f}",
            f"{dense[0] / least:.2f}", f"{dense[1] / middle:.2f}",
        ]
        for (name, module), (least, middle) in zip(modules.items(), found, strict=True)
    ]  # fmt: skip
    header = [
        "one image",
        "M parameters",
        "G MACs",
        "least ms",
        "median ms",
        "times (least)",
        "times (median)",
    ]
    table(header, rows)


def widths_table(ours: OpenModel, peer: Any, dense: Any) -> None:
    """Show what is left of every layer by both: what torch-pruning leaves whole or empties shows here."""
    rows = []
    for index, layers in enumerate(
        zip(dense.vit.layers, ours.module.vit.layers, peer.vit.layers, strict=True)
    ):
        cells = [
            f"{of.attention.num_attention_heads} x {of.attention.head_dim}, {of.mlp.fc1.out_features}"
            for of in layers
        ]
        rows.append([f"block {index}", *cells])
    table(["heads x channels, feed-forward", "dense", "ours", "torch-pruning"], rows)


@torch.no_grad()
def counted_macs(model: OpenModel) -> int:
    """Return the multiply-accumulates that torch counts in a real forward at the reference input."""
    inputs = model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0))
    counter = FlopCounterMode(display=False)
    # The fused attention of CPUs is not counted; products of matrices are.
    with sdpa_kernel(SDPBackend.MATH), counter:
        model.module(**inputs)
    return int(counter.get_total_flops()) // 2


def target_table(root: Path, names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Prune models of several families to a share of their multiply-accumulates."""
    settings = IsomorphicSettings.model_validate(
        {"target": {"macs": TARGET}, "importance": "magnitude", "round_to": ROUND_TO}
    )
    rows = []
    for name in names:
        model = opened(write_model(root / name, name, arguments.seed))
        before = model.size()
        work = root / f"{name}-work"
        (work / "stage").mkdir(parents=True)
        (work / "shared").mkdir()
        began = time.perf_counter()
        workspace = Workspace(work / "stage", work / "shared")
        registry.get("isomorphic").apply(model, settings, NoData(arguments.seed), workspace, _SILENT)
        seconds, after = time.perf_counter() - began, model.size()
        limit = TARGET * before.macs
        rows.append(
            [
                name, f"{before.macs / 1e9:.3f}", f"{limit / 1e9:.3f}", f"{after.macs / 1e9:.3f}",
                f"{100 * (after.macs / limit - 1):+.2f} %", f"{counted_macs(model) / 1e9:.3f}",
                f"{before.parameters / 1e6:.1f}", f"{after.parameters / 1e6:.1f}", f"{seconds:.1f}",
            ]
        )  # fmt: skip
        del model
    header = [
        "`target: {macs: 0.5}`", "G MACs", "asked", "reached", "off by", "counted by torch", "M parameters",
        "after", "s",
    ]  # fmt: skip
    table(header, rows)


def main() -> int:
    """Measure and print; 1 where pruning took longer than it may."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=64, help="that scores are computed on (default 64)")
    options.add_argument("--batch", type=int, default=8, help="images of one backward pass (default 8)")
    options.add_argument("--rounds", type=int, default=30, help="of timing one forward (default 30)")
    options.add_argument("--no-peer", action="store_true", help="leave torch-pruning's pruner out")
    arguments = options.parse_args()
    name, names = ("ViT-B/16", MODELS)
    if arguments.quick:
        arguments.images, arguments.rounds = min(arguments.images, 8), 5
        name, names = "ViT-Ti/16", ("ViT-Ti/16",)
    start(f"Isomorphic pruning of {name}, random weights, {arguments.images} images", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = write_model(root / "model", name, arguments.seed)
        images = write_images(root / "images", arguments.images, CLASSIFIERS[name].image_size, arguments.seed)
        ours, clock, memory = prune(folder, images, arguments)
        header = ["seconds", "wall", "processor", "peak GB"]
        table(header, cost_rows("ours", clock, memory))
        modules = {"dense": opened(folder).module, "ours": ours.module}
        if not arguments.no_peer:
            made = attempt("torch-pruning", lambda: prune_by_peer(folder, images, arguments))
            if made is not None:
                modules["torch-pruning"] = made[0]
                table(header, cost_rows("torch-pruning", made[1], None))
        latency_table(modules, CLASSIFIERS[name].image_size, arguments)
        if "torch-pruning" in modules:
            widths_table(ours, modules["torch-pruning"], modules["dense"])
        modules.clear()
        del ours
        target_table(root / "targets", names, arguments)
    wall = clock.total()[0]
    say(f"groups, scores and cut: {wall:.1f} s, at most {LIMIT_SECONDS:.0f} s are allowed")
    return 0 if wall <= LIMIT_SECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
