"""Images in memory and judges for tests of the aligning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compress.compressors.pruning.sam.aligning import Aligned, align
from compress.compressors.pruning.sam.cutting import slice_bottleneck, slice_embedding
from compress.compressors.pruning.sam.learning import Teachers
from compress.progress import SilentProgress
from compress.recipes.slimsam import SlimSamSettings
from torch import Tensor, nn

from ....tiny_sam import tiny_sam


class Told(SilentProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class MemoryScenes:
    """Images [n, 3, 64, 64] without masks: what of `Scenes` the aligning asks for."""

    annotated = False

    def __init__(self, count: int, seed: int = 0):
        self.values = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        self.key = f"memory {count} {seed}"
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        self.asked += list(indices)
        return self.values[list(indices)]


class OutputJudge:
    """Lower is better: the mean square between a model's embedding of some images and the original's."""

    key = "outputs"

    def __init__(self, original: nn.Module, images: Any):
        self.images = images.pixels(range(len(images)))
        self.wanted = embedded(original, self.images)

    def measure(self, module: nn.Module) -> float:
        return float((embedded(module, self.images) - self.wanted).square().mean())

    def better(self, value: float, other: float) -> bool:
        return value < other


class ScriptedJudge:
    """Higher is better; gives values in turn and keeps the weights that it saw."""

    key = "script"

    def __init__(self, *values: float):
        self.values = list(values)
        self.seen: list[dict[str, Tensor]] = []

    def measure(self, module: nn.Module) -> float:
        self.seen.append(state(module))
        return self.values[len(self.seen) - 1]

    def better(self, value: float, other: float) -> bool:
        return value > other


@torch.no_grad()
def embedded(module: nn.Module, pixels: Tensor) -> Tensor:
    """Return [b, channels, s, s] float32."""
    encoder: Any = module.get_submodule("vision_encoder")
    found: Tensor = encoder(pixels.to(next(encoder.parameters()).dtype)).last_hidden_state
    return found.float()


def state(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that a module holds."""
    return {name: item.detach().clone() for name, item in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Tell whether two states are equal to the bit, types included."""
    return one.keys() == other.keys() and all(
        item.dtype == other[name].dtype and torch.equal(item, other[name]) for name, item in one.items()
    )


def narrower(module: nn.Module, width: int = 24) -> Any:
    """Return a copy whose residual stream has the first channels alone."""
    found = copy.deepcopy(module)
    slice_embedding(found, torch.arange(width), rel_pos="slice")
    return found


def slimmer(module: nn.Module, head_dims: Sequence[int] = (6, 6, 6), inner: int = 48) -> Any:
    """Return a copy whose bottlenecks have the first channels alone."""
    found = copy.deepcopy(module)
    slice_bottleneck(
        found, [torch.arange(size) for size in head_dims], [torch.arange(inner)] * len(head_dims),
        attn_scale="preserve", rel_pos="slice",
    )  # fmt: skip
    return found


def settings_of(**changes: Any) -> SlimSamSettings:
    """Quick ones: batches of 4 in one part, a state every 3 steps."""
    given = {"ratio": 0.5, "steps": 8, "accumulate": 1, "lr": 1e-3, "checkpoint_every": 3, **changes}
    return SlimSamSettings.model_validate(given)


def run_align(student: nn.Module, original: nn.Module, judge: Any, folder: Path, **changes: Any) -> Aligned:
    """Align with 10 images of 64 pixels; `changes` are those of `align`."""
    settings = changes.pop("settings", None) or settings_of()
    given: dict[str, Any] = {
        "phase": "embedding", "train": MemoryScenes(10, seed=1), "steps": settings.steps, "seed": 3,
        "key": "key", "progress": SilentProgress(), **changes,
    }  # fmt: skip
    teachers = Teachers(original, given.pop("previous", None))
    return align(
        student, teachers, given.pop("phase"), given.pop("train"), judge, settings, folder=folder, **given
    )


def models(seed: int = 0, **vision: Any) -> tuple[Any, Any, Any]:
    """Return a tiny model, the same with a narrower stream, and that one with slimmer bottlenecks."""
    original = tiny_sam(seed, **vision)
    first = narrower(original)
    return original, first, slimmer(first)
