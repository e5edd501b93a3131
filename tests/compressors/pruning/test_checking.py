"""A pruned module that is not whole is refused, and the layer is named."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.pruning.checking import check
from compress.compressors.pruning.cutting import cut
from compress.compressors.pruning.graph import find_groups
from compress.errors import StageError
from compress.runtime.manifest import ModuleSurgery
from torch import nn

ALL = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "SwinForImageClassification",
    "ConvNextForImageClassification",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
)


@pytest.fixture
def pruned(prunable, choose):
    """Return `make(class_name)` -> a model that lost half of everything, and a head of every attention."""

    def make(class_name, **config):
        model = prunable(class_name, **config)
        groups = find_groups(model)
        cut(model, groups, choose(groups, 0.5, heads=1), attn_scale="preserve")
        return model

    return make


@pytest.mark.parametrize("class_name", ALL)
def test_whole_models_pass(prunable, pruned, class_name):
    check(prunable(class_name))
    check(pruned(class_name))


@pytest.mark.parametrize(
    ("class_name", "site", "attribute", "stale", "message"),
    [
        ("ViTForImageClassification", "vit.layers.1.attention", "num_attention_heads", 4, "4 heads of 4"),
        ("ViTForImageClassification", "vit.layers.1.attention", "head_dim", 8, "3 heads of 8"),
        ("ViTForImageClassification", "vit.layers.1.attention", "scaling", 8**-0.5, "scaling is 0.35"),
        ("DiTTransformer2DModel", "transformer_blocks.0.attn1", "heads", 4, "attn1"),
        ("DiTTransformer2DModel", "transformer_blocks.0.attn1", "inner_dim", 64, "attn1.to_q: 24 outputs"),
        ("DiTTransformer2DModel", "transformer_blocks.0.attn1", "inner_kv_dim", 64, "inner_kv_dim is 64"),
        ("DiTTransformer2DModel", "transformer_blocks.0.attn1", "scale", 0.25, "scale is 0.25"),
        (
            "SwinForImageClassification", "swin.encoder.layers.1.blocks.0.attention", "num_attention_heads",
            4, "blocks.0.attention says 4 heads",
        ),
    ],
)  # fmt: skip
def test_a_stale_attribute_is_found(pruned, class_name, site, attribute, stale, message):
    model = pruned(class_name)
    child = model.module.get_submodule(site)
    assert getattr(child, attribute) != stale
    setattr(child, attribute, stale)
    with pytest.raises(StageError, match=message):
        check(model)


def test_a_table_with_a_column_too_many_is_found(pruned):
    model = pruned("SwinForImageClassification")
    bias = model.module.swin.encoder.layers[1].blocks[0].attention.relative_position_bias
    table = bias.relative_position_bias_table
    bias.relative_position_bias_table = nn.Parameter(torch.cat([table, table[:, :1]], dim=1))
    with pytest.raises(StageError, match=r"relative_position_bias_table: 4 columns for 3 heads"):
        check(model)


def test_a_layer_that_misstates_its_weight_is_found(pruned):
    model = pruned("ConvNextForImageClassification")
    block = model.module.convnext.encoder.stages[2].layers[1]
    block.dwconv.groups = block.dwconv.in_channels = block.dwconv.out_channels = 32
    with pytest.raises(StageError, match=r"stages\.2\.layers\.1\.dwconv: its weight is \[16, 1, 7, 7\]"):
        check(model)


def test_a_norm_of_the_old_width_is_found(pruned):
    model = pruned("ViTForImageClassification")
    model.module.vit.layernorm.normalized_shape = (32,)
    with pytest.raises(StageError, match=r"vit\.layernorm: its weight is \[16\], and the layer says \[32\]"):
        check(model)


def test_a_bias_of_another_length_is_found(pruned):
    model = pruned("ViTForImageClassification")
    layer = model.module.vit.layers[0].mlp.fc1
    layer.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(StageError, match=r"layers\.0\.mlp\.fc1: its bias has 64 values for 32 outputs"):
        check(model)


def test_layers_that_do_not_fit_each_other_are_found(pruned):
    model = pruned("ViTForImageClassification")
    layer = model.module.vit.layers[2].mlp.fc2
    layer.weight = nn.Parameter(layer.weight[:, :-1].clone())
    layer.in_features -= 1
    model.surgery["vit.layers.2.mlp.fc2"] = ModuleSurgery(shapes={"weight": (16, 31), "bias": (16,)})
    with pytest.raises(StageError, match=r"vit\.layers\.2\.mlp\.fc2: the pruned model does not run"):
        check(model)


@pytest.mark.parametrize("wrong", ["missing", "more", "other"])
def test_a_surgery_that_is_not_the_modules_is_found(pruned, wrong):
    model = pruned("ViTForImageClassification")
    name = "vit.layers.1.mlp.fc1"
    if wrong == "missing":
        del model.surgery[name]
    elif wrong == "more":
        name = "vit.encoder"
        model.surgery[name] = ModuleSurgery()
    else:
        model.surgery[name] = ModuleSurgery(shapes={"weight": (30, 16), "bias": (30,)})
    with pytest.raises(StageError, match=f"{name}: what is noted"):
        check(model)


def test_outputs_that_are_not_finite_are_found(pruned):
    model = pruned("ViTForImageClassification")
    with torch.no_grad():
        model.module.vit.layers[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(StageError, match=r"vit\.layers\.0\.mlp\.fc1\.weight: a weight .* not finite"):
        check(model)


def test_gradients_that_are_not_finite_are_found(pruned):
    """Outputs of 1e18 are finite; the gradient of their squares by the classifier is not."""
    model = pruned("ViTForImageClassification")
    with torch.no_grad():
        model.module.vit.layernorm.weight.fill_(1e30)
        model.module.classifier.weight.fill_(1e-12)
    with pytest.raises(StageError, match="the pruned model's gradient is not finite"):
        check(model)


def test_checking_changes_nothing(pruned):
    model = pruned("SwinForImageClassification")
    module = model.module.train()
    first, *_, last = module.parameters()
    first.requires_grad_(True)
    last.grad = torch.ones_like(last)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    check(model)
    assert torch.equal(state, torch.get_rng_state())
    assert module.training
    assert [value.requires_grad for value in module.parameters()].count(True) == 1
    assert first.grad is None
    assert torch.equal(last.grad, torch.ones_like(last))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(child._forward_pre_hooks for child in module.modules())
