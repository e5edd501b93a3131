"""Models with a compressed key-value cache for benchmarks, and a decoder that absorbs the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compress.calibration.recording import record
from compress.compressors.kv_cache.energies import measure
from compress.compressors.kv_cache.factorise import spectrum_of, weight_of, whitened
from compress.models.base import OpenModel, tensor_bytes
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings
from compress.runtime.kv.absorb import attended_values
from compress.runtime.kv.attach import factors_of, new_cache, put_kv_cache, remove_kv_cache
from compress.runtime.kv.cache import CskvLayer
from compress.runtime.kv.rebuild import rebuilt_keys
from compress.runtime.kv.scheme import KvCacheScheme, KvLayer
from compress.runtime.kv.support import KvAttention, layers_of
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
)
from transformers.masking_utils import eager_mask

ABSORBING = "cskv_values_absorbed"
_VALUE_GROUP = 25
"""Channels of a value that share a scale, where it has as many."""


def random_llama(seed: int, tokens: int) -> LlamaForCausalLM:
    """Return a Llama of 8 layers, 512 wide, with 4 KV heads for 8 query heads, and random weights."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=tokens, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def sites_of(module: nn.Module) -> tuple[KvAttention, ...]:
    """Return the attentions whose cache can be compressed."""
    config: Any = module.config
    return layers_of({**config.to_dict(), "_class_name": type(module).__name__}).compressible


def moments_of(model: OpenModel, samples: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return the second moments of every attention's input on the model's own text, for the closed form."""
    settings = CalibrationSettings(samples=samples, length=length)
    with TemporaryDirectory() as folder:
        calibration = record(model, settings, seed=seed, cache=Path(folder), progress=SilentProgress())
        sources = {site.name: f"{site.name}.k_proj" for site in sites_of(model.module)}
        found = measure(model, sources, calibration, SilentProgress())
    return {name: energy.gram for name, energy in found.items()}


_PUBLISHED: Mapping[str, Any] = {"window": 32, "mode": "sliding", "bits": None, "key_group": 32}


@torch.no_grad()
def compressed(
    module: nn.Module, ranks: tuple[int, int], moments: Mapping[str, Tensor] | None, **scheme: Any
) -> nn.Module:
    """Give a module a compressed cache, in the place of one that it may have; return it.

    Args:
        module: a causal language model.
        ranks: of keys and of values, in every layer.
        moments: of `moments_of`; None: those of white inputs, which makes it an SVD of the weights.
        scheme: values of the scheme that are not the published ones.
    """
    remove_kv_cache(module)
    layers = {
        site.name: KvLayer(
            hidden=site.hidden, width=site.width, rank_k=ranks[0], rank_v=ranks[1],
            value_group=min(_VALUE_GROUP, ranks[1]),
        )
        for site in sites_of(module)
    }  # fmt: skip
    put_kv_cache(module, KvCacheScheme(layers=layers, **{**_PUBLISHED, **scheme}))
    for name, factors in factors_of(module).items():
        for side, rank in zip("kv", ranks, strict=True):
            weight = weight_of(module.get_submodule(f"{name}.{side}_proj"), name)
            gram = torch.eye(weight.shape[1], dtype=weight.dtype) if moments is None else moments[name]
            pair = whitened(weight, spectrum_of(weight, gram), rank)
            factors.get_submodule(f"{side}_a").get_parameter("weight").copy_(pair.a)
            factors.get_submodule(f"{side}_b").get_parameter("weight").copy_(pair.b)
    return module


@dataclass
class Candidate:
    """A way to keep keys and values.

    Attributes:
        name: in the table.
        module: that decodes.
        new: returns an empty cache for it.
        factor_bytes: that the module has more than the original.
        cache: what is being filled.
    """

    name: str
    module: nn.Module
    new: Callable[[nn.Module], Any]
    factor_bytes: int = 0
    cache: Any = field(default=None, repr=False)

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Read a prompt [1, tokens] into a new cache."""
        self.cache = self.new(self.module)
        self.module(input_ids=ids, past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> None:
        """Read tokens [1, tokens], one after the other."""
        for token in ids.split(1, dim=1):
            self.module(input_ids=token, past_key_values=self.cache, use_cache=True)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors of the cache as it is now."""
        if hasattr(self.cache, "stored_bytes"):
            return int(self.cache.stored_bytes())
        names = ("keys", "values", "_quantized_keys", "_quantized_values")
        found = [getattr(layer, name, None) for layer in self.cache.layers for name in names]
        return sum(tensor_bytes(tensor) for tensor in found if isinstance(tensor, Tensor))


def factor_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's factors."""
    return sum(
        tensor_bytes(weight) for factors in factors_of(module).values() for weight in factors.parameters()
    )


def plain_cache(module: nn.Module) -> DynamicCache:
    """Return the cache that transformers makes by itself."""
    return DynamicCache(config=module.config)


def quantized_cache(backend: str) -> Callable[[nn.Module], QuantizedCache]:
    """Return what makes transformers' quantized cache at 4 bits, with its own defaults otherwise."""
    return lambda module: QuantizedCache(backend, module.config, nbits=4)


class _AbsorbingLayer(CskvLayer):
    """Hands out the values of the exact tokens alone, and keeps the compressed ones for the attention."""

    c_v: Tensor | None = None

    def _with_history(self, tokens: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.c_v = None
        if not tokens:
            return k, v
        keys, history = [self.keys, k], tokens - self.keys.shape[2]
        if history:
            c_k, self.c_v = self.latents.read(history)
            keys.insert(0, rebuilt_keys(self.attention, c_k, self.positions.angles(history, c_k)))
        return torch.cat(keys, dim=2), torch.cat([self.values, v], dim=2)

    def _keep_exact(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        held = values.shape[2]
        super()._keep_exact(keys[:, :, keys.shape[2] - held :], values, tokens)


def absorbing_cache(module: nn.Module) -> Any:
    """Return a compressed cache out of which no values are rebuilt, for a module of `absorbing`."""
    cache = new_cache(module)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CskvLayer):
            own = _AbsorbingLayer(layer.name, layer.attention, layer.scheme, layer.positions)
            layer.attention.__dict__[ABSORBING] = cache.layers[index] = own
    return cache


def absorbing(module: Any) -> Any:
    """Let a module's attentions read compressed values without rebuilding them; return it."""
    AttentionInterface.register(ABSORBING, _attend)
    AttentionMaskInterface.register(ABSORBING, eager_mask)
    module.set_attn_implementation(ABSORBING)
    return module


def _attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as stock code does, but for compressed values: they are averaged before their second factor."""
    c_v, (batch, heads, tokens, channels) = attention.__dict__[ABSORBING].c_v, query.shape
    kv_heads, seen = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, channels)  # no key or value is copied for query heads
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, tokens, seen) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., :seen]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    history = seen - value.shape[2]
    exact = weights[..., history:].reshape(batch, kv_heads, -1, value.shape[2])
    read = (exact @ value).view(batch, heads, tokens, channels)
    if c_v is not None:
        read = read + attended_values(attention, weights[..., :history], c_v)
    return read.transpose(1, 2).contiguous(), None
