"""Captions that are dropped in training, so that what guidance subtracts is trained as well."""

from dataclasses import replace

import pytest
import torch
from compress.calibration.captions import DROP_RATE
from compress.calibration.diffusion import record
from compress.calibration.diffusion_loss import task_for
from compress.compressors.recovery.noised import NoisedBatches
from compress.recipes.schema import CalibrationSettings
from safetensors.torch import save_file

from ..small_dits import Told, opened, recorded
from ..tiny_denoisers import FLUX, HUNYUAN, PIXELS, embeddings_of, save_denoiser

NO_CAPTION_DROPPED = "no caption is dropped in training: "


def sd3_embeddings(count, prefix="", length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}prompt_embeds": torch.randn(count, length, 32, generator=generator),
        f"{prefix}pooled_prompt_embeds": torch.randn(count, 32, generator=generator),
    }


def pixart_embeddings(count, prefix="", seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, 5)
    mask[:, 2 if prefix else 4 :] = 0
    embeds = torch.randn(count, 5, 32, generator=generator)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask}


@pytest.fixture
def trained_on(tmp_path):
    """Return `trained_on(folder, embeddings, stored=None, **keys) -> (model, data, notes)`."""

    def make(folder, embeddings, stored=None, **keys):
        model, told = opened(folder), Told()
        save_file(embeddings, tmp_path / "prompts.safetensors")
        data = {"generate": 4, "steps": 1}
        if stored is not None:
            save_file(stored, tmp_path / "mine.safetensors")
            data = {"latents": tmp_path / "mine.safetensors"}
        settings = CalibrationSettings.model_validate(
            {"samples": 3, "steps": 1, "batch_size": 2, "guidance_scale": 2.0,
             "embeddings": tmp_path / "prompts.safetensors", "data": data, **keys}
        )  # fmt: skip
        calibration = record(model, settings, seed=0, cache=tmp_path / "cache", progress=told)
        return model, calibration.training(model, None, told), told.notes

    return make


def dropped_rows(model, data, names, size=400):
    """Which rows of a batch have the empty prompt; all that is said of the prompt goes together."""
    call = NoisedBatches(data, task_for(model), size, 0)(0, 0, 1).call
    plain = NoisedBatches(replace(data, empty={}), task_for(model), size, 0)(0, 0, 1).call
    rows = None
    for name, empty in zip(names, data.empty.values(), strict=True):
        changed = (call[name] != plain[name]).flatten(1).any(dim=1)
        assert torch.equal(call[name][changed], empty.expand(int(changed.sum()), *empty.shape[1:]))
        assert rows is None or torch.equal(rows, changed)
        rows = changed
    assert torch.equal(call["hidden_states"], plain["hidden_states"])
    halves = [NoisedBatches(data, task_for(model), size, 0)(0, part, 2).call for part in (0, 1)]
    for name in names:
        assert torch.equal(torch.cat([half[name] for half in halves]), call[name])
    return rows


@pytest.mark.parametrize("stored", [False, True])
def test_some_captions_become_the_empty_one(stored, tiny_sd3, trained_on):
    negative = sd3_embeddings(1, "negative_", seed=1)
    mine = {"latents": torch.randn(3, 4, 8, 8), **sd3_embeddings(3, seed=2)} if stored else None
    model, data, notes = trained_on(tiny_sd3, {**sd3_embeddings(2), **negative}, mine)
    assert [*data.empty] == ["encoder_hidden_states", "pooled_projections"] and notes == []
    for found, given in zip(data.empty.values(), negative.values(), strict=True):
        assert torch.equal(found, given)
    rows = dropped_rows(model, data, [*data.empty])
    spread = (DROP_RATE * (1 - DROP_RATE) / 400) ** 0.5
    assert abs(rows.float().mean().item() - DROP_RATE) < 4 * spread


def test_masks_go_with_their_captions(tiny_pixart, trained_on):
    given = {**pixart_embeddings(2), **pixart_embeddings(1, "negative_", seed=1)}
    model, data, _ = trained_on(tiny_pixart, given)
    rows = dropped_rows(model, data, ["encoder_hidden_states", "encoder_attention_mask"])
    assert 10 < rows.sum() < 80


def test_hunyuan_forgets_both_texts(tmp_path, trained_on):
    model, data, notes = trained_on(save_denoiser(HUNYUAN, tmp_path / "model"), embeddings_of(HUNYUAN))
    assert len(data.empty) == 4 and notes == []
    call = NoisedBatches(data, task_for(model), 100, 0)(0, 0, 1).call
    empty = data.empty["encoder_hidden_states_t5"]
    assert 2 < (call["encoder_hidden_states_t5"] == empty).flatten(1).all(dim=1).sum() < 25


def test_the_key_knows_the_empty_prompt(tiny_sd3, trained_on):
    keys = {
        trained_on(tiny_sd3, {**sd3_embeddings(2), **sd3_embeddings(1, "negative_", seed=seed)}, mine)[1].key
        for mine in [{"latents": torch.zeros(3, 4, 8, 8), **sd3_embeddings(3)}]
        for seed in (1, 2)
    }
    assert len(keys) == 2


def test_where_none_are_dropped_it_is_told(tiny_sd3, trained_on):
    both = {**sd3_embeddings(2), **sd3_embeddings(1, "negative_", seed=1)}
    several = {**sd3_embeddings(2), **sd3_embeddings(2, "negative_", seed=1)}
    longer = {"latents": torch.randn(3, 4, 8, 8), **sd3_embeddings(3, length=7)}
    for embeddings, stored, keys, why in (
        (both, None, {"guidance_scale": 1.0}, "the calibration has no guidance"),
        (several, None, {}, "the calibration has several negative prompt_embeds"),
        (both, longer, {}, r"the empty prompt's prompt_embeds has another shape ([5, 32] in the calibration"),
    ):
        model, data, notes = trained_on(tiny_sd3, embeddings, stored, **keys)
        assert data.empty == {}
        (note,) = notes
        assert note.startswith(f"{NO_CAPTION_DROPPED}{why}")
        assert NoisedBatches(data, task_for(model), 8, 0)(0, 0, 1).noise.shape == (8, 4, 8, 8)


def test_models_that_need_no_empty_prompt_hear_nothing(tmp_path, trained_on, tiny_dit):
    folder = save_denoiser(FLUX, tmp_path / "model", guidance_embeds=True)
    _, data, notes = trained_on(folder, embeddings_of(FLUX), size=PIXELS)
    assert data.empty == {} and notes == []
    model = opened(tiny_dit)
    calibration = recorded(model, tmp_path / "cache", {"generate": 2, "steps": 1}, guidance_scale=2.0)
    assert calibration.guided and calibration.training(model, None, told := Told()).empty == {}
    assert told.notes == []
