"""Sampling: the stock pipeline's arithmetic, seeds per sample, guidance, schedulers."""

from __future__ import annotations

import diffusers
import pytest
import torch
from compress.calibration.sampler import conditions_for, make_scheduler, sample
from compress.errors import SourceError, UsageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file

QUIET = SilentProgress()


def opened(folder):
    return open_model(ModelRef(id=str(folder)), progress=QUIET)


def draw(model, *, n=3, seed=0, steps=3, guidance=3.0, batch=2, settings=None, **more):
    conditions = conditions_for(model, settings or CalibrationSettings(), n, seed)
    return sample(
        model,
        conditions,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        batch_size=batch,
        progress=QUIET,
        **more,
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_matches_the_stock_dit_pipeline(make_tiny, monkeypatch, guidance):
    # The stock pipeline has 1000 as its null class, whatever the model.
    model = opened(make_tiny(num_embeds_ada_norm=1000))
    labels = (7, 3)
    mine = draw(model, n=2, guidance=guidance, settings=CalibrationSettings(classes=labels))

    from compress.calibration.seeds import generator_for

    noise = torch.stack([torch.randn(4, 8, 8, generator=generator_for(0, "noise", i)) for i in range(2)])
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: noise.clone())
    scheduler = diffusers.DDIMScheduler.from_config(model.scheduler.config)
    autoencoder = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=1.0)
    seen = []
    monkeypatch.setattr(
        autoencoder, "decode", lambda x: seen.append(x) or type("Output", (), {"sample": x})()
    )
    pipeline = diffusers.DiTPipeline(transformer=model.module, vae=autoencoder, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(list(labels), guidance_scale=guidance, num_inference_steps=3, output_type="pt")
    assert torch.equal(mine, seen[0])


def test_noise_of_a_sample_does_not_depend_on_the_batch(tiny_dit):
    model = opened(tiny_dit)
    first = {}
    for batch in (1, 2, 5):
        calls = []
        images = draw(
            model, n=5, batch=batch, steps=2, on_call=lambda kwargs, _, calls=calls: calls.append(kwargs)
        )
        half = [kwargs["hidden_states"].chunk(2)[0] for kwargs in calls[::2]]  # step 0 of every batch
        first[batch] = (torch.cat(half), images)
    for noise, images in first.values():
        assert torch.equal(noise, first[1][0])
        torch.testing.assert_close(images, first[1][1], rtol=1e-4, atol=1e-4)


def test_runs_are_equal_and_leave_the_global_generator_alone(tiny_dit):
    model = opened(tiny_dit)
    state = torch.random.get_rng_state()
    assert torch.equal(draw(model), draw(model))
    assert not torch.equal(draw(model), draw(model, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_guided_call_has_the_conditional_half_first(tiny_dit):
    model, calls = opened(tiny_dit), []
    draw(
        model, n=2, steps=1, settings=CalibrationSettings(classes=(4, 6)),
        on_call=lambda kwargs, output: calls.append((kwargs, output)),
    )  # fmt: skip
    (kwargs, output), *rest = calls
    assert not rest
    assert kwargs["class_labels"].tolist() == [4, 6, 10, 10]
    assert torch.equal(*kwargs["hidden_states"].chunk(2))
    assert output.shape == (4, 8, 8, 8)  # twice the channels: the variance


def test_no_guidance_means_no_doubling(tiny_dit):
    calls = []
    draw(
        opened(tiny_dit),
        n=2,
        guidance=1.0,
        on_call=lambda kwargs, _: calls.append(len(kwargs["hidden_states"])),
    )
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", [None, "ddim", "dpm++"])
def test_schedulers_give_finite_samples(tiny_dit, name, steps):
    images = draw(opened(tiny_dit), steps=steps, scheduler_name=name)
    assert images.shape == (3, 4, 8, 8)
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_schedulers_keep_the_noise_schedule_of_the_checkpoint(tiny_dit):
    model = opened(tiny_dit)
    assert isinstance(make_scheduler(model, "dpm++"), diffusers.DPMSolverMultistepScheduler)
    for name in (None, "ddim", "dpm++"):
        assert torch.equal(make_scheduler(model, name).betas, model.scheduler.betas)
    with pytest.raises(UsageError, match="'euler' is unknown"):
        make_scheduler(model, "euler")


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_ddpm_draws_its_noise_per_sample(tiny_dit, variance_type):
    model = opened(tiny_dit)
    model.scheduler = diffusers.DDPMScheduler(variance_type=variance_type)
    one, two = draw(model, n=2, batch=1, guidance=1.0), draw(model, n=2, batch=2, guidance=1.0)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    draw(model, n=2)  # guided, with the learned variance of the conditional half


def test_a_model_without_a_scheduler_uses_its_familys(tiny_dit):
    model = opened(tiny_dit)
    model.scheduler = None
    assert draw(model).isfinite().all()


def test_the_dtype_of_the_model_is_kept(make_tiny):
    calls = []
    model = opened(make_tiny(dtype="bfloat16"))
    images = draw(
        model, on_call=lambda kwargs, output: calls.append((kwargs["hidden_states"].dtype, output.dtype))
    )
    assert set(calls) == {(torch.bfloat16, torch.bfloat16)}
    assert images.dtype == torch.float32


def test_classes_come_in_turn(tiny_dit):
    model = opened(tiny_dit)
    given = conditions_for(model, CalibrationSettings(classes=(5, 2)), 5, 0)
    assert given.labels.tolist() == [5, 2, 5, 2, 5]
    every = conditions_for(model, CalibrationSettings(), 20, 0)
    assert sorted(every.labels.tolist()) == sorted(list(range(10)) * 2)
    with pytest.raises(SourceError, match="10 is not a class; the model has 0 to 9"):
        conditions_for(model, CalibrationSettings(classes=(10,)), 1, 0)


def embeddings(path, model, prompts=3, negative=True):
    generator = torch.Generator().manual_seed(0)
    width = (
        model.config["caption_channels"]
        if model.family.name == "pixart"
        else model.config["joint_attention_dim"]
    )
    tensors = {"prompt_embeds": torch.randn(prompts, 6, width, generator=generator)}
    if model.family.name == "pixart":
        tensors["prompt_attention_mask"] = torch.ones(prompts, 6, dtype=torch.int64)
    else:
        tensors["pooled_prompt_embeds"] = torch.randn(
            prompts, model.config["pooled_projection_dim"], generator=generator
        )
    if negative:
        tensors |= {f"negative_{name}": tensor[:1].clone() * 0 + 1 for name, tensor in tensors.items()}
    save_file(tensors, path)
    return CalibrationSettings(embeddings=path)


@pytest.mark.parametrize("class_name", ["PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_prompt_models_sample_from_embeddings(make_tiny, tmp_path, class_name):
    model = opened(make_tiny(class_name))
    settings = embeddings(tmp_path / "prompts.safetensors", model)
    calls = []
    images = draw(model, n=4, settings=settings, on_call=lambda kwargs, _: calls.append(kwargs))
    assert images.shape == (4, 4, 8, 8)
    assert images.isfinite().all()
    states = calls[0]["encoder_hidden_states"]
    assert len(states) == 4
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[2:], torch.ones_like(states[2:]))


def test_size_conditions_of_pixart_alpha(make_tiny, tmp_path):
    # The size embedders are a third of the width each: 96 channels.
    model = opened(
        make_tiny(
            "PixArtTransformer2DModel",
            use_additional_conditions=True,
            attention_head_dim=24,
            cross_attention_dim=96,
        )
    )
    calls = []
    draw(
        model,
        settings=embeddings(tmp_path / "p.safetensors", model),
        on_call=lambda kwargs, _: calls.append(kwargs),
    )
    sizes = calls[0]["added_cond_kwargs"]
    assert sizes["resolution"].tolist() == [[64.0, 64.0]] * 4
    assert sizes["aspect_ratio"].shape == (4, 1)


def test_prompt_models_say_what_they_need(tiny_pixart, tmp_path):
    model = opened(tiny_pixart)
    with pytest.raises(SourceError) as caught:
        conditions_for(model, CalibrationSettings(), 2, 0)
    assert "calibration.prompts" in caught.value.hint
    assert "calibration.embeddings" in caught.value.hint
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n a dog \n")
    with pytest.raises(SourceError, match=r"no model_index\.json"):
        conditions_for(model, CalibrationSettings(prompts=prompts), 2, 0)
    prompts.write_text("\n")
    with pytest.raises(SourceError, match="holds no prompt"):
        conditions_for(model, CalibrationSettings(prompts=prompts), 2, 0)
    with pytest.raises(SourceError, match="conditioned on prompts"):
        conditions_for(model, CalibrationSettings(classes=(1,)), 2, 0)


def test_embedding_files_are_checked(tiny_pixart, tmp_path):
    model = opened(tiny_pixart)
    path = tmp_path / "p.safetensors"
    embeddings(path, model, negative=False)
    with pytest.raises(SourceError, match="have no tensor negative_prompt_embeds, which guidance") as caught:
        draw(model, settings=CalibrationSettings(embeddings=path))
    assert "in calibration, in its data and in evaluate.fidelity" in caught.value.hint
    save_file({"prompt_embeds": torch.zeros(1, 6, 32)}, path)
    with pytest.raises(SourceError, match="no tensor 'prompt_attention_mask'"):
        draw(model, settings=CalibrationSettings(embeddings=path))
    path.write_bytes(b"nothing")
    with pytest.raises(SourceError, match="cannot be read as safetensors"):
        draw(model, settings=CalibrationSettings(embeddings=path))


def test_flow_matching_refuses_other_schedulers(tiny_sd3):
    with pytest.raises(UsageError, match="flow-matching"):
        make_scheduler(opened(tiny_sd3), "ddim")
