"""A U-Net quantized whole: convolutions in the shared pass, on disk, and in the formats."""

from __future__ import annotations

import json

import compress
import diffusers
import pytest
import torch
from compress.calibration.views import views
from compress.compressors.quantization.planning import convolution_notes, plan_stage
from compress.compressors.quantization.stage import apply_stage
from compress.errors import PlanError, SourceError
from compress.evaluation.size import linear_inventory
from compress.exporters.formats import as_shipped, write
from compress.exporters.inspection import inspect
from compress.exporters.layer_table import grouped
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.recipes.stages import RtnSettings, SmoothQuantSettings, ViditQSettings
from compress.runtime.conv import QuantizedConv2d
from torch import nn

QUIET = SilentProgress()
CONV = "down_blocks.1.resnets.0.conv1"


class OneCall:
    """A calibration of one call with random inputs; tells observers what the real one tells them."""

    seed, key = 3, "one call"

    def __init__(self, inputs):
        self.inputs = inputs

    def observe(self, model, names, observer, progress):
        times = self.inputs["timestep"].float()

        def hook(name):
            def see(layer, args, kwargs):
                x = args[0] if args else next(iter(kwargs.values()))
                for rows, timesteps in views(name, layer, x, times):
                    observer(name, rows, timesteps)

            return see

        handles = [
            model.module.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            for name in names
        ]
        run(model.module, self.inputs)
        for handle in handles:
            handle.remove()


def run(module, inputs):
    with torch.no_grad():
        return module(**inputs, return_dict=False)[0]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def unet(tiny_unet):
    model = open_model(ModelRef(id=str(tiny_unet)), progress=QUIET)
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(1))
    return model, inputs


SETTINGS = [
    (RtnSettings(weight_bits=8), 0.05),
    (RtnSettings(weight_bits=8, activation_bits=16, weight_symmetric=True), 0.05),
    (RtnSettings(weight_bits=4, group_size=32), 0.45),
    (SmoothQuantSettings(weight_bits=6, adaln_weight_bits=8), 0.1),
    (ViditQSettings(weight_bits=4, rotation="block", act_exponent=0.5, low_rank=4, rounding="gptq"), 0.25),
]


@pytest.mark.parametrize(("settings", "limit"), SETTINGS, ids=str)
def test_all_convolutions_are_quantized_as_planned(unet, settings, limit):
    model, inputs = unet
    exact = run(model.module, inputs)
    planned = plan_stage(model.spec, settings)
    details = apply_stage(model, settings, OneCall(inputs), QUIET)
    assert planned.spec.quantization == model.quantization
    assert planned.after.bytes == model.size().bytes
    assert planned.layers is not None
    assert [row["bytes"] for row in details["layers"]] == [row["bytes"] for row in planned.layers]
    left = [name for name, child in model.module.named_modules() if isinstance(child, nn.Conv2d)]
    assert left == ["conv_in", "conv_out"]
    rows = {row["name"]: row for row in details["layers"]}
    for name, scheme in model.quantization.items():
        layer = model.module.get_submodule(name)
        assert isinstance(layer, QuantizedConv2d) == (scheme.kernel is not None)
        if scheme.kernel is not None:
            assert rows[name]["kernel"] == list(scheme.kernel.size)
            assert not (scheme.rotation or scheme.input_scale or scheme.low_rank)
            if scheme.activation is not None:
                assert (scheme.activation.scope, scheme.activation.symmetric) == ("sample", False)
            assert rows[name]["sqnr_db"] > {8: 33, 6: 24, 4: 12}[scheme.bits], name
    assert model.quantization[CONV].kernel.padding == (1, 1)
    assert relative(run(model.module, inputs), exact) < limit


def test_gptq_beats_rounding_to_nearest_on_windows(unet, tiny_unet):
    errors = {}
    for rounding in ("nearest", "gptq"):
        model = open_model(ModelRef(id=str(tiny_unet)), progress=QUIET)
        inputs = unet[1]
        dense = model.module.get_submodule(CONV)
        seen = []
        hook = dense.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        run(model.module, inputs)
        hook.remove()
        keep = tuple(site.name for site in model.linears() if site.name != CONV)
        settings = ViditQSettings(weight_bits=3, activation_bits=16, rounding=rounding, keep=keep)
        apply_stage(model, settings, OneCall(inputs), QUIET)
        with torch.no_grad():
            errors[rounding] = relative(model.module.get_submodule(CONV)(seen[0]), dense(seen[0]))
    assert errors["gptq"] < 0.8 * errors["nearest"]


def test_inputs_of_convolutions_are_better_off_with_a_zero_point(tiny_unet, unet):
    inputs, found = unet[1], {}
    for symmetric in (True, None):
        model = open_model(ModelRef(id=str(tiny_unet)), progress=QUIET)
        settings = RtnSettings(weight_bits=8, activation_bits=6, activation_symmetric=symmetric)
        details = apply_stage(model, settings, OneCall(inputs), QUIET)
        assert model.quantization[CONV].activation.symmetric == bool(symmetric)
        values = [row["sqnr_db"] for row in details["layers"] if row["quantized"] and row["kernel"]]
        found[symmetric] = sum(values) / len(values)
    assert found[None] > found[True] + 3


def test_the_plan_says_what_becomes_of_convolutions(unet):
    model, _ = unet
    keep = ("*.attn2.to_k", "*.attn2.to_v")
    planned = plan_stage(model.spec, RtnSettings(weight_bits=4, group_size=64, keep=keep))
    text = "\n".join(planned.notes)
    count = sum(scheme.kernel is not None for scheme in planned.spec.quantization.values())
    assert count > 10
    assert f"{count} convolutions are computed in integers: faster where oneDNN has a kernel" in text
    assert "group_size 64 does not divide the windows of" in text
    text = "\n".join(plan_stage(model.spec, RtnSettings(weight_bits=4, activation_bits=16)).notes)
    assert "they become smaller, not faster" in text
    assert "computed in integers" not in text


def test_notes_name_what_is_not_quantized_and_why():
    module = nn.ModuleDict({"one": nn.Conv2d(4, 4, 3), "depthwise": nn.Conv2d(4, 4, 3, groups=4)})
    (note,) = convolution_notes(module, {}, None)
    assert note == (
        "left in floating point (convolutions of several groups, or padded with more than zeros): depthwise"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_on_disk(make_tiny, tmp_path, dtype):
    folder = make_tiny("UNet2DConditionModel", dtype=dtype)
    model = open_model(ModelRef(id=str(folder)), progress=QUIET)
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(1))
    apply_stage(model, RtnSettings(weight_bits=4), OneCall(inputs), QUIET)
    out = tmp_path / "out"
    out.mkdir()
    write(model, out, "compress")
    expected = run(model.module, inputs)
    assert torch.equal(run(compress.load(out), inputs), expected)
    stock = diffusers.UNet2DConditionModel.from_pretrained(out, torch_dtype=getattr(torch, dtype))
    assert isinstance(stock.get_submodule(CONV), QuantizedConv2d)
    assert torch.equal(run(stock, inputs), expected)

    layers = {row["name"]: row for row in inspect(out)["layers"]}
    assert layers[CONV]["shape"] == list(model.spec.tensors[f"{CONV}.weight"].shape)
    assert (layers[CONV]["bits"], layers[CONV]["activation_bits"]) == (4, 8)
    rows = linear_inventory(model)
    kernels = {row["name"]: row["kernel"] for row in rows}
    assert (kernels[CONV], kernels["down_blocks.1.attentions.0.proj_in"]) == ([3, 3], None)
    stored_as = {row[0]: row[1] for row in grouped(rows)}
    assert stored_as["down_blocks.*.resnets.0.conv1"] == "4, 3 x 3 convolution"

    plain = tmp_path / "plain"
    plain.mkdir()
    write(model, plain, "dequantized")
    stock = diffusers.UNet2DConditionModel.from_pretrained(plain, torch_dtype=getattr(torch, dtype))
    weight = model.module.get_submodule(CONV).equivalent_weight().to(getattr(torch, dtype))
    assert torch.equal(stock.get_submodule(CONV).weight.flatten(1), weight)
    assert torch.equal(run(stock, inputs), run(as_shipped(model, "dequantized").module, inputs))


def test_a_manifest_with_another_window_is_refused(unet, tmp_path):
    model, inputs = unet
    apply_stage(model, RtnSettings(weight_bits=8), OneCall(inputs), QUIET)
    write(model, tmp_path, "compress")
    for name in ("compress.json", "config.json"):
        path = tmp_path / name
        data = json.loads(path.read_text())
        section = data["quantization_config"]["modules"] if name == "config.json" else data["quantization"]
        section[CONV]["kernel"]["padding"] = [0, 0]
        path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match=f"layer {CONV}: the manifest says .*padding=\\(0, 0\\)"):
        compress.load(tmp_path)


@pytest.mark.parametrize("format", ["torchao", "sdnq"])
def test_formats_without_convolutions_refuse_them(unet, tmp_path, format):
    model, inputs = unet
    apply_stage(model, RtnSettings(weight_bits=8), OneCall(inputs), QUIET)
    with pytest.raises(PlanError, match=f"{format} format cannot express quantized convolutions.*conv1"):
        write(model, tmp_path, format)
