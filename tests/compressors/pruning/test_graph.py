"""Groups of the stock models, and that looking for them changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compress.compressors.pruning.graph import find_groups, find_groups_in
from compress.errors import StageError
from torch import nn

VISION = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "SwinForImageClassification",
    "ConvNextForImageClassification",
)
DIFFUSION = ("DiTTransformer2DModel", "PixArtTransformer2DModel")


def kinds(groups):
    return [group.kind for group in groups]


@pytest.mark.parametrize("class_name", VISION[:3])
def test_vit(prunable, class_name):
    model = prunable(class_name)
    groups = find_groups(model)
    assert kinds(groups) == ["width", *(["attention", "ff"] * 3)]
    assert [group.size for group in groups] == [32, *([32, 64] * 3)]
    assert [group.block for group in groups] == [None, 0, 0, 1, 1, 2, 2]
    root = "vit" if class_name.startswith("ViT") else "deit"
    assert groups[0].name == f"{root}.embeddings.patch_embeddings.projection"
    tensors = {part.tensor: part.axis for part in groups[0].slices}
    assert tensors[f"{root}.embeddings.cls_token"] == 2
    assert tensors[f"{root}.embeddings.position_embeddings"] == 2
    assert tensors[f"{root}.layernorm.bias"] == 0
    for name, _ in model.module.named_children():
        if name.endswith("classifier"):
            assert tensors[f"{name}.weight"] == 1
            assert f"{name}.bias" not in tensors


def test_swin(prunable):
    groups = find_groups(prunable("SwinForImageClassification"))
    widths = [group for group in groups if group.kind == "width"]
    assert [group.size for group in widths] == [16, 32]
    parts = {part.tensor: part for part in widths[0].slices}
    merge = parts["swin.encoder.layers.0.downsample.reduction.weight"]
    assert merge.axis == 1
    assert torch.equal(merge.owner, torch.arange(16).repeat(4))
    assert torch.equal(parts["swin.encoder.layers.0.downsample.norm.bias"].owner, torch.arange(16).repeat(4))
    tables = {name for group in groups for part in group.slices if "bias_table" in (name := part.tensor)}
    assert tables == set()


def test_swin_with_absolute_positions(prunable):
    groups = find_groups(prunable("SwinForImageClassification", use_absolute_embeddings=True))
    parts = {part.tensor: part for part in groups[0].slices}
    assert parts["swin.embeddings.position_embeddings"].axis == 2
    merge = parts["swin.encoder.layers.0.downsample.reduction.weight"]
    assert torch.equal(merge.owner, torch.arange(16).repeat(4))


def test_convnext(prunable):
    groups = find_groups(prunable("ConvNextForImageClassification"))
    assert [group.size for group in groups if group.kind == "width"] == [16, 24, 32, 40]
    assert [group.size for group in groups if group.kind == "ff"] == [64, 96, 96, 128, 128, 128, 160]
    parts = {part.tensor: part for part in groups[0].slices}
    block = "convnext.encoder.stages.0.layers.0"
    assert not parts[f"{block}.dwconv.weight"].scored
    assert not parts[f"{block}.layer_scale_parameter"].scored
    assert parts[f"{block}.pwconv2.weight"].scored
    assert not parts[f"{block}.pwconv2.bias"].scored


@pytest.mark.parametrize("class_name", DIFFUSION)
def test_diffusion(prunable, class_name):
    groups = find_groups(prunable(class_name))
    attentions = ["attention"] * (1 if class_name.startswith("DiT") else 2)
    assert kinds(groups) == [*attentions, "ff"] * 2
    assert {part.tensor.split(".")[2] for group in groups for part in group.slices} <= {
        "attn1",
        "attn2",
        "ff",
    }


def test_gated_feed_forward(prunable):
    """Two outputs of the first linear make one inner channel: a value and its gate."""
    groups = find_groups(prunable("DiTTransformer2DModel", activation_fn="geglu"))
    inner = next(group for group in groups if group.kind == "ff")
    assert inner.name == "transformer_blocks.0.ff.net.0.proj"
    assert inner.size == 256
    weight = next(part for part in inner.slices if part.tensor == f"{inner.name}.weight")
    assert torch.equal(weight.owner, torch.arange(256).repeat(2))


@pytest.mark.parametrize("class_name", VISION + DIFFUSION)
def test_every_axis_once(prunable, class_name):
    model = prunable(class_name)
    axes = [(part.tensor, part.axis) for group in find_groups(model) for part in group.slices]
    assert len(axes) == len(set(axes))
    shapes = {name: value.shape for name, value in model.module.named_parameters()}
    for group in find_groups(model):
        for part in group.slices:
            assert part.owner.numel() == shapes[part.tensor][part.axis]
            assert set(part.owner.tolist()) - {-1} == set(range(group.size))


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "DiTTransformer2DModel"])
def test_planning_finds_the_same(prunable, class_name):
    model = prunable(class_name)
    found, planned = find_groups(model), find_groups_in(model.spec.meta_module(), model.family)
    assert [_plain(group) for group in found] == [_plain(group) for group in planned]


def _plain(group):
    parts = [(part.tensor, part.axis, part.scored, part.owner.tolist()) for part in group.slices]
    return replace(group, slices=()), parts


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "SwinForImageClassification"])
def test_leaves_no_trace(prunable, class_name):
    model = prunable(class_name)
    module = model.module
    first, *_, last = module.parameters()
    first.requires_grad_(True)  # all others are frozen
    last.grad = torch.ones_like(last)
    module.train()
    module.get_submodule("classifier").eval()
    tensors = dict(module.state_dict())
    before = {name: value.clone() for name, value in tensors.items()}
    forwards = {name: vars(child).get("forward") for name, child in module.named_modules()}
    state = torch.get_rng_state()
    find_groups(model)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in module.state_dict().items():
        assert value.data_ptr() == tensors[name].data_ptr()
        assert torch.equal(value, before[name])
    assert [value.requires_grad for value in module.parameters()].count(True) == 1
    assert first.requires_grad
    assert torch.equal(last.grad, torch.ones_like(last))
    assert module.training
    assert not module.get_submodule("classifier").training
    assert forwards == {name: vars(child).get("forward") for name, child in module.named_modules()}
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off_around(prunable, switched_off):
    model = prunable("ViTForImageClassification")
    with switched_off():
        groups = find_groups(model)
    assert kinds(groups) == ["width", *(["attention", "ff"] * 3)]


def test_a_second_model_is_not_affected_by_the_first(prunable):
    alone = [_plain(group) for group in find_groups(prunable("ViTForImageClassification"))]
    find_groups(prunable("SwinForImageClassification"))
    find_groups(prunable("ViTForImageClassification", num_hidden_layers=1, hidden_size=48))
    again = [_plain(group) for group in find_groups(prunable("ViTForImageClassification", seed=3))]
    assert alone == again


def test_an_attention_without_dependencies_is_named(prunable, monkeypatch):
    model = prunable("ViTForImageClassification")
    structure = model.family.structure(model.module)
    wrong = replace(structure.attentions[1], v="vit.layers.1.mlp.fc1")
    monkeypatch.setattr(
        type(model.family),
        "structure",
        lambda *_: replace(structure, attentions=(structure.attentions[0], wrong)),
    )
    with pytest.raises(StageError, match=r"vit\.layers\.1\.mlp\.fc1: its outputs do not depend on the heads"):
        find_groups(model)


def test_a_layer_that_is_not_run_is_named(prunable, monkeypatch):
    model = prunable("ViTForImageClassification")
    model.module.spare = nn.Linear(8, 8)
    structure = model.family.structure(model.module)
    monkeypatch.setattr(type(model.family), "structure", lambda *_: replace(structure, inner={"spare": 0}))
    with pytest.raises(StageError, match="spare takes no part"):
        find_groups(model)


def test_a_channel_with_two_groups_is_refused(prunable, monkeypatch):
    model = prunable("ViTForImageClassification")
    structure = model.family.structure(model.module)
    both = {**structure.inner, "vit.layers.0.attention.v_proj": 0}
    monkeypatch.setattr(type(model.family), "structure", lambda *_: replace(structure, inner=both))
    with pytest.raises(StageError, match=r"q_proj\.weight: axis 0 depends on .*q_proj and on .*v_proj"):
        find_groups(model)


def test_a_model_that_does_not_run_is_refused(prunable):
    model = prunable("ViTForImageClassification")
    layer = model.module.vit.layers[0].mlp.fc2
    layer.weight = nn.Parameter(layer.weight[:, :-1].clone())
    with pytest.raises(StageError, match="does not run with the shapes that it has"):
        find_groups(model)
