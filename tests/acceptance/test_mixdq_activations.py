"""MixDQ's activations as its brief asks (B9, B10): the first token of the text, and static ranges."""

from __future__ import annotations

import json
import shutil

import compress
import pytest
import torch
from compress.calibration.diffusion import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.quantization import ranges
from compress.compressors.quantization.first_tokens import Evidence
from compress.errors import PlanError, SourceError, StageError
from compress.exporters.formats import write
from compress.exporters.inspection import inspect
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from compress.recipes.stages import RtnSettings
from compress.runtime.load import load
from compress.runtime.modules import quantized_layers
from safetensors.torch import load_file, save_file

WORDS = ["a cat", "a dog", "b c d e", "g o t"]
STAGE = {"weight_bits": 8, "weight_symmetric": True, "activation_scale": "static"}


def clip(layers=3):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def prompts(count=4, length=77, seed=0):
    """Return token ids [count, length] that start with the same id and go on with others."""
    ids = torch.randint(2, 50, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


@torch.no_grad()
def features_of(encoder, ids):
    return encoder(input_ids=ids).last_hidden_state


def test_b9_a_causal_encoder_gives_the_first_token_one_feature_and_t5_does_not():
    from transformers import T5Config, T5EncoderModel

    ids = prompts()
    text = features_of(clip(), ids)
    assert all(torch.equal(row, text[0, 0]) for row in text[:, 0])
    assert not torch.equal(text[0, 1], text[1, 1])
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=1)
    ).eval()
    both_ways = features_of(t5, ids)  # even behind the same first id
    for text_features, stored in ((text, True), (both_ways, False)):
        evidence = Evidence()
        evidence.update(text_features, torch.ones(len(ids)))
        assert (evidence.objection() is None) == stored
    assert evidence.spread > 0.01
    assert "T5" in str(evidence.objection())


@pytest.fixture
def embeddings(tmp_path):
    """A file with four prompts of a random CLIP, their first token 60 times as large as it was."""
    text = features_of(clip(), prompts())
    text[:, 0] *= 60
    path = tmp_path / "text.safetensors"
    save_file({"prompt_embeds": text, "pooled_prompt_embeds": text[:, -1, :24].contiguous()}, path)
    return path


def run(folder, text, out, **stage):
    source = {"prompts": str(text)} if text.suffix == ".txt" else {"embeddings": str(text)}
    calibration = {"samples": 4, "batch_size": 2, "steps": 1, "guidance_scale": 0.0, **source}
    recipe = {
        "model": str(folder),
        "calibration": calibration,
        "stages": [{"rtn": {**STAGE, **stage}}],
        "evaluate": {"fidelity": {"samples": 1, "steps": 1, "guidance_scale": 0.0}},
        "export": {"path": str(out)},
    }
    return compress.run(recipe, work_dir=out.parent / "work")


def squeeze(folder, embeddings, **stage):
    """Return the model after the stage, and the stage's details."""
    model = open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())
    calibration = CalibrationSettings(
        samples=4, batch_size=2, steps=1, guidance_scale=0.0, embeddings=str(embeddings)
    )
    inputs = record(model, calibration, seed=0, cache=None, progress=SilentProgress())
    settings = RtnSettings(**{**STAGE, **stage})
    workspace = Workspace(embeddings.parent, embeddings.parent)
    details = registry.get("rtn").apply(model, settings, inputs, workspace, SilentProgress())
    return model, details


def sqnr_db(exact, got):
    return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))


def test_b9_a_planted_first_token_ruins_static_scales_and_not_ours(tiny_unet, embeddings):
    text = load_file(embeddings)["prompt_embeds"]
    original, made, details = load(tiny_unet), {}, {}
    for label, stage in {
        "naive": {"first_token": "quantize"},
        "stored": {},
        "per token": {"activation_scale": "token"},
        "per token, stored": {"activation_scale": "token", "first_token": "store"},
    }.items():
        made[label], details[label] = squeeze(tiny_unet, embeddings, **stage)
    names = [name for name, _ in original.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    with torch.no_grad():
        for name in names:
            exact = original.get_submodule(name)(text)
            layers = {label: model.module.get_submodule(name) for label, model in made.items()}
            found = {label: sqnr_db(exact[:, 1:], layer(text)[:, 1:]) for label, layer in layers.items()}
            assert found["stored"] - found["naive"] >= 25
            assert found["naive"] < 15
            assert found["per token"] > 30
            assert found["per token, stored"] == found["per token"]
            # For every prompt and batch size the first row is the original's, bit for bit.
            for count in (1, 2, 4):
                rows = layers["stored"](text[:count])[:, 0]
                assert all(torch.equal(row, exact[0, 0]) for row in rows)
    assert set(details["stored"]["first_token"]["stored"]) == set(names)
    assert "first_token" not in details["per token"]


@pytest.mark.slow
def test_b9_the_encoder_is_recorded_and_another_one_beside_the_model_is_refused(tiny_sdxl, tmp_path):
    """Prompts through the pipeline's own text encoders; the result takes the place of its U-Net."""
    import diffusers

    (tmp_path / "prompts.txt").write_text("\n".join(WORDS))
    run(tiny_sdxl, tmp_path / "prompts.txt", tmp_path / "out", first_token="store")
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny_sdxl, pipeline)
    shutil.rmtree(pipeline / "unet")
    shutil.copytree(tmp_path / "out", pipeline / "unet")
    manifest = json.loads((pipeline / "unet" / "compress.json").read_text())
    stored = [entry["first_token"] for entry in manifest["quantization"].values() if entry["first_token"]]
    files = {"text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}
    assert all(set(entry["encoders"]) == files for entry in stored)
    assert "8, static, first token stored" in (tmp_path / "out" / "README.md").read_text()
    row = next(row for row in inspect(tmp_path / "out")["layers"] if row["name"] == TEXT_LAYER)
    assert (row["activation_scope"], row["first_token_stored"]) == ("tensor", True)
    assert load(pipeline / "unet") is not None
    diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet")

    path = pipeline / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[first] = tensors[first] + 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    for open_it in (load, diffusers.UNet2DConditionModel.from_pretrained):
        with pytest.raises(SourceError, match=r"text_encoder_2/model.safetensors: not the text encoder"):
            open_it(pipeline / "unet")
    shutil.rmtree(pipeline / "text_encoder_2")  # what is not there is not missed
    assert load(pipeline / "unet") is not None


@pytest.fixture
def exported(tiny_unet, embeddings, tmp_path):
    """Return the folder of a U-Net with static scales and stored first tokens, W8A8."""
    folder = tmp_path / "out"
    folder.mkdir()
    write(squeeze(tiny_unet, embeddings)[0], folder, "compress")
    return folder


TENSORS = "diffusion_pytorch_model.safetensors"
TEXT_LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def _with_tensor(folder, suffix, change):
    tensors = load_file(folder / TENSORS)
    name = f"{TEXT_LAYER}.{suffix}"
    changed = change(tensors[name])
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _with_scheme(folder, change):
    """Change a layer's scheme in both places that state it."""
    for file, keys in (
        ("compress.json", ("quantization",)),
        ("config.json", ("quantization_config", "modules")),
    ):
        document = json.loads((folder / file).read_text())
        place = document
        for key in keys:
            place = place[key]
        change(place[TEXT_LAYER])
        (folder / file).write_text(json.dumps(document))


SCALE, ZERO, TOKEN = "activation_scale", "activation_zero_point", "first_token_input"
FAULTS = {
    "scale NaN": (lambda f: _with_tensor(f, SCALE, lambda t: t * float("nan")), "activation_scale is nan"),
    "scale 0": (lambda f: _with_tensor(f, SCALE, lambda t: t * 0), "activation_scale is 0.0"),
    "scale below 0": (lambda f: _with_tensor(f, SCALE, lambda t: -t), "a scale is a positive number"),
    "scale infinite": (lambda f: _with_tensor(f, SCALE, lambda t: t / 0), "activation_scale is inf"),
    "scale too small": (
        lambda f: _with_tensor(f, SCALE, lambda t: t * 0 + 1e-38), "activation_scale is .*at least 1e-30",
    ),
    "output NaN": (
        lambda f: _with_tensor(f, "first_token_output", lambda t: t * float("nan")), "holds what is no",
    ),
    "scale absent": (lambda f: _with_tensor(f, SCALE, lambda t: None), "activation_scale is missing"),
    "zero off the grid": (lambda f: _with_tensor(f, ZERO, lambda t: t * 0 + 129), "zero_point is 129"),
    "another token": (lambda f: _with_tensor(f, TOKEN, lambda t: t + 1), "not the first token"),
    "token absent": (lambda f: _with_tensor(f, TOKEN, lambda t: None), "first_token_input is missing"),
    "output absent": (lambda f: _with_tensor(f, "first_token_output", lambda t: None), "output is missing"),
    "tensors without scope": (
        lambda f: _with_scheme(f, lambda s: s["activation"].update(scope="token")),
        "activation_scale does not belong",
    ),
    "scope of images": (
        lambda f: _with_scheme(f, lambda s: s["activation"].update(scope="sample")), "for convolutions",
    ),
    "tensors without a token": (
        lambda f: _with_scheme(f, lambda s: s.update(first_token=None)), "first_token_input does not belong",
    ),
    "a hash that is none": (
        lambda f: _with_scheme(f, lambda s: s["first_token"].update(sha256="0" * 63)), "first_token.sha256",
    ),
    "another hash": (
        lambda f: _with_scheme(f, lambda s: s["first_token"].update(sha256="0" * 64)), "recorded 0000",
    ),
    "a path out of the folder": (
        lambda f: _with_scheme(f, lambda s: s["first_token"].update(encoders={"../x": "0" * 64})), "encoders",
    ),
}  # fmt: skip


def test_altered_folders_are_refused(exported, tmp_path):
    assert load(exported) is not None
    for label, (alter, message) in FAULTS.items():
        folder = tmp_path / "altered"
        shutil.copytree(exported, folder)
        alter(folder)
        with pytest.raises(SourceError, match=message):
            load(folder)
            pytest.fail(f"{label} was loaded")
        shutil.rmtree(folder)


def test_the_folder_loads_with_the_stock_class_computes_the_same_and_is_written_again(exported, tmp_path):
    import diffusers

    module, stock = load(exported), diffusers.UNet2DConditionModel.from_pretrained(exported)
    generator = torch.Generator().manual_seed(3)
    text = next(layer for layer in quantized_layers(module).values() if layer.first_token_input is not None)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 9, 32, generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 6)},
    }
    inputs["encoder_hidden_states"][0, 0] = text.first_token_input
    with torch.no_grad():
        expected = module(**inputs, return_dict=False)[0]
        assert torch.equal(stock(**inputs, return_dict=False)[0], expected)
        half = load(exported, dtype="bfloat16")
        assert half.get_submodule(TEXT_LAYER).activation_scale.dtype == torch.float32
        assert half.get_submodule(TEXT_LAYER).first_token_input.dtype == torch.float32
        half = diffusers.UNet2DConditionModel.from_pretrained(exported, torch_dtype=torch.bfloat16)
        layer = half.get_submodule(TEXT_LAYER)
        assert torch.equal(layer.activation_scale, stock.get_submodule(TEXT_LAYER).activation_scale)
        assert torch.equal(layer.first_token_input, stock.get_submodule(TEXT_LAYER).first_token_input)
        assert layer.first_token_output.dtype == torch.bfloat16
        stock.save_pretrained(tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")(**inputs, return_dict=False)[0], expected)


def test_b9_a_bidirectional_encoder_is_refused_with_an_explanation(tiny_pixart, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "prompt_embeds": torch.randn(4, 9, 32, generator=generator),
        "prompt_attention_mask": torch.ones(4, 9, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(StageError, match=r"first token is not the same for every recorded prompt.*T5"):
        run(tiny_pixart, tmp_path / "t5.safetensors", tmp_path / "out", first_token="store")
    assert not (tmp_path / "out").exists()


STORE = {"activation_scale": "token", "first_token": "store"}


@pytest.mark.parametrize(("format_", "class_name", "stage", "what"), [
    ("torchao", "DiTTransformer2DModel", {}, "static activations"),
    ("sdnq", "DiTTransformer2DModel", {}, "activations that are not 8-bit symmetric"),
    ("sdnq", "DiTTransformer2DModel", {"activation_symmetric": True}, "static activations"),
    ("torchao", "PixArtTransformer2DModel", STORE, "a stored first token"),
    ("sdnq", "PixArtTransformer2DModel", STORE, "a stored first token"),
    ("dequantized", "UNet2DConditionModel", {}, "a plain layer computes all tokens"),
])  # fmt: skip
def test_other_formats_refuse_in_the_plan(format_, class_name, stage, what, make_tiny, tmp_path):
    recipe = {
        "model": str(make_tiny(class_name)),
        "stages": [{"rtn": {**STAGE, **stage}}],
        "export": {"path": str(tmp_path / "out"), "format": format_},
    }
    with pytest.raises(PlanError, match=what):
        compress.plan(recipe)


def test_b10_ranges_on_a_toy_of_three_batches():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([-2.0, 4.0])]
    sinks = {"minmax": ranges.Range("minmax"), "ema": ranges.Range("ema")}
    for batch in batches:
        for sink in sinks.values():
            sink.update(float(batch.min()), float(batch.max()))
    assert (sinks["minmax"].low, sinks["minmax"].high) == (-3.0, 4.0)
    # -1 -> .95 * -1 + .05 * -3 = -1.1 -> .95 * -1.1 + .05 * -2; 2 -> 1.95 -> .95 * 1.95 + .05 * 4
    assert sinks["ema"].low == pytest.approx(-1.145)
    assert sinks["ema"].high == pytest.approx(2.0525)


def test_b10_ranges_come_last_and_leave_out_protected_layers_and_the_first_token(tiny_unet, embeddings):
    model, details = squeeze(tiny_unet, embeddings, weight_bits=3, keep=("*.attn1.to_v",))
    rows = {row["name"]: row for row in details["layers"]}
    layers = quantized_layers(model.module)
    assert layers
    for name, layer in layers.items():
        low, high = rows[name]["activation_range"]
        assert float(layer.activation_scale) == pytest.approx((high - low) / 255)
    text = load_file(embeddings)["prompt_embeds"]
    low, high = rows[TEXT_LAYER]["activation_range"]
    assert (low, high) == (float(text[:, 1:].min()), float(text[:, 1:].max()))
    assert float(text[:, 0].abs().max()) > 20 * max(-low, high)
    kept = [name for name in rows if name.endswith("attn1.to_v")]
    assert kept
    assert all("activation_range" not in rows[name] for name in kept)
