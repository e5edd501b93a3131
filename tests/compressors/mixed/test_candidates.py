"""What may be chosen for a layer: offered bits by rule, costs to the byte, tied copies once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compress.compressors.quantization.building import Original, layer_of, rounded, settled
from compress.compressors.quantization.mixed.candidates import bytes_outside, find_candidates
from compress.compressors.quantization.mixed.filling import likely_bits
from compress.compressors.quantization.scheme import survey_linears
from compress.errors import PlanError
from compress.models.base import Family, LinearSite
from compress.recipes.stages import MixdqSettings, ViditQSettings
from torch import nn


def mixdq(**changes):
    return MixdqSettings(budget={"mean_bits": 4.0}, **changes)


def candidates_of(model, settings, **options):
    survey = survey_linears(model.family, model.module, settings, {})
    return find_candidates(model.family, survey, settings, model.spec.dtype, model.spec.shared, **options)


def by_end(candidates, end):
    return next(layer for layer in candidates.layers if layer.site.name.endswith(end))


def test_every_layer_costs_what_its_tensors_take(opened):
    model = opened(dtype="bfloat16")
    settings = mixdq(bits=(2, 3, 4, 6, 8, 16), group_size=32, weight_symmetric=False)
    candidates = candidates_of(model, settings)
    for layer in candidates.layers:
        dense = model.module.get_submodule(layer.site.name)
        assert layer.costs["w16"] == 2 * (dense.weight.numel() + dense.bias.numel())
        assert layer.weights == dense.weight.numel()
        for label, scheme in layer.schemes.items():
            original = Original(layer.site.name, dense.weight.detach().float(), dense.bias.detach())
            tensors = rounded(original, settled(scheme, original), settings, torch.bfloat16)
            made = layer_of(scheme, torch.bfloat16, tensors, original.bias)
            stored = sum(tensor.numel() * tensor.element_size() for tensor in made.state_dict().values())
            assert layer.costs[label] == stored, (layer.site.name, label)


def test_what_is_outside_and_inside_is_the_whole_model(opened):
    model = opened(dtype="float16")
    candidates = candidates_of(model, mixdq(bits=(4, 16)))
    outside = bytes_outside(model.spec.tensors, model.spec.shared, candidates.names)
    assert outside + sum(layer.costs["w16"] for layer in candidates.layers) == model.size().bytes


def test_rules_in_their_order(opened):
    model = opened()
    settings = mixdq(
        bits=(2, 4, 16),
        keep=("*.0.ff.net.2",),
        fixed={"*.0.ff.*": 3},
        fixed_activations={"*.to_v": 16},
        adaln_weight_bits=8,
        groups={
            "attention": {"layers": ["*.attn1.*"], "bits": (4, 8)},
            "others": {"layers": ["*.ff.*", "*.norm1.linear"]},
        },
    )
    found = candidates_of(model, settings)
    assert found.float_rules["transformer_blocks.0.ff.net.2"] == "keep: *.0.ff.net.2"
    assert "proj_out_1" in found.float_rules
    offered = {
        layer.site.name.removeprefix("transformer_blocks."): set(layer.costs) for layer in found.layers
    }
    assert offered["0.ff.net.0.proj"] == {"w3"}
    assert offered["0.norm1.linear"] == {"w8"}
    assert offered["1.norm1.linear"] == {"w8"}
    assert offered["1.attn1.to_q"] == {"w4", "w8"}
    assert offered["1.ff.net.2"] == {"w2", "w4", "w16"}
    assert by_end(found, "0.ff.net.0.proj").decided_by == "fixed: *.0.ff.*"
    assert by_end(found, "1.norm1.linear").decided_by == "adaln_weight_bits: 8"
    assert by_end(found, "1.attn1.to_v").activations == (16,)
    assert by_end(found, "1.attn1.to_q").activations == (8,)
    assert by_end(found, "1.norm1.linear").activations == (16,)


def test_the_order_of_patterns_means_nothing(opened):
    model = opened()
    patterns = {"*.0.attn1.to_*": 4, "*.to_v": 4, "*.ff.*": 8}
    backwards = dict(reversed(patterns.items()))
    assert list(patterns) != list(backwards)
    one, other = (candidates_of(model, mixdq(fixed=item)) for item in (patterns, backwards))
    assert one == other
    assert by_end(one, "0.attn1.to_v").decided_by == "fixed: *.0.attn1.to_*"
    assert by_end(one, "1.attn1.to_v").decided_by == "fixed: *.to_v"
    assert by_end(one, "1.attn1.to_k").decided_by == "bits: allocated in group all"


REFUSED = [
    ({"fixed": {"*.to_v": 4, "*.0.attn1.*": 8}}, "0.attn1.to_v is given 8 bits by .* and 4 bits by"),
    ({"fixed_activations": {"*.to_v": 8, "*.0.*": 16}}, "fixed_activations: .*0.attn1.to_v is given 16 bits"),
    ({"fixed": {"*.attn1.*": 4, "*.to_v": 4}}, r"'\*.to_v' decides no layer that others do not"),
    ({"fixed_activations": {"*.norm1.linear": 8}}, "modulation layers are weight-only"),
    ({"fixed_activations": {"*.to_v": 8}, "fixed": {"*.to_v": 16}}, "leaves the layer in floating point"),
    ({"adaln_weight_bits": 8, "fixed": {"*.0.*": 4}}, "0.norm1.linear is given 4 bits .* adaln_weight_bits"),
    ({"adaln_weight_bits": 6, "fixed": {"*.0.*": 4}}, "0.norm1.linear is given 4 bits .* adaln_weight_bits"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda item: str(item)[:50])
def test_a_pattern_without_a_say_of_its_own_is_refused(opened, changes, message):
    for key in changes.keys() & {"fixed", "fixed_activations"}:
        backwards = {**changes, key: dict(reversed(changes[key].items()))}
        for asked in (changes, backwards):
            with pytest.raises(PlanError, match=message):
                candidates_of(opened(), mixdq(**asked))


def test_a_pattern_may_describe_modulations_beside_layers_with_inputs(opened):
    found = candidates_of(opened(), mixdq(fixed_activations={"*.0.*": 4}))
    assert by_end(found, "0.attn1.to_v").activations == (4,)
    assert by_end(found, "0.norm1.linear").activations == (16,)


def test_modulations_are_allocated_weight_only_with_a_scale_per_row(opened):
    layer = by_end(candidates_of(opened(), mixdq(group_size=16, bits=(4, 8))), "0.norm1.linear")
    assert set(layer.schemes) == {"w4", "w8"}
    for scheme in layer.schemes.values():
        assert scheme.activation is None
        assert scheme.symmetric
        assert scheme.group_size is None


def test_modulations_in_floating_point_take_no_part(opened):
    found = candidates_of(opened(), mixdq(adaln_weight_bits=16, fixed={"*.1.norm1.linear": 4}))
    assert "transformer_blocks.0.norm1.linear" in found.float_rules
    assert set(by_end(found, "1.norm1.linear").costs) == {"w4"}


def test_pixart_has_two_groups_with_metrics_of_their_own(opened):
    found = candidates_of(opened("PixArtTransformer2DModel"), mixdq())
    assert dict(found.metrics) == {"content": "ssim", "quality": "sqnr_db"}
    groups = {layer.site.name: layer.metric_group for layer in found.layers}
    assert groups["transformer_blocks.0.attn2.to_k"] == "content"
    assert groups["transformer_blocks.0.attn1.to_k"] == "quality"


def test_transforms_are_counted_until_they_are_decided(opened):
    model = opened()
    settings = ViditQSettings(bits={"budget": {"mean_bits": 4.0}}, rotation="block", act_exponent=0.5)
    planned = by_end(candidates_of(model, settings), "0.ff.net.2")
    plain = by_end(
        candidates_of(
            model,
            settings,
            settle=lambda _, scheme: scheme.model_copy(update={"rotation": None, "input_scale": False}),
        ),
        "0.ff.net.2",
    )
    assert planned.costs["w4"] - plain.costs["w4"] == 5 * 256  # a sign and a float32 per input channel
    assert planned.costs["w16"] == plain.costs["w16"]


class Tied(Family):
    """Three linears, two of which hold one weight."""

    name, class_names = "dit", ("Tied",)

    def linears(self, module):
        roles = {"a": "attention.q", "b": "ff.in", "c": "ff.in"}
        return [LinearSite(name, role, 0, (8, 16)) for name, role in roles.items()]

    def folds(self, module):
        return []

    build = blocks = attentions = example_inputs = macs = replicas = lambda self, *_, **__: []


@pytest.fixture
def tied():
    module = nn.Module()
    for name in "abc":
        module.add_module(name, nn.Linear(16, 8, bias=False))
    spec = SimpleNamespace(dtype=torch.float32, shared={"c.weight": "a.weight"})
    return SimpleNamespace(family=Tied(), module=module, spec=spec)


def test_tied_copies_are_one_entry(tied):
    found = candidates_of(tied, mixdq(bits=(4, 16)))
    assert [(layer.site.name, layer.names) for layer in found.layers] == [("a", ("a", "c")), ("b", ("b",))]
    assert sum(layer.weights for layer in found.layers) == 2 * 8 * 16
    assert found.names == {"a", "b", "c"}


def test_tied_copies_cannot_have_scales_of_their_own(tied):
    settings = ViditQSettings(bits={"budget": {"mean_bits": 4.0}})
    with pytest.raises(PlanError, match="a and c are one weight"):
        candidates_of(tied, settings)


def test_the_likely_bits_are_what_the_tightest_budget_leaves(opened):
    model = opened()
    layers = candidates_of(model, mixdq(bits=(2, 8))).layers
    weights = sum(layer.weights for layer in layers)
    budget = {"mean_bits": 6.0, "bytes": 1000 + weights // 2}
    asked = MixdqSettings(budget=budget, bits=(2, 8))
    assert likely_bits(layers, asked, 1000, 10**6) == pytest.approx(4.0)
    assert likely_bits(layers, mixdq(bits=(2, 8)), 1000, 10**6) == 4.0
