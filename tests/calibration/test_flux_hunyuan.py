"""Sampling, recording and training data of Flux and Hunyuan-DiT, against the stock pipelines."""

from __future__ import annotations

import json
import shutil
from math import exp

import diffusers
import pytest
import torch
from compress.calibration.conditions import conditions_for
from compress.calibration.diffusion import record
from compress.calibration.diffusion_loss import task_for
from compress.calibration.latents import stored_latents
from compress.calibration.objectives import objective_for
from compress.calibration.sampler import make_scheduler, sample
from compress.calibration.seeds import generator_for
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ..tiny_denoisers import FLUX, HUNYUAN, PIXELS, embeddings_of, save_denoiser, save_embeddings

QUIET = SilentProgress()
STEPS, SEED = 3, 7


@pytest.fixture
def opened(tmp_path):
    """Return `opened(class_name, **config) -> open model`."""
    return lambda class_name, **config: open_model(
        ModelRef(id=str(save_denoiser(class_name, tmp_path / "model", **config))), progress=QUIET
    )


@pytest.fixture
def settings(tmp_path):
    """Return `settings(class_name, **keys)`: calibration on two prompts' embeddings."""

    def make(class_name, **keys):
        path = save_embeddings(class_name, tmp_path / "prompts.safetensors")
        size = {"size": PIXELS} if class_name == FLUX else {}
        return CalibrationSettings(**{"embeddings": path, "steps": STEPS, **size, **keys})

    return make


def drawn(model, settings, scale, on_call=None):
    conditions = conditions_for(model, settings.model_copy(update={"guidance_scale": scale}), 2, SEED)
    return sample(
        model, conditions, steps=STEPS, guidance_scale=scale, seed=SEED, batch_size=2, on_call=on_call,
        progress=QUIET,
    )  # fmt: skip


def noise_of(channels):
    rows = [torch.randn(channels, 8, 8, generator=generator_for(SEED, "noise", row)) for row in range(2)]
    return torch.stack(rows)


def flux_pipeline(model):
    stock = diffusers.FluxTransformer2DModel.from_pretrained(model.source.folder)
    pipeline = diffusers.FluxPipeline(model.scheduler, None, None, None, None, None, stock)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("dynamic", "guidance", "scale"), [(True, True, 3.5), (False, False, 1.0), (True, False, 4.0)]
)
def test_flux_draws_what_its_pipeline_draws(dynamic, guidance, scale, opened, settings):
    model = opened(FLUX, guidance_embeds=guidance)
    if not dynamic:
        model.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    calls = []
    found = drawn(
        model, settings(FLUX), scale, on_call=lambda call, output: calls.append((call, output.shape))
    )
    given = {name: value for name, value in embeddings_of(FLUX).items() if not name.startswith("negative")}
    negative = {name: value.expand(2, *value.shape[1:]) for name, value in embeddings_of(FLUX).items()
                if name.startswith("negative")}  # fmt: skip
    two = not guidance and scale > 1
    wanted = flux_pipeline(model)(
        **given, **(negative if two else {}), true_cfg_scale=scale if two else 1.0,
        guidance_scale=scale if guidance else 0.0, height=PIXELS, width=PIXELS, num_inference_steps=STEPS,
        latents=diffusers.FluxPipeline._pack_latents(noise_of(4), 2, 4, 8, 8), output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(
        found, diffusers.FluxPipeline._unpack_latents(wanted, PIXELS, PIXELS, 8), rtol=1e-4, atol=1e-4
    )
    call, shape = calls[0]
    assert shape == call["hidden_states"].shape == (4 if two else 2, 4, 8, 8)
    assert call.get("guidance", torch.zeros(0)).tolist() == ([3.5, 3.5] if guidance else [])
    assert len(calls) == STEPS and set(call) & {"img_ids", "txt_ids"} == set()


@pytest.mark.parametrize(
    ("scale", "config"),
    [(4.0, {}), (1.0, {"use_style_cond_and_image_meta_size": False}), (4.0, {"num_layers": 2})],
)
def test_hunyuan_draws_what_its_pipeline_draws(scale, config, opened, settings):
    model = opened(HUNYUAN, **config)
    # Between steps DDPM draws noise, and the pipeline other noise than we do.
    model.scheduler = diffusers.DDIMScheduler.from_config(model.scheduler.config)
    found = drawn(model, settings(HUNYUAN), scale)
    stock = diffusers.HunyuanDiT2DModel.from_pretrained(model.source.folder)
    pipeline = diffusers.HunyuanDiTPipeline(
        None, None, None, stock, model.scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    given = {
        name: value.expand(2, *value.shape[1:]) if name.startswith("negative") else value
        for name, value in embeddings_of(HUNYUAN).items()
    }
    wanted = pipeline(
        **given, guidance_scale=scale, height=64, width=64, num_inference_steps=STEPS, latents=noise_of(4),
        output_type="latent", use_resolution_binning=False,
    ).images  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("class_name", [FLUX, HUNYUAN])
def test_a_recording_replays_the_calls(class_name, opened, settings, tmp_path):
    model = opened(class_name, **({"guidance_embeds": True} if class_name == FLUX else {}))
    plan = settings(class_name, samples=3, batch_size=2, guidance_scale=2.0)
    calibration = record(model, plan, seed=SEED, cache=tmp_path / "cache", progress=QUIET)
    calls = list(calibration.calls())
    rows = [2, 2, 2, 1, 1, 1] if class_name == FLUX else [4, 4, 4, 2, 2, 2]
    assert [len(call["hidden_states"]) for call in calls] == rows and calibration.count() == len(rows)
    assert calibration.image_shape() == (4, 8, 8)
    seen = []
    first = model.family.blocks(model.module)[0][0]
    name = f"{first}.attn.to_q" if class_name == FLUX else f"{first}.attn1.to_q"
    calibration.observe(model, [name], lambda _, x, times: seen.append((x.shape, times)), QUIET)
    assert [shape for shape, _ in seen] == [(count, 16, 32) for count in rows]
    assert max(float(times.max()) for _, times in seen) > 500, "timesteps up to 1000"
    (samples, inputs), _ = calibration.clean()
    assert samples.shape == (2, 4, 8, 8)
    assert all(len(value) == 2 for value in inputs.values())
    assert ("guidance" in inputs) == (class_name == FLUX)


@torch.no_grad()
def test_the_loss_of_flux_is_that_of_its_tokens(opened, settings):
    model = opened(FLUX)
    plan = settings(FLUX, samples=2, batch_size=2, guidance_scale=1.0)
    calibration = record(model, plan, seed=SEED, cache=None, progress=QUIET)
    objective = objective_for(model, calibration, None)
    losses = [loss for loss, _ in objective.losses(model)]
    clean, inputs = next(calibration.clean())
    stock = diffusers.FluxTransformer2DModel.from_pretrained(model.source.folder)
    pack, ids = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._prepare_latent_image_ids
    for time, found in zip(objective.timesteps, losses, strict=True):
        rows = [
            torch.randn(4, 8, 8, generator=generator_for(SEED, "denoising", row, int(time))) for row in (0, 1)
        ]
        noise, level = torch.stack(rows), time / 1000
        tokens = stock(
            hidden_states=pack((1 - level) * clean + level * noise, 2, 4, 8, 8),
            timestep=torch.full((2,), level), img_ids=ids(2, 4, 4, "cpu", torch.float32),
            txt_ids=torch.zeros(5, 3), return_dict=False, **inputs,
        )[0]  # fmt: skip
        wanted = (tokens - pack(noise - clean, 2, 4, 8, 8)).square().flatten(1).mean(1).sum()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_shift_of_flux_follows_the_size_of_what_is_trained_on(opened):
    model = opened(FLUX)
    slope = (1.15 - 0.5) / (4096 - 256)
    for side, tokens in ((128, 4096), (32, 256), (8, 16)):
        task = task_for(model, shape=(4, side, side))
        assert task.shift == pytest.approx(exp(0.5 + slope * (tokens - 256)))
    assert task_for(model).shift == task_for(model, shape=(4, 128, 128)).shift


def test_hunyuan_learns_its_variance_where_the_config_says_so(opened, tmp_path):
    model = opened(HUNYUAN)
    assert task_for(model).learned and task_for(model).prediction == "v_prediction"
    shutil.rmtree(tmp_path / "model")
    assert not task_for(opened(HUNYUAN, learn_sigma=False)).learned


@pytest.mark.parametrize(
    ("class_name", "config", "wanted"),
    [
        (FLUX, {"guidance_embeds": True}, {"use_dynamic_shifting": True, "shift": 3.0}),
        (FLUX, {}, {"use_dynamic_shifting": False, "shift": 1.0}),
        (HUNYUAN, {}, {"prediction_type": "v_prediction", "beta_end": 0.03}),
        (HUNYUAN, {"use_style_cond_and_image_meta_size": False}, {"beta_end": 0.018}),
    ],
)
def test_the_usual_schedulers(class_name, config, wanted, opened):
    model = opened(class_name, **config)
    model.scheduler = None
    found = make_scheduler(model, None).config
    assert {key: found[key] for key in wanted} == wanted


def test_latents_of_ones_own(opened, tmp_path):
    model = opened(FLUX, guidance_embeds=True)
    given = {name: value for name, value in embeddings_of(FLUX, 3).items() if not name.startswith("neg")}
    file = tmp_path / "mine.safetensors"
    save_file({"latents": torch.randn(3, 4, 6, 6), **given}, file)
    data = stored_latents(model, file, None, guidance=3.5)
    latents, conditions = data.batch([2, 0], torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 6, 6) and conditions["guidance"].tolist() == [3.5, 3.5]
    assert torch.equal(conditions["encoder_hidden_states"], given["prompt_embeds"][[2, 0]])
    assert data.key != stored_latents(model, file, None, guidance=2.0).key
    save_file({"latents": torch.randn(3, 4, 5, 5), **given}, file)
    with pytest.raises(SourceError, match=r"takes \[4, side, side\] of an even side"):
        stored_latents(model, file, None)
    given["prompt_embeds"] = given["prompt_embeds"][..., :8].contiguous()
    save_file({"latents": torch.randn(3, 4, 6, 6), **given}, file)
    with pytest.raises(SourceError, match="prompt_embeds of 24 channels, and these have 8"):
        stored_latents(model, file, None)


@pytest.mark.parametrize(
    ("class_name", "key", "message"),
    [
        (FLUX, "pooled_prompt_embeds", "pooled_prompt_embeds of 20 channels, and these have 19"),
        (HUNYUAN, "prompt_embeds_2", "prompt_embeds_2 of 4 x 16, and these have 4 x 15"),
    ],
)
def test_embeddings_of_another_model_are_refused(class_name, key, message, opened, tmp_path):
    tensors = embeddings_of(class_name)
    tensors[key] = tensors[key][..., :-1].contiguous()
    save_file(tensors, tmp_path / "prompts.safetensors")
    settings = CalibrationSettings(embeddings=tmp_path / "prompts.safetensors")
    with pytest.raises(SourceError, match=message):
        conditions_for(opened(class_name), settings, 2, 0)
    del tensors[key]
    save_file(tensors, tmp_path / "prompts.safetensors")
    with pytest.raises(SourceError, match=f"no tensor '{key}'"):
        conditions_for(opened(class_name), settings, 2, 0)


WORDS = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁dog", "▁"]


def t5_parts(root, name, width):
    config = T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).eval().save_pretrained(root / f"text_encoder{name}")
    tokenizer = T5Tokenizer(vocab=[(word, -float(rank)) for rank, word in enumerate(WORDS)])
    tokenizer.save_pretrained(root / f"tokenizer{name}")


def pipeline_folder(class_name, root):
    """A pipeline with tiny text encoders; the autoencoder is left out."""
    config = (
        {"pooled_projection_dim": 16} if class_name == FLUX
        else {"text_len": 77, "text_len_t5": 256, "cross_attention_dim": 16}
    )  # fmt: skip
    save_denoiser(class_name, root / "transformer", **config)
    shutil.move(root / "transformer" / "scheduler", root / "scheduler")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if class_name == FLUX:
        words = ["<|startoftext|>", "<|endoftext|>", *"acdgot", *(f"{letter}</w>" for letter in "acdgot")]
        tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        text = CLIPTextConfig(vocab_size=len(words), **small, **tokens)
        CLIPTextModel(text).eval().save_pretrained(root / "text_encoder")
        names = {word: index for index, word in enumerate(words)}
        CLIPTokenizer(names, [], model_max_length=77).save_pretrained(root / "tokenizer")
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
        text = BertConfig(vocab_size=len(words), max_position_embeddings=80, **small)
        BertModel(text).eval().save_pretrained(root / "text_encoder")
        (root / "words.txt").write_text("\n".join(words))
        BertTokenizer(str(root / "words.txt"), model_max_length=77).save_pretrained(root / "tokenizer")
    t5_parts(root, "_2", 24 if class_name == FLUX else 16)
    kinds = {
        FLUX: ("FluxPipeline", "CLIPTextModel", "CLIPTokenizer", "FlowMatchEulerDiscreteScheduler"),
        HUNYUAN: ("HunyuanDiTPipeline", "BertModel", "BertTokenizer", "DDPMScheduler"),
    }[class_name]
    index = {
        "_class_name": kinds[0], "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", kinds[3]],
        "text_encoder": ["transformers", kinds[1]], "tokenizer": ["transformers", kinds[2]],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", class_name], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    if class_name == HUNYUAN:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.mark.parametrize("class_name", [FLUX, HUNYUAN])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(class_name, tmp_path):
    root = pipeline_folder(class_name, tmp_path / "pipeline")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    model = open_model(ModelRef(id=str(root)), progress=QUIET)
    keys = {"size": PIXELS} if class_name == FLUX else {}
    settings = CalibrationSettings(prompts=prompts, samples=2, guidance_scale=2.0, **keys)
    given = conditions_for(model, settings, 2, 0)
    others = {"vae": None, "transformer": None, "scheduler": None}
    if class_name == FLUX:
        pipeline = diffusers.FluxPipeline.from_pretrained(root, **others)
        texts, pooled, _ = pipeline.encode_prompt(["a cat", "a dog", ""], None)
        wanted = {"encoder_hidden_states": texts, "pooled_projections": pooled}
    else:
        pipeline = diffusers.HunyuanDiTPipeline.from_pretrained(root, **others)
        wanted = {}
        for index, suffix in enumerate(("", "_t5")):
            found = pipeline.encode_prompt(
                ["a cat", "a dog", ""], do_classifier_free_guidance=False, text_encoder_index=index
            )
            wanted[f"encoder_hidden_states{suffix}"] = found[0]
            wanted[f"text_embedding_mask{suffix}"] = found[2]
    assert set(given.positive) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(given.positive[name], value[:2])
        torch.testing.assert_close(given.negative[name], value[2:])
    assert not torch.equal(
        given.positive["encoder_hidden_states"][0], given.positive["encoder_hidden_states"][1]
    )
    calibration = record(model, settings.model_copy(update={"steps": 1}), seed=0, cache=None, progress=QUIET)
    assert calibration.count() == 1
