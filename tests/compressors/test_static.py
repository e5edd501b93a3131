"""Static activations and stored first tokens in the shared pass, on a tiny SDXL and a tiny PixArt."""

from pathlib import Path

import pytest
import torch
from compress.calibration.diffusion import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.quantization import ranges
from compress.compressors.quantization.first_tokens import Evidence
from compress.errors import PlanError, StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from compress.recipes.stages import MixdqSettings, RtnSettings, ViditQSettings
from compress.runtime.modules import quantized_layers
from pydantic import ValidationError
from safetensors.torch import save_file

STATIC = {"weight_symmetric": True, "activation_scale": "static"}


@pytest.fixture
def text_features(tmp_path):
    """Return `make(prompts, *, width, first, negative)` -> an embeddings file with 9 tokens a prompt."""

    def make(prompts=4, *, width=32, first="planted", pooled=True, negative=None, name="text"):
        generator = torch.Generator().manual_seed(9)
        embeds = torch.randn(prompts, 9, width, generator=generator)
        if first != "differs":
            size = 60 if first == "planted" else 1
            embeds[:, 0] = size * torch.randn(width, generator=generator)
        tensors = {"prompt_embeds": embeds}
        if pooled:
            tensors["pooled_prompt_embeds"] = torch.randn(prompts, 24, generator=generator)
        if not pooled:
            tensors["prompt_attention_mask"] = torch.ones(prompts, 9, dtype=torch.int64)
        if negative is not None:
            shape = (1, 9, width)
            wanted = torch.zeros(shape) if negative == "zeros" else torch.randn(shape, generator=generator)
            if negative == "same first":
                wanted[:, 0] = embeds[0, 0]
            tensors["negative_prompt_embeds"] = wanted
            if pooled:
                tensors["negative_pooled_prompt_embeds"] = torch.zeros(1, 24)
            else:
                tensors["negative_prompt_attention_mask"] = torch.ones(1, 9, dtype=torch.int64)
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        return path

    return make


def opened(folder):
    return open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())


def recorded(model, embeddings, **changes):
    values = {"samples": 2, "steps": 2, "batch_size": 2, "guidance_scale": 1.0, "embeddings": str(embeddings)}
    settings = CalibrationSettings(**{**values, **changes})
    return record(model, settings, seed=0, cache=None, progress=SilentProgress())


def apply(model, settings, calibration):
    return registry.get(settings.method).apply(
        model, settings, calibration, Workspace(Path(), Path()), SilentProgress()
    )


def plan(model, settings):
    return registry.get(settings.method).plan(model.spec, settings)


def outputs(model, calibration):
    """Return float32 outputs of all recorded calls, one after the other."""
    found = []
    with torch.no_grad():
        for call in calibration.calls():
            found.append(model.module(**call, return_dict=False)[0].float().flatten())
    return torch.cat(found)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def cross(model):
    """Return the quantized layers that read text."""
    sites = [site for site in model.linears() if site.role in ("cross.k", "cross.v")]
    return {site.name: model.module.get_submodule(site.name) for site in sites}


SETTINGS = [
    RtnSettings(**STATIC),
    RtnSettings(weight_bits=4, group_size=16, activation_range="ema", **STATIC),
    ViditQSettings(weight_bits=6, rotation="block", act_exponent=0.5, low_rank=2, **STATIC),
    RtnSettings(first_token="quantize", **STATIC),
    RtnSettings(first_token="store"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_plan_is_what_is_then_stored(settings, tiny_unet, text_features):
    model = opened(tiny_unet)
    calibration = recorded(model, text_features(first="small"))  # a planted one sharpens the attention
    exact = outputs(model, calibration)
    planned = plan(model, settings)
    details = apply(model, settings, calibration)
    stored = {name: (tuple(t.shape), t.dtype) for name, t in model.module.state_dict().items()}
    assert stored == {name: (t.shape, t.dtype) for name, t in planned.spec.tensors.items()}
    assert planned.after.bytes == model.size().bytes
    layers = quantized_layers(model.module)
    assert {name: layer.scheme for name, layer in layers.items()} == model.quantization
    static = {name for name, layer in layers.items() if layer.activation_scale is not None}
    assert bool(static) == (settings.activation_scale == "static")
    rows = {row["name"]: row for row in details["layers"]}
    assert {name for name, row in rows.items() if "activation_range" in row} == static
    assert all(rows[name]["activation_scope"] == "tensor" for name in static)
    first = {name for name, layer in layers.items() if layer.first_token_output is not None}
    assert first == (set() if settings.first_token == "quantize" else set(cross(model)))
    assert all(torch.isfinite(torch.tensor(row["sqnr_db"])) for row in rows.values() if row["quantized"])
    limit = {8: 0.08, 6: 0.2, 4: 0.5}[settings.weight_bits]
    assert relative(outputs(model, calibration), exact) < limit


def test_two_runs_give_the_same_bytes(tiny_unet, text_features):
    states = []
    for _ in range(2):
        model = opened(tiny_unet)
        apply(model, RtnSettings(**STATIC), recorded(model, text_features()))
        states.append(model.module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_ranges_are_those_of_the_inputs_behind_quantized_weights(tiny_unet, text_features):
    model = opened(tiny_unet)
    calibration = recorded(model, text_features())
    watched = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    before: list[float] = []
    calibration.observe(model, [watched], lambda n, x, t: before.append(float(x.max())), SilentProgress())
    settings = RtnSettings(weight_bits=3, keep=("*.attn1.to_q",), **STATIC)
    details = apply(model, settings, calibration)
    rows = {row["name"]: row for row in details["layers"]}
    with torch.no_grad():
        layers = quantized_layers(model.module)
        schemes = {name: layer.scheme for name, layer in layers.items()}
        for layer in layers.values():  # weights rounded, inputs in floating point: as calibrated
            layer.scheme = layer.scheme.model_copy(update={"activation": None})
            layer._forget()
        seen: dict[str, list[float]] = {}
        text = next(iter(cross(model)))
        calibration.observe(
            model,
            [watched, text],
            lambda n, x, t: seen.setdefault(n, []).append(float((x[:, 1:] if n == text else x).max())),
            SilentProgress(),
        )
        for name, layer in layers.items():
            layer.scheme = schemes[name]
            layer._forget()
    assert rows[watched]["activation_range"][1] == pytest.approx(max(seen[watched]))
    assert max(before) != pytest.approx(max(seen[watched]), rel=1e-3)
    # The planted token is 60 times as large as what the range covers.
    assert rows[text]["activation_range"][1] == pytest.approx(max(seen[text]))
    assert rows[text]["activation_range"][1] < 6
    kept = [name for name in rows if name.endswith("attn1.to_q")]
    assert kept
    assert all("activation_range" not in rows[name] for name in kept)


def test_the_mean_of_a_moving_range_worked_by_hand():
    ends = [(-1.0, 2.0), (-3.0, 1.0), (-2.0, 4.0)]
    found = {}
    for average in ("minmax", "ema"):
        sink = ranges.Range(average)
        for low, high in ends:
            sink.update(low, high)
        found[average] = (sink.low, sink.high)
    assert found["minmax"] == (-3.0, 4.0)
    low = 0.95 * (0.95 * -1.0 + 0.05 * -3.0) + 0.05 * -2.0
    high = 0.95 * (0.95 * 2.0 + 0.05 * 1.0) + 0.05 * 4.0
    assert found["ema"] == (pytest.approx(low), pytest.approx(high))
    assert found["ema"] == (pytest.approx(-1.145), pytest.approx(2.0525))


@pytest.mark.parametrize("average", ["minmax", "ema"])
def test_a_nan_in_a_range_is_kept(average):
    sink = ranges.Range(average)
    for low, high in ((-1.0, 1.0), (float("nan"), float("nan")), (-2.0, 2.0)):
        sink.update(low, high)
    assert sink.low != sink.low
    assert sink.high != sink.high


def _static_layers(tiny_unet, text_features):
    model = opened(tiny_unet)
    apply(model, RtnSettings(**STATIC), recorded(model, text_features()))
    return quantized_layers(model.module)


def test_bad_ranges_name_the_layer_and_leave_the_scheme(tiny_unet, text_features):
    layers = _static_layers(tiny_unet, text_features)
    name = "mid_block.attentions.0.proj_in"
    layer = layers[name]
    for value, message in ((float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "all zero")):
        with pytest.raises(StageError, match=f"{name}: .*{message}"):
            ranges.fill_ranges(
                {name: layer},
                lambda value=value: layer(torch.full((1, 2, layer.in_features), value)),
                "minmax",
            )
    with pytest.raises(StageError, match=f"{name}: no calibration input reaches it"):
        ranges.fill_ranges({name: layer}, lambda: None, "minmax")
    assert layer.scheme.activation is not None
    assert not layer._forward_pre_hooks


def test_auto_stores_only_where_scales_are_static_and_the_token_is_one(tiny_unet, text_features):
    cases = {
        "static": ({**STATIC}, {}, {}, True),
        "per token": ({}, {}, {}, False),
        "same negative": ({**STATIC}, {"negative": "same first"}, {"guidance_scale": 4.0}, True),
        "two ways": ({**STATIC}, {"first": "differs"}, {}, False),
    }
    for label, (keys, text, changes, stored) in cases.items():
        model = opened(tiny_unet)
        embeddings = text_features(**text, name=label)
        details = apply(model, RtnSettings(**keys), recorded(model, embeddings, **changes))
        found = {layer.first_token_output is not None for layer in cross(model).values()}
        assert found == {stored}, label
        told = details.get("first_token")
        assert (told is not None) == ("activation_scale" in keys)
        if told is not None:
            assert len(told["stored"]) == (len(cross(model)) if stored else 0)
            assert bool(told["computed"]) != stored


@pytest.mark.parametrize(("text", "message"), [
    ({"first": "differs"}, "not the same for every recorded prompt.*T5"),
    ({"negative": "zeros"}, "not the same for every recorded prompt.*replaced by zeros"),
    ({"prompts": 1}, "one prompt only"),
])  # fmt: skip
def test_store_is_refused_where_the_token_differs_before_a_layer_is_touched(
    text, message, tiny_unet, text_features
):
    model = opened(tiny_unet)
    guided = {"guidance_scale": 4.0} if "negative" in text else {}
    calibration = recorded(model, text_features(**text), **guided)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with pytest.raises(StageError, match=message):
        apply(model, RtnSettings(first_token="store", **STATIC), calibration)
    after = model.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_store_is_refused_without_cross_attention(tiny_dit):
    with pytest.raises(PlanError, match="no cross-attention"):
        plan(opened(tiny_dit), RtnSettings(first_token="store", **STATIC))


def test_the_plan_says_what_is_static_and_what_decides_about_the_first_token(tiny_unet, tiny_dit):
    model = opened(tiny_unet)
    count = len(cross(model))
    notes = "\n".join(plan(model, RtnSettings(**STATIC)).notes)
    assert "activation scales are static" in notes
    assert f"{count} layers store their output for the text's first token" in notes
    assert "if the recorded prompts have one; counted as if they had" in notes
    notes = "\n".join(plan(model, RtnSettings(first_token="store")).notes)
    assert "refused when the recorded prompts turn out to have several" in notes
    assert "static" not in notes
    assert "first token" not in "\n".join(plan(opened(tiny_dit), RtnSettings(**STATIC)).notes)


def test_pixart_s_projected_text_counts_too(tiny_pixart, text_features):
    """PixArt's layers read the projected caption: one first token if the encoder's is one."""
    model = opened(tiny_pixart)
    calibration = recorded(model, text_features(pooled=False, first="small"))
    exact = outputs(model, calibration)
    settings = ViditQSettings(act_exponent=0.5, rotation="none", first_token="store", **STATIC)
    apply(model, settings, calibration)
    assert all(layer.first_token_output is not None for layer in cross(model).values())
    assert relative(outputs(model, calibration), exact) < 0.1


def test_joint_attention_mixes_all_tokens_into_the_first(tiny_sd3, tmp_path):
    """SD3's text stream meets the image and the timestep before its projections, whatever the encoder."""
    model = opened(tiny_sd3)
    width, pooled = model.config["joint_attention_dim"], model.config["pooled_projection_dim"]
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(4, 9, width, generator=generator)
    embeds[:, 0] = 1.0
    path = tmp_path / "text.safetensors"
    pooled_embeds = torch.randn(4, pooled, generator=generator)
    save_file({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled_embeds}, path)
    with pytest.raises(StageError, match="the first token is not the same for every recorded prompt"):
        apply(model, RtnSettings(first_token="store", **STATIC), recorded(model, path))


def test_evidence_of_a_text_of_one_token():
    evidence = Evidence()
    evidence.update(torch.ones(3, 1, 8), torch.ones(3))
    assert "one token only" in str(evidence.objection())


@pytest.mark.parametrize(("keys", "message"), [
    ({"activation_range": "ema"}, "activation_range has no effect"),
    ({"activation_scale": "static", "activation_bits": 16}, "static has no effect"),
    ({"first_token": "yes"}, "auto"),
])  # fmt: skip
def test_keys_without_effect_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        RtnSettings(**keys)


@pytest.mark.slow
def test_sensitivities_with_and_without_stored_tokens_are_two_tables(tiny_unet, text_features, tmp_path):
    """Whether a token is stored follows from the activations: those in floating point store none."""
    path, found = text_features(first="small"), []
    for number, activations in enumerate(({"*.attn2.to_k": 16, "*.attn2.to_v": 16}, {})):
        settings = MixdqSettings(
            budget={"mean_bits": 6.0}, bits=(4, 8), activation_scale="static", clip="minmax",
            fixed={"*conv*": 8, "*attn1*": 8, "*ff*": 8}, fixed_activations=activations,
            sensitivity={"samples": 1, "steps": 1}, points=1,
        )  # fmt: skip
        model, folder = opened(tiny_unet), tmp_path / str(number)
        for made in (folder, tmp_path / "shared"):
            made.mkdir(exist_ok=True)
        workspace = Workspace(folder, tmp_path / "shared")
        details = registry.get("mixdq").apply(
            model, settings, recorded(model, path), workspace, SilentProgress()
        )
        found.append(details["sensitivity"])
    assert len(list((tmp_path / "shared").iterdir())) == 2
    assert found[0]["key"] != found[1]["key"]
    assert [row[:3] for row in found[0]["rows"]] == [row[:3] for row in found[1]["rows"]]
    assert found[0]["rows"] != found[1]["rows"]
