"""A tiny classifier, images that it can learn, and a regression that shows what the loop does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.compressors.recovery.loop import Trained, train
from compress.compressors.recovery.schedule import item_order
from compress.progress import SilentProgress
from compress.recipes.recovery import FinetuneSettings
from torch import Tensor, nn


@dataclass
class MemoryImages:
    """Images in memory; `seen` counts how often each was asked for."""

    values: Tensor
    labels: Tensor | None

    def __post_init__(self):
        self.seen = torch.zeros(len(self.values), dtype=torch.int64)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        for index in indices:
            self.seen[index] += 1
        return self.values[list(indices)]

    def __len__(self) -> int:
        return len(self.values)


def tiny_images(count: int = 24, classes: int = 3, seed: int = 0, size: int = 8) -> MemoryImages:
    """Noise on one random pattern per class: [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    patterns = torch.randn(classes, 3, size, size, generator=generator)
    return MemoryImages(
        patterns[labels] + 0.3 * torch.randn(count, 3, size, size, generator=generator), labels
    )


def tiny_vit(seed: int = 0, dropout: float = 0.0, classes: int = 3) -> nn.Module:
    """A stock ViT: 16 channels, 2 layers, 8 x 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_labels=classes, hidden_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config).eval().requires_grad_(False)


class Regression:
    """A `Trainable`: two linear layers with dropout between, towards a fixed map of 4 to 3 numbers."""

    def __init__(
        self, dropout: float = 0.0, seed: int = 0, size: int = 8, dtype: torch.dtype = torch.float32
    ):
        generator = torch.Generator().manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(dropout), nn.Linear(16, 3)).to(dtype).eval()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.module.requires_grad_(False)
        self.inputs = torch.randn(40, 4, generator=generator)
        self.targets = self.inputs @ torch.randn(4, 3, generator=generator)
        self._order, self._size = item_order(seed, 40), size

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def batch(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
        chosen = self._order(step, self._size).chunk(parts)[part]
        return self.inputs[chosen], self.targets[chosen]

    def loss(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        inputs, targets = batch
        return (self.module(inputs).float() - targets).square().mean(), {}


def settings_of(**changes: Any) -> FinetuneSettings:
    """Small and quick; 20 steps of 8."""
    given = {"steps": 20, "batch_size": 8, "lr": 1e-2, "checkpoint_every": 6, **changes}
    if "epochs" in changes:
        del given["steps"]
    return FinetuneSettings.model_validate(given)


def run_training(trainable: Any, folder: Path, settings: FinetuneSettings, **changes: Any) -> Trained:
    """Train with the defaults of these tests."""
    given = {"steps": settings.steps, "seed": 3, "key": "key", "progress": SilentProgress(), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    return train(trainable, settings, folder=folder, **given)


@pytest.fixture
def regression() -> Callable[..., Regression]:
    """Return the class, to be made with `dropout`, `seed`, `size`, `dtype`."""
    return Regression


@pytest.fixture
def settings() -> Callable[..., FinetuneSettings]:
    """Return `settings(**changes)`."""
    return settings_of


@pytest.fixture
def trained() -> Callable[..., Trained]:
    """Return `trained(trainable, folder, settings, **changes of train)`."""
    return run_training


@pytest.fixture
def images() -> Callable[..., MemoryImages]:
    """Return `images(count=24, classes=3, seed=0, size=8)`."""
    return tiny_images


@pytest.fixture
def vit() -> Callable[..., nn.Module]:
    """Return `vit(seed=0, dropout=0.0, classes=3)`."""
    return tiny_vit
