"""A tiny DiT with a recorded calibration, for the quantization methods."""

import pytest
import torch
from compress.calibration.diffusion import record
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef


@pytest.fixture
def opened(make_tiny):
    """Return `make(class_name, **options)` -> a fresh OpenModel of a tiny checkpoint."""
    count = 0

    def make(class_name="DiTTransformer2DModel", **options):
        nonlocal count
        count += 1
        folder = make_tiny(class_name, name=f"model-{count}", **options)
        return open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())

    return make


@pytest.fixture
def calibrate(tmp_path):
    """Return `calibrate(model)` -> a recorded calibration: 2 samples, 3 steps, guided."""

    def run(model, seed=0):
        settings = CalibrationSettings(samples=2, steps=3, batch_size=2)
        return record(model, settings, seed=seed, cache=tmp_path / "calibration", progress=SilentProgress())

    return run


@pytest.fixture
def outputs():
    """Return `outputs(model)` -> float32 outputs of one seeded forward."""

    def run(model):
        inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return model.module(**inputs, return_dict=False)[0].float()

    return run
