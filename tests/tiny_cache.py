"""Tiny language models with a compressed cache whose factors are random: folders, schemes, open models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.kv.attach import factors_of, put_kv_cache
from compress.runtime.kv.scheme import KvCacheScheme, KvLayer
from compress.runtime.kv.support import layers_of

TINY_LLAMA = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}  # fmt: skip


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a stock folder of a Llama with two layers and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})).to(dtype).save_pretrained(folder)
    return folder


def scheme_of(config: dict[str, Any], **changes: Any) -> KvCacheScheme:
    """Return a scheme with ranks of its own in every layer, a window of 4 and groups of 8 tokens."""
    layers = {
        attention.name: KvLayer(
            hidden=attention.hidden, width=attention.width, rank_k=3 + index, rank_v=5 + index, value_group=4
        )
        for index, attention in enumerate(layers_of(config).compressible)
    }
    own = {"window": 4, "mode": "sliding", "bits": None, "key_group": 8}
    return KvCacheScheme(layers=layers, **{**own, **changes})


@torch.no_grad()
def fill_factors(module: torch.nn.Module, seed: int = 7) -> None:
    """Let all factors be random, so that whoever mixes them up is found out."""
    generator = torch.Generator().manual_seed(seed)
    for factors in factors_of(module).values():
        for weight in factors.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)


def with_cache(
    folder: Path | str, *, quantized: bool = False, dtype: str | None = None, **changes: Any
) -> OpenModel:
    """Open a model, perhaps quantize its linears, and compress its cache, as stages would leave it."""
    model = open_model(ModelRef(id=str(folder), dtype=dtype), progress=SilentProgress())
    if quantized:
        quantize_linears(model)
    model.kv_cache = scheme_of(model.config, **changes)
    put_kv_cache(model.module, model.kv_cache)
    fill_factors(model.module)
    return model


def decoded(module: torch.nn.Module, tokens: int = 24, prompt: int = 10) -> torch.Tensor:
    """Return the logits [2, tokens - prompt + 1, vocabulary] of a text fed through the compressed cache."""
    from compress.exporters.verify_worker import decode
    from compress.runtime.kv.attach import new_cache

    ids = torch.randint(0, 60, (2, tokens), generator=torch.Generator().manual_seed(3))
    return decode(module, new_cache(module), ids, prompt)


def quantize_linears(model: OpenModel, keep: tuple[str, ...] = ()) -> None:
    """Round every linear but the head and those of such names to 8 bits, as a stage would leave it."""
    from compress.runtime.linear import QuantizedLinear
    from compress.runtime.manifest import QuantizedModule

    model.family.split(model.module)
    for site in model.linears():
        if site.role == "head" or (keep and site.name.endswith(keep)):
            continue
        linear = model.module.get_submodule(site.name)
        bias = linear.bias is not None
        scheme = QuantizedModule(shape=site.shape, bits=8, symmetric=True, bias=bias, method="test")
        scale = linear.weight.float().abs().amax(1, keepdim=True) / 127
        tensors = {"qweight": torch.round(linear.weight.float() / scale).to(torch.int8), "scale": scale}
        tensors |= {"bias": linear.bias.detach()} if bias else {}
        owner, _, attribute = site.name.rpartition(".")
        layer = QuantizedLinear.from_tensors(scheme, linear.weight.dtype, tensors)
        setattr(model.module.get_submodule(owner), attribute, layer)
        model.quantization[site.name] = scheme
