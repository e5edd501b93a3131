from pathlib import Path

import pytest
import torch
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.quantization import balance
from compress.compressors.quantization.details import averages
from compress.compressors.quantization.details import label as label_of
from compress.compressors.quantization.scheme import choose
from compress.errors import PlanError, StageError
from compress.models.open import read_spec
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.recipes.stages import RtnSettings, SmoothQuantSettings, ViditQSettings
from compress.runtime.linear import QuantizedLinear


def apply(model, settings, calibration):
    return registry.get(settings.method).apply(
        model, settings, calibration, Workspace(Path(), Path()), SilentProgress()
    )


def plan(model, settings):
    return registry.get(settings.method).plan(model.spec, settings)


def relative(a, b):
    return float((a - b).norm() / b.norm())


SETTINGS = [
    RtnSettings(),
    RtnSettings(weight_bits=4, group_size=32, weight_symmetric=True),
    SmoothQuantSettings(weight_bits=4, adaln_weight_bits=8),
    RtnSettings(weight_bits=4, adaln_weight_bits=4),
    ViditQSettings(weight_bits=8, adaln_weight_bits=6),
    ViditQSettings(weight_bits=4, rotation="hadamard", act_exponent=0.5),
    ViditQSettings(weight_bits=4, activation_bits=4, rotation="none", rounding="gptq", adaln_weight_bits=8),
    ViditQSettings(weight_bits=3, rotation="block", low_rank=4, group_size=16),
    ViditQSettings(weight_bits=6, activation_bits=6, timestep_ranges=((0, 500), (501, 1000))),
    ViditQSettings(weight_bits=8, activation_bits=16, adaln_weight_bits=8),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_plan_is_what_is_then_stored(settings, opened, calibrate, outputs):
    model = opened()
    exact = outputs(model)
    planned = plan(model, settings)
    details = apply(model, settings, calibrate(model))
    stored = {name: (tuple(t.shape), t.dtype) for name, t in model.module.state_dict().items()}
    expected = {name: (t.shape, t.dtype) for name, t in planned.spec.tensors.items()}
    optional = []
    if isinstance(settings, ViditQSettings):
        optional += ["rotation_sign"] if settings.rotation == "auto" else []
        optional += ["input_scale"] if settings.act_exponent == "sweep" else []
    undecided = set(expected) - set(stored)
    assert all(name.rpartition(".")[2] in optional for name in undecided)
    assert stored == {name: spec for name, spec in expected.items() if name not in undecided}
    assert planned.after.bytes == pytest.approx(model.size().bytes, rel=0.01)
    if not undecided:
        assert planned.after.bytes == model.size().bytes
        assert planned.spec.quantization == model.quantization
    assert [row["name"] for row in details["layers"]] == [row["name"] for row in planned.layers]
    assert relative(outputs(model), exact) < {8: 0.05, 6: 0.1, 4: 0.6, 3: 0.8}[settings.weight_bits]
    schemes = {n: m.scheme for n, m in model.module.named_modules() if isinstance(m, QuantizedLinear)}
    assert schemes == model.quantization


@pytest.mark.parametrize("class_name", ["PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_other_families(class_name, opened, outputs):
    model = opened(class_name)
    exact = outputs(model)
    settings = ViditQSettings(weight_bits=8, rotation="block", act_exponent=0.5, adaln_weight_bits=8)
    planned = plan(model, settings)

    class Calibration:
        seed, key = 3, "none"

        def observe(self, model, names, observer, progress):
            handles = [
                model.module.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, name=name: observer(
                        name, args[0].reshape(2, -1, args[0].shape[-1]), torch.tensor([1.0, 1.0])
                    )
                )
                for name in names
            ]
            outputs(model)
            for handle in handles:
                handle.remove()

    apply(model, settings, Calibration())
    assert planned.after.bytes == model.size().bytes
    assert relative(outputs(model), exact) < 0.08


@pytest.mark.parametrize("bits", [4, 6])
def test_modulation_layers_take_fewer_bits_of_their_own(bits, opened, calibrate):
    model = opened()
    apply(model, RtnSettings(weight_bits=8, adaln_weight_bits=bits), calibrate(model))
    assert {s.bits for name, s in model.quantization.items() if "norm1.linear" in name} == {bits}
    assert {s.bits for name, s in model.quantization.items() if "norm1.linear" not in name} == {8}


def test_two_runs_give_the_same_bytes(opened, calibrate):
    states = []
    for _ in range(2):
        model = opened()
        apply(model, ViditQSettings(weight_bits=4, rounding="gptq", adaln_weight_bits=8), calibrate(model))
        states.append(model.module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_folding_changes_nothing_by_itself(opened, outputs):
    model = opened()
    exact = outputs(model)
    generator = torch.Generator().manual_seed(0)
    _, groups = choose(model.family, model.module, ViditQSettings(act_exponent=0.5), {})
    folded = [group for group in groups if group.fold is not None]
    assert folded
    for group in folded:
        width = model.module.get_submodule(group.targets[0]).in_features
        m = 1 + 20 * torch.rand(width, generator=generator)
        group.fold.absorb(model.module, m)
        for name in group.targets:
            model.module.get_submodule(name).weight.data.div_(m)
    assert relative(outputs(model), exact) < 1e-5


def test_compensation_and_balance_beat_rounding_at_four_bits(opened, calibrate, outputs):
    errors = {}
    for label, settings in (
        ("rtn", RtnSettings(weight_bits=4)),
        ("vidit_q", ViditQSettings(weight_bits=4, rounding="gptq")),
    ):
        model = opened()
        exact = outputs(model)
        apply(model, settings, calibrate(model))
        errors[label] = relative(outputs(model), exact)
    assert errors["vidit_q"] < errors["rtn"]


def test_kept_layers_stay_as_they_are_bit_for_bit(opened, calibrate, outputs):
    model = opened()
    exact = outputs(model)
    keep = ("*.norm1.linear", "*.attn1.to_v")
    before = {
        name: tensor.clone()
        for name, tensor in model.module.state_dict().items()
        if ".norm1.linear." in name or ".attn1.to_v." in name
    }
    settings = ViditQSettings(act_exponent=0.5, rotation="none", keep=keep)
    planned = plan(model, settings)
    apply(model, settings, calibrate(model))
    after = model.module.state_dict()
    assert len(before) == 8
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(scheme.input_scale for scheme in model.quantization.values())
    assert planned.after.bytes == model.size().bytes
    assert relative(outputs(model), exact) < 0.05


def test_a_fold_names_every_layer_that_it_changes(opened):
    for class_name in ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"):
        model = opened(class_name)
        for fold in model.family.folds(model.module):
            before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
            fold.absorb(
                model.module, torch.full((model.module.get_submodule(fold.targets[0]).in_features,), 2.0)
            )
            changed = {
                name.rpartition(".")[0]
                for name, tensor in model.module.state_dict().items()
                if not torch.equal(tensor, before[name])
            }
            assert changed == set(fold.producers)


def test_a_sweep_leaves_out_a_scale_that_does_not_help(opened, calibrate, monkeypatch):
    """Where the scale would be applied at run time as well: nothing of it is stored then."""
    model = opened()
    tried = []

    def only_the_identity(layers, transform, kind, activation):
        tried.append(transform.exponent)
        return 0.0 if transform.exponent is None else 1.0

    monkeypatch.setattr(balance, "output_error", only_the_identity)
    settings = ViditQSettings(rotation="none")
    planned = plan(model, settings)
    apply(model, settings, calibrate(model))
    assert None in tried
    assert not any(scheme.input_scale for scheme in model.quantization.values())
    assert not any(name.endswith("input_scale") for name in model.module.state_dict())
    assert any("channel scales are decided on calibration data" in note for note in planned.notes)


def test_averages_count_a_shared_embedder_once(tiny_dit):
    spec, settings = read_spec(ModelRef(id=str(tiny_dit))), RtnSettings(weight_bits=4)
    planned = registry.get("rtn").plan(spec, settings)
    copies = [row for row in planned.layers if ".1.norm1.emb." in row["name"]]
    assert copies
    once = [row for row in planned.layers if row not in copies]
    mean = sum(row["parameters"] * row["bits"] for row in once) / sum(row["parameters"] for row in once)
    found = averages(planned.layers, label_of(settings), spec.shared)
    assert found["average_bits"]["all_linears"] == pytest.approx(mean, abs=1e-3)
    assert f"{found['average_bits']['all_linears']} over all linear layers" in planned.notes[0]
    assert {row["name"] for row in copies} <= set(found["float_layers"])


def test_a_broken_group_is_scaled_at_run_time_and_the_kept_layer_is_untouched(opened, calibrate):
    model = opened()
    kept = "transformer_blocks.0.attn1.to_k"
    before = model.module.get_submodule(kept).weight.clone()
    apply(model, ViditQSettings(act_exponent=0.5, rotation="none", keep=(kept,)), calibrate(model))
    assert torch.equal(model.module.get_submodule(kept).weight, before)
    assert model.quantization["transformer_blocks.0.attn1.to_q"].input_scale
    assert not model.quantization["transformer_blocks.1.attn1.to_q"].input_scale


def test_a_pattern_that_matches_nothing_is_named_with_its_neighbours(opened):
    with pytest.raises(PlanError, match=r"attn2\.to_k") as caught:
        plan(opened(), RtnSettings(keep=("*.attn2.to_k",)))
    assert "attn1.to_k" in caught.value.hint


def test_keeping_everything_is_an_error(opened):
    with pytest.raises(PlanError, match="no linear layer is left"):
        plan(opened(), RtnSettings(keep=("*",)))


def test_quantizing_twice_is_an_error(opened, calibrate):
    model = opened()
    planned = plan(model, RtnSettings())
    with pytest.raises(PlanError, match="quantized already"):
        registry.get("vidit_q").plan(planned.spec, ViditQSettings())
    calibration = calibrate(model)
    apply(model, RtnSettings(), calibration)
    with pytest.raises(PlanError, match="quantized already"):
        apply(model, RtnSettings(), calibration)


def test_a_group_that_does_not_divide_names_the_layer(opened):
    with pytest.raises(PlanError, match=r"attn1\.to_q: group_size 48"):
        plan(opened(), RtnSettings(group_size=48))


def test_a_timestep_range_without_calls_is_an_error(opened, calibrate):
    model = opened()
    with pytest.raises(StageError, match="timestep_ranges"):
        apply(model, ViditQSettings(timestep_ranges=((998, 998),)), calibrate(model))


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(PlanError) as caught:
        registry.get("vidit")
    assert "vidit_q" in caught.value.hint
    assert registry.names()[:3] == ["isomorphic", "tinyfusion", "depth"]


def test_rescaling_changes_scales_alone(opened, calibrate):
    stored = []
    for rescale in (False, True):
        model = opened()
        apply(model, RtnSettings(weight_bits=3, rescale=rescale), calibrate(model))
        stored.append(model.module.state_dict())
    names = [name for name in stored[0] if name.endswith(".scale")]
    assert names
    assert all(not torch.equal(stored[0][name], stored[1][name]) for name in names)
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0] if name not in names)
