"""Cutting computes what zeroing computes, moves nothing else, and is told exactly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from compress.compressors.pruning.cutting import cut, cut_shapes, planned_surgery, surgery_of
from compress.compressors.pruning.graph import find_groups, find_groups_in
from compress.compressors.pruning.groups import Selection
from compress.errors import StageError
from compress.models.base import flat_shapes
from compress.runtime.surgery import apply_surgery
from torch import nn

ATTENTIVE = (
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "SwinForImageClassification",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
)
ALL = (*ATTENTIVE, "ConvNextForImageClassification")
INNER = ("ff", "attention")


def zeroed(module, groups, selection):
    """Return a copy of full width in which removed inner channels have no effect."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for group in groups:
            if group.name not in selection.kept:
                continue
            gone = ~selection.mask(group.name)
            for part in group.slices:
                values = module.get_parameter(part.tensor)
                values.index_fill_(part.axis, gone[part.owner].nonzero().flatten(), 0.0)
    return module


@pytest.mark.parametrize("heads", [0, 1])
@pytest.mark.parametrize("class_name", ALL)
def test_cut_is_zeroed(prunable, choose, forward, class_name, heads):
    model = prunable(class_name)
    groups = find_groups(model)
    selection = choose(groups, 0.5, kinds=INNER, heads=heads)
    expected = forward(replace(model, module=zeroed(model.module, groups, selection)))
    dense = forward(model)
    cut(model, groups, selection, attn_scale="preserve")
    assert torch.allclose(forward(model), expected, atol=1e-5)
    assert not torch.allclose(dense, expected, atol=1e-3)  # what was removed did matter


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("ViTForImageClassification", {"hidden_size": 17, "num_attention_heads": 1}),  # 17 tokens as well
        ("ViTForImageClassification", {"intermediate_size": 17}),
        ("ConvNextForImageClassification", {"hidden_sizes": [8, 8, 8, 8]}),  # on 8 x 8 positions
        ("SwinForImageClassification", {"image_size": 36, "use_absolute_embeddings": True}),  # padded windows
        ("DiTTransformer2DModel", {"sample_size": 16}),  # 64 tokens of 64 channels
        ("DiTTransformer2DModel", {"activation_fn": "geglu"}),
    ],
)
def test_sizes_that_coincide(prunable, choose, forward, class_name, config):
    """Tokens as many as channels, odd grids, gates: axes must not be taken for one another."""
    model = prunable(class_name, **config)
    groups = find_groups(model)
    selection = choose(groups, 0.5, kinds=INNER)
    expected = forward(replace(model, module=zeroed(model.module, groups, selection)))
    cut(model, groups, selection, attn_scale="preserve")
    assert torch.allclose(forward(model), expected, atol=1e-5)
    widths = [group for group in find_groups(model) if group.kind == "width"]
    cut(model, widths, choose(widths, 0.5), attn_scale="preserve")
    assert torch.isfinite(forward(model)).all()


@pytest.mark.parametrize("class_name", ALL)
def test_analytic_work_of_a_cut_model(prunable, choose, class_name):
    """The family's count from shapes alone equals one that watches every layer run."""
    model = prunable(class_name)
    groups = find_groups(model)
    cut(model, groups, choose(groups, 0.5, heads=1), attn_scale="preserve")
    layers, products = watched_macs(model)
    count = model.family.macs
    shapes = flat_shapes(model.surgery)
    assert count(model.config, attention_products=False, shapes=shapes) == layers
    assert count(model.config, shapes=shapes) == layers + products == model.size().macs


def watched_macs(model):
    """Count multiply-accumulates of linears and convolutions, and of products of attentions."""
    sites = model.family.structure(model.module).attentions
    layers, rows = 0, {}

    def watch(name, child):
        def hook(_, __, output):
            nonlocal layers
            weight = child.weight
            places = output.numel() // weight.shape[0]
            layers += places * weight.numel()
            rows[name] = output.shape

        child.register_forward_hook(hook)

    for name, child in model.module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            watch(name, child)
    with torch.no_grad():
        model.module(**model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0)))
    products = sum(2 * rows[site.q].numel() * rows[site.k][1] for site in sites)
    return layers, products


def test_two_cuts_are_zeroed(prunable, choose, forward):
    """Scales fold on top of each other, and positions count in what the first cut left."""
    model = prunable("SwinForImageClassification")
    original = copy.deepcopy(model.module)
    for seed, share in ((1, 0.25), (2, 0.5)):
        groups = find_groups(model)
        selection = choose(groups, share, kinds=INNER, heads=int(seed == 1), seed=seed)
        expected = forward(replace(model, module=zeroed(model.module, groups, selection)))
        cut(model, groups, selection, attn_scale="preserve")
        assert torch.allclose(forward(model), expected, atol=1e-5)
    assert model.module.classifier.weight.shape == original.classifier.weight.shape


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "DiTTransformer2DModel"])
def test_reset_scale(prunable, choose, forward, class_name):
    model = prunable(class_name)
    groups = find_groups(model)
    site = next(group.attention for group in groups if group.attention)
    selection = choose(groups, 0.5, kinds=("attention",))
    weight = model.module.get_parameter(f"{site.q}.weight").clone()
    expected = forward(replace(model, module=zeroed(model.module, groups, selection)))
    cut(model, groups, selection, attn_scale="reset")
    child = model.module.get_submodule(site.name)
    scale = next(name for name, meaning in site.attributes.items() if meaning == "scale")
    assert getattr(child, scale) == (site.head_dim // 2) ** -0.5
    kept = torch.tensor(selection.kept[site.q])
    assert torch.equal(model.module.get_parameter(f"{site.q}.weight"), weight[kept])
    assert not torch.allclose(forward(model), expected, atol=1e-4)  # another temperature


@pytest.mark.parametrize("width", [64, 96, 192, 384, 768, 1024, 1152, 3072])
def test_norms_keep_their_order(prunable, choose, width):
    """Scales of norms must not be permuted, whatever order a set of that size has."""
    model = prunable(
        "ViTForImageClassification", dtype="bfloat16", hidden_size=width, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, image_size=16,
    )  # fmt: skip
    group = find_groups(model)[0]
    selection = choose([group], 0.8)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    cut(model, [group], selection, attn_scale="preserve")
    kept = torch.tensor(selection.kept[group.name])
    assert len(kept) == int(width * 0.2)
    names = [part.tensor for part in group.slices if "layernorm" in part.tensor]
    assert len(names) == 6
    for name in names:
        assert torch.equal(model.module.get_parameter(name), before[name][kept])
    assert torch.equal(model.module.classifier.weight, before["classifier.weight"][:, kept])
    assert torch.equal(model.module.vit.embeddings.cls_token, before["vit.embeddings.cls_token"][:, :, kept])


def test_merged_patches_lose_the_same_channels(prunable, choose, forward):
    model = prunable("SwinForImageClassification")
    groups = [group for group in find_groups(model) if group.kind == "width"]
    selection = choose(groups, 0.5)
    before = model.module.get_parameter("swin.encoder.layers.0.downsample.norm.weight").clone()
    cut(model, groups, selection, attn_scale="preserve")
    kept = torch.tensor(selection.kept[groups[0].name])
    places = torch.cat([kept + 16 * corner for corner in range(4)])
    assert torch.equal(model.module.swin.encoder.layers[0].downsample.norm.weight, before[places])
    assert model.module.swin.encoder.layers[0].downsample.norm.normalized_shape == (32,)
    assert torch.isfinite(forward(model)).all()


@pytest.mark.parametrize("class_name", ALL)
def test_everything_at_once(prunable, choose, forward, class_name):
    """All kinds cut: it runs, and is what a stock module becomes by the noted surgery."""
    model = prunable(class_name)
    groups = find_groups(model)
    selection = choose(groups, 0.5, heads=1)
    counts = {name: len(kept) for name, kept in selection.kept.items()}
    heads = {name: len(kept) for name, kept in selection.heads.items()}
    shapes = {name: tuple(value.shape) for name, value in model.module.named_parameters()}
    predicted = cut_shapes(shapes, groups, counts, heads)
    planned = planned_surgery(
        model.spec, find_groups_in(model.spec.meta_module(), model.family), counts, heads
    )
    cut(model, groups, selection, attn_scale="preserve")
    after = {name: tuple(value.shape) for name, value in model.module.named_parameters()}
    assert predicted == after != shapes
    assert model.surgery == planned
    assert flat_shapes(model.surgery) == {name: after[name] for name in after if after[name] != shapes[name]}
    again = model.family.build(model.config)
    apply_surgery(again, model.surgery)
    again.load_state_dict(model.module.state_dict(), strict=True)
    assert torch.equal(forward(replace(model, module=again.eval())), forward(model))
    assert model.size().parameters == sum(
        value.numel() for name, value in model.module.named_parameters() if name not in model.spec.shared
    )


def test_a_second_cut_is_noted_against_the_config(prunable, choose):
    model = prunable("ViTForImageClassification")
    for seed in (0, 1):
        groups = find_groups(model)
        cut(model, groups, choose(groups, 0.5, seed=seed), attn_scale="preserve")
    attention = model.surgery["vit.layers.0.attention"].attributes
    assert attention == {"head_dim": 2, "scaling": 2**-0.5}
    assert model.surgery["vit.layers.0.mlp.fc1"].shapes == {"weight": (16, 8), "bias": (16,)}


def test_scales_are_folded_in_float32(prunable, choose):
    model = prunable("ViTForImageClassification", dtype="bfloat16")
    groups = [group for group in find_groups(model) if group.kind == "attention"]
    selection = choose(groups, 0.4)
    before = {group.name: model.module.get_submodule(group.name).weight.clone() for group in groups}
    cut(model, groups, selection, attn_scale="preserve")
    for group in groups:
        head_dim = len(selection.kept[group.name]) // len(selection.heads[group.name])
        factor = (head_dim / group.attention.head_dim) ** 0.5
        assert float(torch.tensor(factor, dtype=torch.bfloat16)) != factor  # else rounding it would not show
        kept = before[group.name][list(selection.kept[group.name])]
        wanted = (kept.float() * factor).bfloat16()
        assert torch.equal(model.module.get_submodule(group.name).weight, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flags_and_dtype_stay(prunable, choose, dtype):
    model = prunable("ViTForImageClassification", dtype=dtype)
    groups = find_groups(model)
    selection = choose(groups, 0.5, kinds=INNER)
    module = model.module.train()
    frozen, trained = "vit.layers.0.mlp.fc1.weight", "vit.layers.0.mlp.fc2.weight"
    module.get_parameter(trained).requires_grad_(True)
    module.get_parameter(trained).grad = torch.ones_like(module.get_parameter(trained))
    untouched = {id(value): name for name, value in module.named_parameters() if "layernorm" in name}
    cut(model, groups, selection, attn_scale="preserve")
    after = dict(module.named_parameters())
    assert module.training
    assert {value.dtype for value in after.values()} == {getattr(torch, dtype)}
    assert {value.device.type for value in after.values()} == {"cpu"}
    assert not after[frozen].requires_grad
    assert after[trained].requires_grad
    assert after[trained].grad is None
    assert all(value.is_contiguous() for value in after.values())
    assert untouched == {id(value): name for name, value in after.items() if "layernorm" in name}
    # Memory of its own, not a view of the full weight.
    assert after[trained].untyped_storage().nbytes() == after[trained].numel() * after[trained].element_size()


def test_shared_copies_stay_untouched(prunable, choose):
    model = prunable("DiTTransformer2DModel")
    names = [name for copies in model.family.replicas(model.config) for name in copies]
    before = {name: model.module.get_parameter(name) for name in names}
    assert len(before) == 10
    groups = find_groups(model)
    cut(model, groups, choose(groups, 0.5, heads=1), attn_scale="preserve")
    assert all(model.module.get_parameter(name) is value for name, value in before.items())


def test_without_cut_there_is_no_surgery(prunable):
    for class_name in ALL:
        model = prunable(class_name)
        assert surgery_of(model.module, model.family, model.config) == {}


def _selection(**changes):
    name = "vit.layers.0.attention.q_proj"
    kept = {name: (0, 1, 8, 9)}
    given = {"kept": kept, "heads": {name: (0, 1)}, "sizes": {name: 32}, **changes}
    return Selection(given["kept"], given["heads"], given["sizes"])


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (_selection(sizes={"vit.layers.0.attention.q_proj": 16}), "has 32 channels; the selection was made"),
        (_selection(kept={"vit.layers.0.attention.q_proj": ()}), "in ascending order"),
        (_selection(kept={"vit.layers.0.attention.q_proj": (1, 0, 8, 9)}), "in ascending order"),
        (_selection(kept={"vit.layers.0.attention.q_proj": (0, 1, 8, 32)}), "in ascending order"),
        (_selection(kept={"vit.layers.0.attention.q_proj": (0, 1, 8)}), "each equally many"),
        (_selection(heads={"vit.layers.0.attention.q_proj": (0, 2)}), "heads that stay"),
        (_selection(heads={}), "heads that stay"),
        (_selection(kept={"vit.spare": (0,)}), "vit.spare, which is no group"),
    ],
)
def test_what_does_not_fit_changes_nothing(prunable, selection, message):
    model = prunable("ViTForImageClassification")
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    with pytest.raises(StageError, match=message):
        cut(model, find_groups(model), selection, attn_scale="preserve")
    assert all(torch.equal(value, before[name]) for name, value in model.module.named_parameters())
    assert model.surgery == {}


def test_groups_of_an_earlier_module_are_refused(prunable, choose):
    model = prunable("ViTForImageClassification")
    groups = find_groups(model)
    inner = [group for group in groups if group.kind == "ff"]
    selection = choose(inner, 0.5)
    cut(model, groups, selection, attn_scale="preserve")
    with pytest.raises(StageError, match="has 32 positions, its group 64"):
        cut(model, groups, selection, attn_scale="preserve")


def test_a_tied_tensor_is_refused(prunable, choose):
    model = prunable("ViTForImageClassification")
    model.module.spare = nn.Linear(8, 8)
    model.module.spare.weight = model.module.vit.layers[0].mlp.fc1.weight
    groups = find_groups(model)
    with pytest.raises(StageError, match=r"spare\.weight is one tensor with another"):
        cut(model, groups, choose(groups, 0.5, kinds=("ff",)), attn_scale="preserve")
