"""A compressed cache on a model whose linears are quantized: it needs inputs, factors and biases alone."""

from __future__ import annotations

import pytest
import torch
from compress.runtime.kv.attach import factors_of, new_cache, put_kv_cache
from compress.runtime.linear import QuantizedLinear
from transformers import DynamicCache

from .tiny import scheme_for


def _decoded(module, cache):
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [module(ids[:, :8], past_key_values=cache).logits]
        found += [module(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 20)]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_a_quantized_model_at_full_rank(make_llm, open_quantized, dtype, tolerance):
    """Factored are the weights as they were rounded; biases of quantized layers are added."""
    folder = make_llm("Qwen2ForCausalLM", dtype=dtype)
    module = open_quantized(folder, {"*": {"bits": 4, "group_size": 16}}, dtype).module
    attention = module.model.layers[0].self_attn
    assert isinstance(attention.k_proj, QuantizedLinear)
    assert attention.k_proj.bias.abs().max() > 0.1
    expected = _decoded(module, DynamicCache())
    put_kv_cache(module, scheme_for(module, 0, 0, window=1))
    for name, factors in factors_of(module).items():
        for letter in "kv":
            weight = getattr(module.get_submodule(name), f"{letter}_proj").dequantized_weight().float()
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            assert getattr(factors, f"{letter}_a").weight.dtype == getattr(torch, dtype)
            getattr(factors, f"{letter}_a").weight.data.copy_(s[:, None] * v)
            getattr(factors, f"{letter}_b").weight.data.copy_(u)
    found = _decoded(module, new_cache(module))
    assert torch.equal(found[:, :8], expected[:, :8])
    assert 0 < (found - expected).abs().max() < tolerance
