"""Prompts through a pipeline's own text encoders, equal to what the stock pipeline computes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from compress.calibration.diffusion import record, recording_key
from compress.calibration.prompts import encode, read_prompts
from compress.calibration.sampler import conditions_for
from compress.errors import SourceError
from compress.evaluation.evaluator import Evaluator
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, FidelitySettings, ModelRef
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

QUIET = SilentProgress()
WORDS = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁dog", "▁"]


@pytest.fixture
def pipeline(tiny_pixart, tmp_path):
    """A whole PixArt pipeline folder: tokenizer, T5, transformer and scheduler; the vae is left out."""
    torch.manual_seed(0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    root = tmp_path / "pipeline"
    encoder.save_pretrained(root / "text_encoder")
    T5Tokenizer(vocab=[(word, -float(rank)) for rank, word in enumerate(WORDS)]).save_pretrained(
        root / "tokenizer"
    )
    shutil.copytree(tiny_pixart / "scheduler", root / "scheduler")
    shutil.copytree(tiny_pixart, root / "transformer", ignore=shutil.ignore_patterns("scheduler"))
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def test_equal_to_the_stock_encoding(pipeline):
    model = open_model(ModelRef(id=str(pipeline)), progress=QUIET)
    positive, negative = encode(model, ["a cat", "a dog"])
    tokenizer = T5Tokenizer.from_pretrained(pipeline / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(pipeline / "text_encoder")
    tokens = tokenizer(["a cat", "a dog", ""], padding="max_length", max_length=120, return_tensors="pt")
    with torch.no_grad():
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    torch.testing.assert_close(positive["encoder_hidden_states"], states[:2])
    torch.testing.assert_close(negative["encoder_hidden_states"], states[2:])
    assert torch.equal(positive["encoder_attention_mask"], tokens.attention_mask[:2])
    assert not torch.equal(states[0, :5], states[1, :5])


def test_recording_with_prompts(pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    model = open_model(ModelRef(id=str(pipeline)), progress=QUIET)
    settings = CalibrationSettings(samples=3, steps=2, batch_size=2, prompts=prompts)
    calibration = record(model, settings, seed=0, cache=tmp_path / "cache", progress=QUIET)
    calls = list(calibration.calls())
    assert [len(call["encoder_hidden_states"]) for call in calls] == [4, 4, 2, 2]
    first, second = calls[0]["encoder_hidden_states"], calls[2]["encoder_hidden_states"]
    assert torch.equal(first[0], second[0])  # the prompts are taken in turn
    assert torch.equal(first[2], first[3])  # the empty prompt
    seen = []
    calibration.observe(
        model, ["transformer_blocks.0.attn2.to_k"], lambda _, x, t: seen.append(x.shape), QUIET
    )
    assert seen == [(4, 120, 64)] * 2 + [(2, 120, 64)] * 2


def test_a_pipeline_without_its_text_encoder(pipeline, tmp_path):
    shutil.rmtree(pipeline / "text_encoder")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    model = open_model(ModelRef(id=str(pipeline)), progress=QUIET)
    with pytest.raises(SourceError, match="text_encoder: missing") as caught:
        conditions_for(model, CalibrationSettings(prompts=prompts), 1, 0)
    assert "calibration.embeddings" in caught.value.hint


def test_an_index_that_names_no_pipeline(pipeline):
    (pipeline / "model_index.json").write_text('{"_class_name": "AutoencoderKL"}')
    model = open_model(ModelRef(id=str(pipeline)), progress=QUIET)
    with pytest.raises(SourceError, match="'AutoencoderKL' is not a pipeline"):
        encode(model, ["a cat"])


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("  a cat \n\na dog\n")
    assert read_prompts(path) == ["a cat", "a dog"]
    with pytest.raises(SourceError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="cannot be read"):
        read_prompts(path)


@pytest.mark.parametrize(
    "change",
    [
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "model_index.json",
    ],
)
def test_prompts_are_encoded_anew_where_the_encoders_were_changed(pipeline, tmp_path, change):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    settings = CalibrationSettings(samples=2, steps=1, prompts=prompts)

    def keys():
        model = open_model(ModelRef(id=str(pipeline)), progress=QUIET)
        evaluator = Evaluator(EvaluateSettings(fidelity=FidelitySettings(samples=1, steps=1)), 0, settings)
        reference = evaluator.reference(model, tmp_path / "cache", QUIET).folder.name
        return recording_key(model, settings, 0), reference, recording_key(model, CalibrationSettings(), 0)

    before = keys()
    assert keys() == before
    path = pipeline / change
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_more": 1}))
    else:
        tensors = load_file(path)
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    after = keys()
    assert after[0] != before[0] and after[1] != before[1]
    assert after[2] == before[2]  # without prompts nothing is encoded


def test_encoders_from_the_hub_count_by_their_commit(pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    model = open_model(ModelRef(id=str(pipeline)), progress=QUIET)
    source, keys = model.source, set()
    for revision in ("1" * 40, "2" * 40, "2" * 40):
        model.source = replace(source, revision=revision)
        settings = CalibrationSettings(samples=2, steps=1, prompts=prompts)
        keys.add(recording_key(model, settings, 0))
    assert len(keys) == 2
