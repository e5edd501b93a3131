"""Tiny mixtures of experts with sequences to calibrate on, quantized, planned and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compress.calibration.text import TextCalibration
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from compress.recipes.schema import ModelRef
from safetensors.torch import save_file

from .tiny_moe import make_moe


def opened(folder: Path, class_name: str, **changes: Any) -> OpenModel:
    """Return a tiny model of the class."""
    return open_model(ModelRef(id=str(make_moe(folder, class_name, **changes))), progress=SilentProgress())


def sequences(folder: Path, *, samples: int = 6, ids: int = 60, length: int = 20) -> TextCalibration:
    """Return random sequences of tokens below `ids`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = torch.randint(ids, (samples, length), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": drawn}, folder / "tokens.safetensors")
    return TextCalibration(0, f"{samples} {ids} {length}", folder / "tokens.safetensors", samples, 2)


def settings_of(method: str, **settings: Any) -> Any:
    """Return the settings of a stage, as a recipe has them."""
    parts = {"model": "m", "stages": [{method: settings}], "export": {"path": "out"}}
    return load_recipe(parts).recipe.stages[0].settings


def quantized(
    model: OpenModel, folder: Path, method: str, calibration: TextCalibration | None = None, **settings: Any
) -> dict[str, Any]:
    """Quantize a model in place and return what the stage tells."""
    calibration = calibration or sequences(folder / "text")
    for name in ("work", "shared"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder / "work", folder / "shared")
    stage = registry.get(method)
    return stage.apply(model, settings_of(method, **settings), calibration, workspace, SilentProgress())


def logits(module: Any, seed: int = 7) -> torch.Tensor:
    """Return the answers to two sequences."""
    ids = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits
