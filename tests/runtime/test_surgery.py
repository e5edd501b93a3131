"""Sizes that a config does not imply: what is accepted, what follows from a weight, what is refused."""

from __future__ import annotations

import pytest
import torch
from compress.errors import SourceError
from compress.runtime.layered import check_layers_agree, homogeneous
from compress.runtime.manifest import Manifest, ModuleSurgery
from compress.runtime.surgery import apply_surgery
from compress.runtime.validate import parse_section, quantization_section
from torch import nn


class Attention(nn.Module):
    """As transformers names things, without its code."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.head_dim, self.scaling = 4, 8, 8**-0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.o_proj = nn.Linear(32, 32)


class WindowAttention(Attention):
    """With a table of a column per head, as Swin has it."""

    def __init__(self):
        super().__init__()
        self.relative_position_bias = nn.Module()
        self.relative_position_bias.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class DiffusersAttention(nn.Module):
    """As diffusers names things; its code splits `inner_dim` by `heads`."""

    def __init__(self):
        super().__init__()
        self.heads, self.inner_dim, self.inner_kv_dim, self.scale = 4, 32, 32, 8**-0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(32, 32), nn.Dropout(0.0)])


class GroupedAttention(nn.Module):
    """As language models have it: its heads are said by the config, which no surgery changes."""

    def __init__(self):
        super().__init__()
        self.head_dim, self.scaling = 8, 8**-0.5
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o_proj = nn.Linear(32, 32)


class FusedAttention(nn.Module):
    """As Segment Anything has it: one linear for queries, keys and values, and tables of its own."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.scale = 4, 8**-0.5
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.rel_pos_h, self.rel_pos_w = nn.Parameter(torch.zeros(5, 8)), nn.Parameter(torch.zeros(5, 8))


class Patches(nn.Module):
    """With a projection that is called as that of a fused attention, and a table of positions."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, 4, 4, 8))


def network():
    """Return one module of every kind that is cut."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 6),
            "norm": nn.LayerNorm(8),
            "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
            "patches": nn.Conv2d(3, 8, 4, stride=4),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "attention": Attention(),
            "windows": WindowAttention(),
            "diffusers": DiffusersAttention(),
            "language": GroupedAttention(),
            "fused": FusedAttention(),
            "embedding": Patches(),
        }
    )


def cut(**shapes):
    return ModuleSurgery(shapes=shapes)


def heads(count, head_dim, /, attention="attention", **attributes):
    """Return the surgery of an attention: everything that goes with so many heads; None leaves out."""
    width = count * head_dim
    stated = {"num_attention_heads": count, "head_dim": head_dim, "scaling": head_dim**-0.5}
    return whole(attention, width, "{}_proj", "o_proj", {**stated, **attributes})


def diffusers_heads(count, head_dim, /, **attributes):
    width = count * head_dim
    stated = {"heads": count, "inner_dim": width, "inner_kv_dim": width, "scale": head_dim**-0.5}
    return whole("diffusers", width, "to_{}", "to_out.0", {**stated, **attributes})


def fused_heads(head_dim, /, *, left_out=(), **attributes):
    """Return the surgery of the fused attention with narrower heads, less what is left out."""
    width = 4 * head_dim
    surgery = {
        "fused.qkv": cut(weight=(3 * width, 32), bias=(3 * width,)),
        "fused.proj": cut(weight=(32, width)),
        "fused": ModuleSurgery(
            shapes={"rel_pos_h": (5, head_dim), "rel_pos_w": (5, head_dim)},
            attributes={"scale": head_dim**-0.5, **attributes},
        ),
    }
    return {name: item for name, item in surgery.items() if name not in left_out}


def whole(attention, width, inner, out, attributes):
    listed = {key: value for key, value in attributes.items() if value is not None}
    rows = {f"{attention}.{inner.format(name)}": cut(weight=(width, 32), bias=(width,)) for name in "qkv"}
    return {
        **rows,
        f"{attention}.{out}": cut(weight=(32, width)),
        attention: ModuleSurgery(attributes=listed),
    }


def test_sizes_follow_the_weight():
    module = network()
    apply_surgery(
        module,
        {
            "linear": cut(weight=(4, 5), bias=(4,)), "norm": cut(weight=(5,), bias=(5,)),
            "depthwise": cut(weight=(5, 1, 3, 3), bias=(5,)), "patches": cut(weight=(5, 3, 4, 4), bias=(5,)),
            **heads(3, 6),
        },
    )  # fmt: skip
    linear, norm, depthwise, patches = (module[name] for name in ("linear", "norm", "depthwise", "patches"))
    assert (linear.in_features, linear.out_features, norm.normalized_shape) == (5, 4, (5,))
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (5, 5, 5)
    assert (patches.in_channels, patches.out_channels, patches.groups) == (3, 5, 1)
    assert (module["attention"].num_attention_heads, module["attention"].head_dim) == (3, 6)
    assert norm(linear.weight.new_zeros(2, 5)).shape == (2, 5)
    assert depthwise(torch.zeros(1, 5, 4, 4)).shape == (1, 5, 4, 4)


def test_every_known_attention_is_cut():
    module = network()
    table = {"windows.relative_position_bias": cut(relative_position_bias_table=(9, 3))}
    apply_surgery(module, {**heads(3, 6, "windows"), **table, **diffusers_heads(2, 4)})
    assert module["windows"].relative_position_bias.relative_position_bias_table.shape == (9, 3)
    assert (module["diffusers"].inner_dim, module["diffusers"].scale) == (8, 0.5)


def test_a_fused_attention_is_cut():
    module = network()
    apply_surgery(module, fused_heads(5))
    fused = module["fused"]
    assert (fused.qkv.out_features, fused.proj.in_features, fused.scale) == (60, 20, 5**-0.5)
    assert fused.rel_pos_h.shape == fused.rel_pos_w.shape == (5, 5)


def test_the_stream_of_a_fused_attention_may_narrow_alone():
    module = network()
    apply_surgery(module, {"fused.qkv": cut(weight=(96, 20)), "fused.proj": cut(weight=(20, 32), bias=(20,))})
    assert (module["fused"].qkv.in_features, module["fused"].scale) == (20, 8**-0.5)


def test_what_is_called_as_a_part_of_an_attention_is_none():
    module = network()
    apply_surgery(
        module,
        {
            "embedding.proj": cut(weight=(5, 3, 4, 4), bias=(5,)), "embedding": cut(positions=(1, 4, 4, 5)),
        },
    )  # fmt: skip
    assert module["embedding"].proj.out_channels == module["embedding"].positions.shape[-1] == 5


def test_a_depthwise_convolution_may_keep_one_channel():
    module = network()
    apply_surgery(module, {"depthwise": cut(weight=(1, 1, 3, 3), bias=(1,))})
    assert (module["depthwise"].groups, module["depthwise"].in_channels) == (1, 1)


def test_nothing_is_allocated_on_the_meta_device_and_frozen_stays_frozen():
    with torch.device("meta"):
        module = network()
    module["linear"].weight.requires_grad_(False)
    apply_surgery(module, {"linear": cut(weight=(4, 8), bias=(4,)), **heads(2, 8)})
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not module["linear"].weight.requires_grad and module["linear"].bias.requires_grad


REFUSED = {
    "no such module": ({"nowhere": cut(weight=(1,))}, "module nowhere, which the model does not have"),
    "no such parameter": ({"norm": cut(gamma=(1,))}, "no parameter gamma"),
    "wider": ({"linear": cut(weight=(7, 8), bias=(7,))}, r"\[7, 8\]; the config implies \[6, 8\]"),
    "another rank": ({"norm": cut(weight=(4, 2))}, "only makes it smaller"),
    "a bias left long": ({"linear": cut(weight=(4, 8))}, r"with a bias of \[6\]"),
    "a norm in two lengths": ({"norm": cut(weight=(4,))}, r"with a bias of \[8\]"),
    "another window": ({"patches": cut(weight=(8, 3, 2, 4))}, "another window"),
    "groups": ({"grouped": cut(weight=(4, 4, 3, 3), bias=(4,))}, "2 groups is not pruned"),
    "heads without attributes": (
        {name: item for name, item in heads(3, 8).items() if name != "attention"}, "24 channels of queries"),
    "attributes without heads": ({"attention": heads(3, 8)["attention"]}, "32 channels of queries"),
    "keys of another width": (
        {**heads(3, 8), "attention.k_proj": cut(weight=(16, 32), bias=(16,))},
        "16 channels of keys; its heads make 24"),
    "values of another width": (
        {**heads(3, 8), "attention.v_proj": cut(weight=(8, 32), bias=(8,))}, "8 channels of values"),
    "an output left wide": (
        {name: item for name, item in heads(3, 8).items() if name != "attention.o_proj"},
        "inputs of the output projection"),
    "another scale": (heads(3, 8, scaling=1.0), "scaling 1.0 is not that of 8 channels"),
    "more heads": (heads(8, 4), "sets num_attention_heads to 8"),
    "half a head": (heads(3, 8, head_dim=7.5), "sets head_dim to 7.5"),
    "no scale for narrower heads": (heads(4, 4, scaling=None), r"scaling 0.35\d+ is not that of 4 channels"),
    "the scale of heads that stayed": (heads(2, 8, scaling=4**-0.5), "scaling 0.5 is not that of 8"),
    "wider heads": (
        {**heads(2, 8, head_dim=None), "attention.q_proj": cut(weight=(32, 32))}, "32 channels of queries"),
    "a number of something else": (
        {"linear": ModuleSurgery(attributes={"heads": 3})}, "a Linear is no attention"),
    "a scale that the config decides": (
        {"language": ModuleSurgery(attributes={"scaling": 1.0})}, "a GroupedAttention is no attention"),
    "heads that the config counts": (
        {"language.q_proj": cut(weight=(16, 32), bias=(16,))}, "a GroupedAttention is no attention"),
    "a table of another attention": (heads(3, 8, "windows"), "4 columns of relative_position_bias_table"),
    "a table by itself": (
        {"windows.relative_position_bias": cut(relative_position_bias_table=(9, 1))}, "1 columns of"),
    "diffusers: no scale": (diffusers_heads(4, 4, scale=None), r"scale 0.35\d+ is not that of 4 channels"),
    "diffusers: no heads": (diffusers_heads(3, 8, heads=None), "scale .* is not that of 6 channels"),
    "diffusers: no heads, and a scale of fewer": (
        diffusers_heads(3, 6, heads=None), "18 channels of queries make no 4 heads"),
    "diffusers: fewer heads, and their channels left": (
        {"diffusers": ModuleSurgery(attributes={"heads": 2, "scale": 16**-0.5})},
        "heads of 16 channels, and before the cut they had 8"),
    "diffusers: a width of before": (
        diffusers_heads(3, 8, inner_dim=None), "32 as inner_dim; its heads make 24"),
    "fused: tables left wide": (
        {**fused_heads(5, left_out=["fused"]), "fused": ModuleSurgery(attributes={"scale": 5**-0.5})},
        "8 columns of rel_pos_h; its heads make 5"),
    "fused: a table by itself": (
        {"fused": cut(rel_pos_w=(5, 4))}, "4 columns of rel_pos_w; its heads make 8"),
    "fused: no scale": (
        {**fused_heads(5, left_out=["fused"]), "fused": cut(rel_pos_h=(5, 5), rel_pos_w=(5, 5))},
        r"scale 0.35\d+ is not that of 5 channels"),
    "fused: projections alone": (fused_heads(5, left_out=["fused"]), "8 columns of rel_pos_h"),
    "fused: rows of no heads": (
        {"fused.qkv": cut(weight=(61, 32), bias=(61,))}, "61 rows of queries, keys and values make no 4"),
    "fused: an output left wide": (
        fused_heads(5, left_out=["fused.proj"]), "32 channels as inputs of the output projection"),
    "fused: an output alone": (
        {"fused.proj": cut(weight=(32, 16))}, "16 channels as inputs of the output projection; its heads"),
    "fused: fewer heads": (fused_heads(5, num_attention_heads=3), "60 rows .* make no 3 heads"),
    "fused: shorter tables": (
        {"fused": cut(rel_pos_h=(4, 8))}, r"\[4, 8\]; of \[5, 8\], pruning removes columns"),
    "a smaller grid of positions": ({"embedding": cut(positions=(1, 1, 1, 8))}, "pruning removes columns"),
    "diffusers: a width of keys of before": (diffusers_heads(3, 8, inner_kv_dim=None), "32 as inner_kv_dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_pruning_cannot_leave_is_refused(case):
    surgery, message = REFUSED[case]
    with torch.device("meta"):
        module = network()
    with pytest.raises(SourceError, match=message):
        apply_surgery(module, surgery)


def test_section_and_manifest_say_the_same():
    manifest = Manifest(surgery={"linear": cut(weight=(4, 5), bias=(4,)), **heads(3, 6)})
    section = quantization_section(manifest, "float32")
    assert parse_section(section, "config.json") == manifest
    assert Manifest.parse(manifest.to_json().encode(), "compress.json") == manifest


def test_where_nothing_is_cut_no_byte_changes():
    assert "surgery" not in Manifest().to_json()
    assert "surgery" not in quantization_section(Manifest(), "float32")
    assert Manifest.parse(Manifest().to_json().encode(), "compress.json") == Manifest()


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        ({"a.b": {"shapes": {"weight": [0, 3]}}}, "greater than or equal to 1"),
        ({"a.b": {"shapes": {"weight": [2**40]}}}, "less than or equal to"),
        ({"a.b": {"shapes": {"we/ight": [2]}}}, "pattern"),
        ({"a.b": {"attributes": {"forward": 2}}}, "forward"),
        ({"a.b": {"attributes": {"query_dim": 2}}}, "query_dim"),
        ({"a.b": {"attributes": {"scale": float("inf")}}}, r"attributes\.scale"),
        ({"a.b": {"hooks": {}}}, "hooks"),
        ({"../b": {}}, "pattern"),
    ],
)
def test_other_words_are_refused(surgery, message):
    section = {**quantization_section(Manifest(), "float32"), "surgery": surgery}
    with pytest.raises(SourceError, match=message):
        parse_section(section, "config.json")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(32, 20)})
        self.mlp.fc1 = self.mlp["fc1"]


def test_sizes_per_layer_are_held_against_the_module():
    module = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
    agreed = {"01": {"intermediate_size": 20, "num_attention_heads": 4, "head_dim": 8}}
    check_layers_agree(module, {"per_layer_config": agreed}, "config.json")
    check_layers_agree(module, {}, "config.json")
    for wrong, message in (
        ({"1": {"intermediate_size": 21}}, "intermediate_size: 21, but the manifest leaves 20"),
        ({"0": {"num_attention_heads": True}}, "num_attention_heads: True"),
        ({"0": {"hidden_act": 3}}, "hidden_act: 3"),
        ({"2": {}}, "per_layer_config.2: the model has no such layer"),
        ({"0": 3}, "no such layer"),
        ([], "not a mapping"),
    ):
        with pytest.raises(SourceError, match=message):
            check_layers_agree(module, {"per_layer_config": wrong}, "config.json")
    assert homogeneous({"hidden_size": 4, "per_layer_config": agreed}) == {"hidden_size": 4}
