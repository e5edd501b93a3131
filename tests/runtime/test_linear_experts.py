"""Experts as linears: the outputs of the stock class, its memory, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from compress.runtime.linear_experts import LinearExperts, fuse_experts, split_experts, why_fused

from ..quantized_moe import logits
from ..tiny_moe import CLASSES, moe_module

SPLIT = [name for name in CLASSES if name != "GptOssForCausalLM"]


@pytest.mark.parametrize("class_name", SPLIT)
def test_linear_experts_compute_what_the_stock_class_does(class_name):
    module = moe_module(class_name)
    module.set_experts_implementation("eager")
    expected, before = logits(module), {name: t.clone() for name, t in module.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in module.parameters())
    split_experts(module)
    assert sum(isinstance(child, LinearExperts) for child in module.modules()) > 1
    assert not any(name.endswith("gate_up_proj") for name in module.state_dict())
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert torch.allclose(logits(module), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1  # so the tolerance says something
    fuse_experts(module)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(logits(module), expected)


def test_each_matrix_is_that_of_its_expert_in_the_same_memory():
    module = moe_module("MixtralForCausalLM")
    stock = module.model.layers[1].mlp.experts
    split_experts(module)
    experts = module.model.layers[1].mlp.experts
    expert = experts.get_submodule("4")
    assert torch.equal(expert.gate_proj.weight, stock.gate_up_proj[4, :24])
    assert torch.equal(expert.up_proj.weight, stock.gate_up_proj[4, 24:])
    assert torch.equal(expert.down_proj.weight, stock.down_proj[4])
    assert expert.down_proj.weight.data_ptr() == stock.down_proj[4].data_ptr()
    assert experts.num_experts == 6 == len(experts.experts())


def test_tokens_go_where_they_are_sent_in_the_weights_given():
    module = moe_module("OlmoeForCausalLM")
    module.set_experts_implementation("eager")
    stock = copy.deepcopy(module.model.layers[0].mlp.experts)
    split_experts(module)
    experts = module.model.layers[0].mlp.experts
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([[5, 0], [2, 6], [6, 6]])  # 6 stands for none
    weights = torch.tensor([[0.25, 2.0], [-1.0, 3.0], [1.0, 1.0]])
    with torch.no_grad():
        found = experts(states, chosen, weights)
        one, other = experts.get_submodule("5"), experts.get_submodule("0")
        expected = 2.0 * other(states[:1], experts.act_fn) + 0.25 * one(states[:1], experts.act_fn)
        assert torch.allclose(found, stock(states, chosen, weights), atol=1e-6)
    assert torch.allclose(found[0], expected[0], atol=1e-6) and not found[2].any()


def test_interleaved_experts_stay_as_they_are():
    module = moe_module("GptOssForCausalLM")
    before = list(module.state_dict())
    split_experts(module)
    assert list(module.state_dict()) == before
    assert "interleaved" in why_fused(module.model.layers[0].mlp.experts)


def test_only_the_experts_that_are_listed_are_split():
    module = moe_module("Qwen2MoeForCausalLM")  # layer 1 is dense
    names = ["model.layers.2.mlp.experts.5.up_proj", "model.layers.0.mlp.shared_expert.up_proj"]
    split_experts(module, names)
    kinds = [isinstance(getattr(layer.mlp, "experts", None), LinearExperts) for layer in module.model.layers]
    assert kinds == [False, False, True]
    split_experts(module)
    assert isinstance(module.model.layers[0].mlp.experts, LinearExperts)


def test_on_the_meta_device_nothing_is_allocated():
    with torch.device("meta"):
        module = copy.deepcopy(moe_module("MixtralForCausalLM")).to("meta")
    split_experts(module)
    assert all(parameter.is_meta for parameter in module.parameters())
    fuse_experts(module)
    assert module.model.layers[0].mlp.experts.gate_up_proj.shape == (6, 48, 32)
