"""Rules that look at data, on a flow-matching model: its own loss decides, as on any other denoiser."""

import pytest
import torch
from compress.calibration.objectives import objective_for
from compress.calibration.recording import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.pruning.measuring import mean_loss
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.depth import DepthSettings
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import load_file, save_file

QUIET = SilentProgress()
LIST = "transformer_blocks"
IDLE = 1


@pytest.fixture
def place(make_tiny):
    """An SD3 of three blocks, of which the middle one adds next to nothing to either stream."""
    folder = make_tiny("SD3Transformer2DModel", num_layers=3)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for norm in ("norm1", "norm1_context"):
        for part in ("weight", "bias"):
            rows = tensors[f"{LIST}.{IDLE}.{norm}.linear.{part}"].chunk(6)
            for gate in (rows[2], rows[5]):
                gate.mul_(0.01)
    save_file(tensors, path)
    return folder


@pytest.fixture
def calibration(place, tmp_path):
    generator = torch.Generator().manual_seed(0)
    drawn = {
        "prompt_embeds": torch.randn(2, 5, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
    }
    save_file(drawn, tmp_path / "embeddings.safetensors")
    settings = {
        "samples": 2, "steps": 2, "guidance_scale": 1.0, "embeddings": tmp_path / "embeddings.safetensors",
    }  # fmt: skip
    return record(
        opened(place), CalibrationSettings.model_validate(settings), seed=1, cache=tmp_path / "cache",
        progress=QUIET,
    )  # fmt: skip


def opened(place):
    return open_model(ModelRef(id=str(place)), progress=QUIET)


def apply(model, calibration, tmp_path, **keys):
    settings = DepthSettings.model_validate(keys)
    predicted = registry.get("depth").plan(model.spec, settings)
    details = registry.get("depth").apply(model, settings, calibration, Workspace(tmp_path, tmp_path), QUIET)
    assert predicted.after == model.size()
    return details


@pytest.mark.parametrize("by", ["shortgpt", "flux_lite"])
def test_a_block_that_does_nothing_goes_first(by, place, calibration, tmp_path):
    details = apply(opened(place), calibration, tmp_path, by=by, keep=2)
    assert details["blocks"][LIST]["kept"] == [0, 2]


def test_the_loss_says_what_goes(place, calibration, tmp_path):
    model = opened(place)
    objective = objective_for(model, calibration, None)
    whole = mean_loss(model, objective, QUIET)
    scores = apply(opened(place), calibration, tmp_path, by="sensitivity", keep=2)["scores"][LIST]
    assert abs(scores[IDLE]) < min(abs(scores[0]), abs(scores[2]))
    for gone, rise in enumerate(scores):
        left = opened(place)
        keep = [other for other in range(3) if other != gone]
        apply(left, calibration, tmp_path, by="indices", keep=keep)
        # Where the last block goes the one before it becomes the last, which changes nothing of the image.
        assert mean_loss(left, objective, QUIET) - whole == pytest.approx(rise, rel=1e-3, abs=1e-5)


def test_random_choices_are_told_apart_by_the_loss(place, calibration, tmp_path):
    losses = {}
    for pick in ("least", "largest"):
        model = opened(place)
        told = apply(model, calibration, tmp_path, by="random", keep=2, draws=3, pick=pick)["random"]
        objective = objective_for(model, calibration, None)
        losses[pick] = mean_loss(model, objective, QUIET)
        assert losses[pick] == pytest.approx(told["loss"], rel=1e-4)
    assert losses["least"] < losses["largest"]
