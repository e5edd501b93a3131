"""Open tiny models of every family, with the conditions that they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef

PIXELS = {"in_channels": 1, "out_channels": 1, "sample_size": 28, "patch_size": 7}


@pytest.fixture
def open_tiny(make_tiny: Callable[..., Path]) -> Callable[..., Any]:
    """Return `open(class_name, **config)` -> OpenModel."""

    def open_(class_name: str = "DiTTransformer2DModel", **config: Any) -> Any:
        folder = make_tiny(class_name, **config)
        return open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())

    return open_


@pytest.fixture
def pixel_dit(open_tiny: Callable[..., Any]) -> Any:
    """A random DiT that makes samples of the classifier's shape."""
    return open_tiny("DiTTransformer2DModel", **PIXELS)


@pytest.fixture
def conditions_of(tmp_path: Path) -> Callable[[str], CalibrationSettings]:
    """Return `conditions(class_name)` -> where a tiny model's conditions come from."""
    import torch
    from safetensors.torch import save_file

    def make(class_name: str) -> CalibrationSettings:
        if class_name.startswith("DiT"):
            return CalibrationSettings()
        generator = torch.Generator().manual_seed(3)
        names = {
            "PixArtTransformer2DModel": {"prompt_embeds": (5, 32)},
            "SD3Transformer2DModel": {"prompt_embeds": (5, 32), "pooled_prompt_embeds": (32,)},
            "UNet2DConditionModel": {"prompt_embeds": (5, 32), "pooled_prompt_embeds": (24,)},
        }[class_name]
        tensors = {}
        for prefix, count in (("", 3), ("negative_", 1)):
            for name, shape in names.items():
                tensors[prefix + name] = torch.randn(count, *shape, generator=generator)
            if class_name.startswith("PixArt"):
                tensors[prefix + "prompt_attention_mask"] = torch.ones(count, 5)
        path = tmp_path / f"{class_name}-embeddings.safetensors"
        save_file(tensors, path)
        return CalibrationSettings(embeddings=path)

    return make
