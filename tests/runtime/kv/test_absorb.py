"""Reading compressed values without rebuilding them gives what rebuilding them gives."""

from __future__ import annotations

import pytest
import torch
from compress.errors import PlanError
from compress.runtime.kv.absorb import AbsorbedOutput, attended_values
from compress.runtime.kv.rebuild import rebuilt_values
from transformers import AutoConfig, LlamaForCausalLM

from ...tiny_moe import moe_module
from .tiny import compressed


@pytest.fixture(params=[False, True], ids=["plain", "biases"])
def attention(request, llm_config):
    config = llm_config("LlamaForCausalLM", attention_bias=request.param)
    config.pop("architectures")
    torch.manual_seed(0)
    module = LlamaForCausalLM(AutoConfig.for_model(**config)).eval()
    found = compressed(module, 5, 7).model.layers[1].self_attn
    if request.param:
        found.v_proj.bias.data.normal_()
        found.o_proj.bias.data.zero_()
    return found


@torch.no_grad()
def test_outputs_are_equal(attention):
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(2, 9, 7, generator=generator)
    probabilities = torch.rand(2, 4, 3, 9, generator=generator) / 9
    values = rebuilt_values(attention, c).repeat_interleave(2, dim=1)
    expected = probabilities @ values
    assert expected.abs().mean() > 0.01
    assert (attended_values(attention, probabilities, c) - expected).abs().max() < 3e-7
    output = attention.o_proj(expected.transpose(1, 2).flatten(2))
    absorbed = AbsorbedOutput.of(attention)
    assert absorbed.weight.shape == (4, 48, 7)
    assert (absorbed.bias is None) == (attention.v_proj.bias is None)
    assert (absorbed.read(probabilities, c) - output).abs().max() < 3e-7


def test_clipped_values_are_refused():
    attention = compressed(moe_module("OlmoeForCausalLM", clip_qkv=0.5)).model.layers[0].self_attn
    with pytest.raises(PlanError, match="clip_qkv"):
        AbsorbedOutput.of(attention)
