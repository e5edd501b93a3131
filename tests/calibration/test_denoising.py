"""The denoising loss, by hand; on its own samples; the same however these are batched."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import pytest
import torch
from compress.calibration.conditions import conditions_for
from compress.calibration.denoising import TIMESTEPS
from compress.calibration.objectives import objective_for
from compress.calibration.recording import record
from compress.calibration.sampler import sample
from compress.calibration.seeds import generator_for
from compress.errors import StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file


def _open(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def _record(model, **values):
    settings = CalibrationSettings.model_validate({"samples": 3, "steps": 3, "batch_size": 2, **values})
    return record(model, settings, seed=5, cache=None, progress=SilentProgress())


def _schedule(folder, **values):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_clean_samples_are_those_that_the_sampler_draws(tiny_dit, guidance_scale):
    model = _open(tiny_dit)
    calibration = _record(model, guidance_scale=guidance_scale)
    parts = list(calibration.clean())
    settings = CalibrationSettings(samples=3, steps=3, batch_size=2, guidance_scale=guidance_scale)
    conditions = conditions_for(model, settings, 3, 5)
    drawn = sample(
        model, conditions, steps=3, guidance_scale=guidance_scale, seed=5, batch_size=2,
        progress=SilentProgress(),
    )  # fmt: skip
    assert torch.equal(torch.cat([clean for clean, _ in parts]), drawn)
    labels = torch.cat([inputs["class_labels"] for _, inputs in parts])
    assert torch.equal(labels, conditions.labels)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_by_hand(tiny_dit, prediction):
    """One sample at one timestep, against the schedule's own arithmetic."""
    import diffusers

    _schedule(tiny_dit, prediction_type=prediction)
    model = _open(tiny_dit)
    objective = objective_for(model, _record(model, samples=1), None)
    assert (objective.samples, objective.parts) == (TIMESTEPS, TIMESTEPS)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tiny_dit / "scheduler")
    (clean, inputs), found = next(objective.calibration.clean()), list(objective.losses(model))
    for time, (loss, count) in zip(objective.timesteps, found, strict=True):
        noise = torch.randn(clean.shape[1:], generator=generator_for(5, "denoising", 0, time))[None]
        times = torch.tensor([time])
        noisy = scheduler.add_noise(clean, noise, times)
        with torch.no_grad():
            output = model.module(hidden_states=noisy, timestep=times, **inputs).sample
        wanted = {"epsilon": noise, "sample": clean}.get(prediction)
        if wanted is None:
            wanted = scheduler.get_velocity(clean, noise, times)
        assert output.shape[1] == 8, "the variance is learned, and left alone"
        assert count == 1
        assert float(loss) == pytest.approx(float((output[:, :4] - wanted).square().mean()), rel=1e-4)


def test_timesteps_are_spread_over_the_schedule(tiny_dit):
    model = _open(tiny_dit)
    assert objective_for(model, _record(model), None).timesteps == (125, 375, 625, 875)


def test_sums_do_not_depend_on_the_batches(tiny_dit):
    model = _open(tiny_dit)
    totals = []
    for batch_size in (1, 3):
        objective = objective_for(model, _record(model, batch_size=batch_size), "denoising")
        assert objective.samples == 3 * TIMESTEPS
        totals.append(sum(float(loss) for loss, _ in objective.losses(model)))
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


def test_going_on_from_a_part(tiny_dit):
    model = _open(tiny_dit)
    objective = objective_for(model, _record(model), None)
    every = [float(loss) for loss, _ in objective.losses(model)]
    assert len(every) == 2 * TIMESTEPS == objective.parts
    assert [float(loss) for loss, _ in objective.losses(model, 5)] == every[5:]


def test_gradients_reach_the_weights(tiny_dit):
    model = _open(tiny_dit)
    objective = objective_for(model, _record(model), None)
    model.module.requires_grad_(True)
    loss, _ = next(objective.losses(model, 2))
    loss.backward()
    assert all(
        layer.weight.grad.abs().sum() > 0
        for name, layer in model.module.named_modules()
        if name.endswith(("to_q", "ff.net.2"))
    )


def test_prompts_as_well(tiny_pixart, tmp_path):
    path = tmp_path / "embeddings.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(2, 5, 32, generator=generator)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    masks = {
        name: torch.ones(2, 5).long() for name in ("prompt_attention_mask", "negative_prompt_attention_mask")
    }
    save_file(tensors | masks, path)
    model = _open(tiny_pixart)
    calibration = _record(model, embeddings=path)
    objective = objective_for(model, calibration, None)
    assert [len(inputs["encoder_hidden_states"]) for _, inputs in calibration.clean()] == [2, 1]
    assert all(float(loss) > 0 for loss, _ in objective.losses(model))


def test_other_losses_and_other_schedules_are_refused(tiny_dit):
    model = _open(tiny_dit)
    calibration = _record(model)
    with pytest.raises(StageError, match="loss cross_entropy: is for classifiers"):
        objective_for(model, calibration, "cross_entropy")
    _schedule(tiny_dit, prediction_type="score")
    with pytest.raises(StageError, match="no training loss is known for DDIMScheduler") as found:
        objective_for(_open(tiny_dit), calibration, None, "leave it")
    assert str(found.value.hint).startswith("known: flow matching")
    assert str(found.value.hint).endswith("; leave it")


def test_flow_matching_by_hand(tiny_sd3, tmp_path):
    """The velocity, at the levels below which an eighth, three eighths ... of what is trained on lies."""
    path = tmp_path / "embeddings.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            "prompt_embeds": torch.randn(1, 5, 32, generator=generator),
            "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
        },
        path,
    )
    model = _open(tiny_sd3)
    calibration = _record(model, embeddings=path, guidance_scale=1.0, samples=1)
    objective = objective_for(model, calibration, None)
    levels = []
    for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8):
        odds = 3.0 * math.exp(NormalDist().inv_cdf(share))  # the model's shift is 3
        levels.append(odds / (1 + odds))
    assert objective.timesteps == pytest.approx([1000 * level for level in levels], rel=1e-5)
    (clean, inputs), found = next(calibration.clean()), list(objective.losses(model))
    for time, level, (loss, count) in zip(objective.timesteps, levels, found, strict=True):
        drawn = generator_for(5, "denoising", 0, int(time))
        noise = torch.randn(clean.shape[1:], generator=drawn)[None]
        noisy = (1 - level) * clean + level * noise
        with torch.no_grad():
            output = model.module(hidden_states=noisy, timestep=torch.tensor([time]), **inputs).sample
        expected = float((output - (noise - clean)).square().mean())
        assert count == 1 and float(loss) == pytest.approx(expected, rel=1e-4)
    before, shift = objective.key, model.scheduler.config.shift
    model.scheduler.register_to_config(shift=shift + 1)
    assert objective_for(model, calibration, None).key != before
