"""U-Nets of Stable Diffusion: sampled, conditioned and recorded as the stock pipelines do it."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from compress.calibration.conditions import conditions_for
from compress.calibration.diffusion import record
from compress.calibration.prompts import encode
from compress.calibration.sampler import make_scheduler, sample
from compress.calibration.seeds import generator_for
from compress.calibration.sensitivity_calls import RecordedCalls
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file

QUIET = SilentProgress()
FIRST = {
    "use_linear_projection": False, "addition_embed_type": None, "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}  # fmt: skip
ANCESTRAL = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
# As SD 1.5 comes, and a v-prediction as SD 2.1's.
MULTISTEP = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear")
VELOCITY = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")


def opened(folder):
    return open_model(ModelRef(id=str(folder)), progress=QUIET)


@pytest.fixture
def embeddings(tmp_path):
    """A file with two prompts as SDXL's, negative ones included."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for prefix in ("", "negative_"):
        tensors[f"{prefix}prompt_embeds"] = torch.randn(2, 77, 32, generator=generator)
        tensors[f"{prefix}pooled_prompt_embeds"] = torch.randn(2, 24, generator=generator)
    save_file(tensors, tmp_path / "embeddings.safetensors")
    return tmp_path / "embeddings.safetensors", tensors


def noise_and_generators():
    generators = [generator_for(0, "noise", index) for index in range(2)]
    return torch.stack([torch.randn(4, 8, 8, generator=item) for item in generators]), generators


def draw(model, path, *, steps, guidance, batch=2, **more):
    conditions = conditions_for(model, CalibrationSettings(embeddings=path), 2, 0)
    return sample(
        model,
        conditions,
        steps=steps,
        guidance_scale=guidance,
        seed=0,
        batch_size=batch,
        progress=QUIET,
        **more,
    )


def parts(kind):
    """The arguments of a stock pipeline that a denoiser and embeddings make superfluous."""
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker")
    return dict.fromkeys({*names, "feature_extractor"} & inspect.signature(kind.__init__).parameters.keys())


@pytest.mark.parametrize(
    ("scheduler", "steps", "guidance"),
    [(ANCESTRAL, 1, 0.0), (ANCESTRAL, 3, 0.0), (VELOCITY, 3, 5.0)],
)
def test_matches_the_stock_xl_pipeline(tiny_unet, embeddings, scheduler, steps, guidance):
    model, (path, tensors) = opened(tiny_unet), embeddings
    model.scheduler = scheduler
    mine = draw(model, path, steps=steps, guidance=guidance)
    kind = diffusers.StableDiffusionXLPipeline
    pipeline = kind(unet=model.module, scheduler=make_scheduler(model, None), **parts(kind))
    pipeline.set_progress_bar_config(disable=True)
    noise, generators = noise_and_generators()
    theirs = pipeline(
        **tensors, guidance_scale=guidance, num_inference_steps=steps, latents=noise, generator=generators,
        output_type="latent",
    ).images  # fmt: skip
    assert mine.abs().max() > 1
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scheduler", [MULTISTEP, VELOCITY])
def test_matches_the_stock_pipeline_of_the_first_models(make_tiny, embeddings, scheduler):
    model, (path, tensors) = opened(make_tiny("UNet2DConditionModel", **FIRST)), embeddings
    model.scheduler = scheduler
    mine = draw(model, path, steps=4, guidance=4.0)
    kind = diffusers.StableDiffusionPipeline
    pipeline = kind(unet=model.module, scheduler=make_scheduler(model, None), **parts(kind),
                    requires_safety_checker=False)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise, generators = noise_and_generators()
    theirs = pipeline(
        prompt_embeds=tensors["prompt_embeds"], negative_prompt_embeds=tensors["negative_prompt_embeds"],
        guidance_scale=4.0, num_inference_steps=4, latents=noise, generator=generators, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_a_stochastic_scheduler_is_seeded_per_sample(tiny_unet, embeddings):
    model, (path, _) = opened(tiny_unet), embeddings
    model.scheduler = ANCESTRAL
    one, two = (draw(model, path, steps=3, guidance=1.0, batch=batch) for batch in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    model.scheduler = None
    assert draw(model, path, steps=2, guidance=3.0).isfinite().all()


def test_recorded_calls_are_replayed(tiny_unet, embeddings, tmp_path):
    model, (path, tensors) = opened(tiny_unet), embeddings
    settings = CalibrationSettings(samples=3, steps=2, batch_size=2, guidance_scale=2.0, embeddings=path)
    calibration = record(model, settings, seed=0, cache=tmp_path / "cache", progress=QUIET)
    calls = list(calibration.calls())
    assert [len(call["sample"]) for call in calls] == [4, 4, 2, 2]
    added = calls[0]["added_cond_kwargs"]
    assert torch.equal(added["time_ids"], torch.tensor([64.0, 64, 0, 0, 64, 64]).repeat(4, 1))
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    assert torch.equal(added["text_embeds"], torch.cat([tensors[name] for name in names]))
    with torch.no_grad():
        outputs = [model.module(**call).sample for call in calls]
    drawn = []
    conditions = conditions_for(model, settings, 3, 0)
    sample(
        model, conditions, steps=2, guidance_scale=2.0, seed=0, batch_size=2, progress=QUIET,
        on_call=lambda _, output: drawn.append(output),
    )  # fmt: skip
    assert all(torch.equal(one, two) for one, two in zip(outputs, drawn, strict=True))
    some = list(RecordedCalls(calibration, steps=1, samples=1))
    assert [len(call["sample"]) for call in some] == [2]
    assert some[0]["added_cond_kwargs"]["text_embeds"].shape == (2, 24)


def test_layers_without_tokens_are_observed(tiny_unet, embeddings):
    model, (path, _) = opened(tiny_unet), embeddings
    settings = CalibrationSettings(samples=2, steps=2, guidance_scale=0.0, embeddings=path)
    calibration = record(model, settings, seed=0, cache=None, progress=QUIET)
    names = [
        "down_blocks.1.resnets.0.time_emb_proj",
        "mid_block.attentions.0.transformer_blocks.1.attn2.to_k",
        "mid_block.attentions.0.proj_in",
    ]
    seen = {}
    calibration.observe(model, names, lambda name, x, t: seen.setdefault(name, (x.shape, t.shape)), QUIET)
    shapes = [(2, 1, 128), (2, 77, 32), (2, 16, 64)]
    assert seen == {name: (shape, (2,)) for name, shape in zip(names, shapes, strict=True)}


def test_prompts_are_encoded_as_the_stock_pipeline_does(tiny_sdxl):
    model = opened(tiny_sdxl)
    assert isinstance(model.scheduler, diffusers.EulerAncestralDiscreteScheduler)
    positive, negative = encode(model, ["a cat", "a dog got"])
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, vae=None, unet=None)
    embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(["a cat", "a dog got"])
    assert torch.equal(positive["encoder_hidden_states"], embeds)
    assert torch.equal(positive["added_cond_kwargs/text_embeds"], pooled)
    assert torch.equal(negative["encoder_hidden_states"], negative_embeds[:1])
    assert torch.equal(negative["added_cond_kwargs/text_embeds"], negative_pooled[:1])
    assert not negative_embeds.any() and not torch.equal(embeds[0], embeds[1])
    assert torch.equal(embeds[0, 0], embeds[1, 0])  # the first token of a causal encoder sees itself alone


def test_a_turbo_pipeline_is_recorded_in_one_step(tiny_sdxl, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    settings = CalibrationSettings(samples=2, steps=1, guidance_scale=0.0, prompts=prompts)
    calibration = record(opened(tiny_sdxl), settings, seed=0, cache=None, progress=QUIET)
    (call,) = calibration.calls()
    assert call["sample"].shape == (2, 4, 8, 8) and call["timestep"].tolist() == [999.0, 999.0]


def test_the_first_models_have_one_text_encoder(tiny_sdxl, make_tiny):
    import json
    import shutil

    shutil.rmtree(tiny_sdxl / "unet")
    shutil.copytree(make_tiny("UNet2DConditionModel", name="first", **FIRST), tiny_sdxl / "unet")
    index = json.loads((tiny_sdxl / "model_index.json").read_text())
    index = {key: value for key, value in index.items() if not key.endswith("_2")}
    index |= {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    index.pop("force_zeros_for_empty_prompt")
    (tiny_sdxl / "model_index.json").write_text(json.dumps(index))
    positive, negative = encode(opened(tiny_sdxl), ["a cat"])
    assert list(positive) == list(negative) == ["encoder_hidden_states"]
    assert positive["encoder_hidden_states"].shape == (1, 77, 16)
    assert negative["encoder_hidden_states"].any()


def test_embeddings_of_another_model_are_refused(tiny_unet, embeddings):
    model, (path, tensors) = opened(tiny_unet), embeddings
    save_file({**tensors, "pooled_prompt_embeds": torch.zeros(2, 16)}, path)
    with pytest.raises(SourceError, match="reads pooled_prompt_embeds of 24 channels, and these have 16"):
        conditions_for(model, CalibrationSettings(embeddings=path), 1, 0)
    save_file({"prompt_embeds": torch.zeros(2, 77, 32)}, path)
    with pytest.raises(SourceError, match="no tensor 'pooled_prompt_embeds'"):
        conditions_for(model, CalibrationSettings(embeddings=path), 1, 0)
    save_file({"prompt_embeds": torch.zeros(1, 77, 32), "pooled_prompt_embeds": torch.zeros(1, 24)}, path)
    with pytest.raises(SourceError, match="no tensor negative_prompt_embeds, which guidance"):
        draw(model, path, steps=1, guidance=3.0)
