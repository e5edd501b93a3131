"""Tiny models that can be pruned, and what cuts them at random."""

import pytest
import torch
from compress.compressors.pruning.groups import Selection
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef


@pytest.fixture(scope="session")
def tiny_modules():
    """Import the module of tiny models beside this file: test folders are no packages."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).with_name("tiny.py")
    spec = importlib.util.spec_from_file_location("tiny_prunable_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prunable(tiny_modules, make_tiny, tmp_path):
    """Return `make(class_name, *, dtype=None, seed=0, **config)` -> a fresh OpenModel."""
    count = 0

    def make(class_name, *, dtype="float32", seed=0, **config):
        nonlocal count
        count += 1
        if class_name in tiny_modules.DIFFUSION:
            folder = make_tiny(class_name, name=f"prunable-{count}", dtype=dtype, seed=seed, **config)
        else:
            folder = tmp_path / f"prunable-{count}"
            module = tiny_modules.randomise(tiny_modules.vision_module(class_name, **config), seed)
            module.to(getattr(torch, dtype)).save_pretrained(folder)
        return open_model(ModelRef(id=str(folder)), progress=SilentProgress())

    return make


@pytest.fixture
def choose():
    """Return `choose(groups, share, *, kinds, heads=0, seed=0)` -> a random Selection.

    Of every attention `heads` heads go, and the same share of the channels of every head that stays.
    """

    def run(groups, share, *, kinds=("width", "ff", "attention"), heads=0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        kept, kept_heads, sizes = {}, {}, {}

        def some(size, count):
            return torch.randperm(size, generator=generator)[:count].sort().values

        for group in groups:
            if group.kind not in kinds:
                continue
            sizes[group.name] = group.size
            site = group.attention
            if site is None:
                kept[group.name] = tuple(some(group.size, int(group.size * (1 - share))).tolist())
                continue
            stay = some(site.heads, site.heads - heads)
            head_dim = int(site.head_dim * (1 - share))
            channels = [head * site.head_dim + some(site.head_dim, head_dim) for head in stay]
            kept[group.name] = tuple(torch.cat(channels).tolist())
            kept_heads[group.name] = tuple(stay.tolist())
        return Selection(kept, kept_heads, sizes)

    return run


@pytest.fixture
def forward():
    """Return `forward(model)` -> float32 outputs of two random inputs."""

    def run(model, seed=5):
        inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return model.module(**inputs)[0].float()

    return run
