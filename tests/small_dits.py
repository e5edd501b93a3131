"""Small denoisers that lose blocks or are trained: their embedders, calibration, recipe, and a progress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compress.calibration.diffusion import DiffusionCalibration, record
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DIT, LIST = "DiTTransformer2DModel", "transformer_blocks"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_embedders_equal(tensors: dict[str, Tensor]) -> None:
    """Give every block of a DiT the first block's timestep and class embedder, as trained ones have it."""
    for name in tensors:
        _, mark, rest = name.partition(".norm1.emb.")
        if mark:
            tensors[name] = tensors[f"{LIST}.0{mark}{rest}"].clone()


def equal_embedders(folder: Path) -> Path:
    """Do the same to the file of a folder, which is returned; other models have no such embedders."""
    if not (folder / WEIGHTS).is_file():
        return folder
    tensors = load_file(folder / WEIGHTS)
    make_embedders_equal(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def equal_embedders_of(module: nn.Module) -> None:
    """Do the same to a module."""
    first, *others = module.get_submodule(LIST).children()
    for block in others:
        block.get_submodule("norm1.emb").load_state_dict(first.get_submodule("norm1.emb").state_dict())


def opened(folder: Path) -> OpenModel:
    """Open a model on the CPU."""
    return open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())


def recorded(model: OpenModel, cache: Path, data: Any, **settings: Any) -> DiffusionCalibration:
    """Record the least calibration that there is, with `data` to train on.

    Args:
        model: before any stage.
        cache: where it is kept.
        data: setting of the calibration; None: none.
        settings: others of it.
    """
    given = {"samples": 1, "steps": 1, "guidance_scale": 1.0, "data": data, **settings}
    return record(
        model, CalibrationSettings.model_validate(given), seed=0, cache=cache, progress=SilentProgress()
    )


def state_of(model: OpenModel) -> dict[str, Tensor]:
    """Return a copy of all tensors."""
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same_state(model: OpenModel, state: dict[str, Tensor]) -> bool:
    """Tell whether a model has these tensors and no others, bit for bit."""
    now = model.module.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


def recipe_for(folder: Path, stages: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Return a recipe of a few seconds, whose stages train on samples of the model."""
    return {
        "model": str(folder),
        "calibration": {
            "samples": 2, "steps": 2, "guidance_scale": 1.0, "data": {"generate": 16, "steps": 2},
        },
        "stages": list(stages),
        "evaluate": {"fidelity": {"samples": 2, "steps": 2, "guidance_scale": 1.0}, "layers": False},
        "export": {"path": str(out)},
    }  # fmt: skip


class Told(SilentProgress):
    """Keeps what is told, and kills what runs at a step of a training.

    Attributes:
        notes: that were told.
        warnings: that were told.
        labels: of steps that began.
        details: of what was advanced.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.labels: list[str] = []
        self.details: list[str] = []
        self._steps, self._stop_at = 0, stop_at

    def start(self, label: str, total: int | None) -> None:
        self.labels.append(label)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def advance(self, units: int = 1, detail: str = "") -> None:
        self.details.append(detail)
        self._steps += "step" in detail
        if self._steps == self._stop_at:
            raise KeyboardInterrupt
