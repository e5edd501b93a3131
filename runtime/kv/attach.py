"""Give a stock language model a compressed cache: factors below its attentions, a hook, and generate().

No attention is subclassed. A forward without a cache, or with another cache, computes what it did before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationMode

from ...errors import PlanError, SourceError, UsageError
from .cache import CskvCache, cache_of, stock_layers
from .factors import Factor, Factors
from .rebuild import factors_below, rotation_of
from .scheme import FACTORS, KvCacheScheme, KvLayer
from .support import unsupported

__all__ = ["Factor", "Factors", "factors_of", "kv_scheme_of", "new_cache", "put_kv_cache", "remove_kv_cache"]

_SCHEME = "_kv_cache_scheme"
_PREPARE = "_prepare_cache_for_generation"
_STOCK = "pass past_key_values=DynamicCache() of transformers to generate() for the uncompressed cache"


def put_kv_cache(module: Any, scheme: KvCacheScheme) -> None:
    """Put factors, all zero, below the attentions of a scheme, and let generate() use the compressed cache.

    Args:
        module: a causal language model of transformers, on any device, meta included.
        scheme: names of its attentions, and their ranks.

    Raises:
        PlanError: the architecture cannot have such a cache, or has one already.
        SourceError: the scheme does not fit, naming the attention.
    """
    if kv_scheme_of(module) is not None:
        raise PlanError(
            "the model has a compressed cache already", hint="remove_kv_cache(model) takes it away"
        )
    class_name = _stock_class(module)
    reason = unsupported({**module.config.to_dict(), "_class_name": class_name})
    if reason is not None:
        raise PlanError(f"{class_name}: {reason}")
    attentions = {name: _checked(module, name, layer) for name, layer in scheme.layers.items()}
    for name, attention in attentions.items():
        factors = Factors(scheme.layers[name], _dtype(module, attention), _device(attention))
        attention.add_module(FACTORS, factors.train(attention.training))
        attention.register_forward_pre_hook(_stage, with_kwargs=True)
    setattr(module, _SCHEME, scheme)
    setattr(module, _PREPARE, _Prepare(module))


def kv_scheme_of(module: nn.Module) -> KvCacheScheme | None:
    """Return the scheme of a model's compressed cache; None where it has none."""
    return getattr(module, _SCHEME, None)


def factors_of(module: nn.Module) -> dict[str, Factors]:
    """Return the factors of every compressed attention, by its name."""
    scheme = kv_scheme_of(module)
    names = () if scheme is None else scheme.layers
    return {name: factors_below(module.get_submodule(name)) for name in names}


def remove_kv_cache(module: nn.Module) -> None:
    """Take factors and hooks away again; a model without them stays as it is."""
    for name in factors_of(module):
        attention = module.get_submodule(name)
        delattr(attention, FACTORS)
        for key, hook in list(attention._forward_pre_hooks.items()):
            if hook is _stage:
                del attention._forward_pre_hooks[key]
                attention._forward_pre_hooks_with_kwargs.pop(key, None)
    for attribute in (_SCHEME, _PREPARE):
        module.__dict__.pop(attribute, None)


def new_cache(module: nn.Module) -> CskvCache:
    """Return an empty compressed cache for one conversation.

    Raises:
        UsageError: the model has no factors.
    """
    scheme = kv_scheme_of(module)
    if scheme is None:
        raise UsageError(
            f"this {type(module).__name__} has no compressed cache",
            hint="open one that was compressed by a stage `cskv` with compress.load",
        )
    return cache_of(module, scheme, _rotary(module))


def _stage(attention: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Compress the input of an attention that is about to use a compressed cache."""
    given = (*arguments, *keywords.values())
    cache = next((value for value in given if isinstance(value, CskvCache)), None)
    if cache is not None:
        x = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        cache.stage(attention, x, keywords.get("position_ids"))


class _Prepare:
    """Stands before the stock method that makes a cache for generate().

    An object that holds the model, and no bound method: copies and pickles of the model hold their own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        *others: Any,
        **named: Any,
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if generation_config.use_cache is not False and (given is None or isinstance(given, CskvCache)):
            _check_generation(generation_config, generation_mode)
            if given is None:
                model_kwargs["past_key_values"] = new_cache(self.module)
                return
        stock = getattr(type(self.module), _PREPARE)
        stock(self.module, generation_config, model_kwargs, generation_mode, *others, **named)


def _check_generation(generation_config: Any, mode: Any) -> None:
    """Refuse ways of generating that a compressed cache does not serve.

    Raises:
        UsageError: naming the way.
    """
    kind = generation_config.cache_implementation
    if kind not in (None, "dynamic"):
        raise UsageError(
            f"cache_implementation={kind!r} does not go with the compressed cache: leave it out; or {_STOCK}"
        )
    if mode == GenerationMode.ASSISTED_GENERATION or getattr(generation_config, "is_assistant", False):
        raise UsageError(
            "assisted decoding takes tokens back, which a compressed cache cannot: leave the assistant out;"
            f" or {_STOCK}"
        )


def _stock_class(module: nn.Module) -> str:
    """Name of the class of transformers that a model is, or that its class derives from."""
    kinds = (kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "transformers")
    return next(kinds, type(module)).__name__


def _checked(module: Any, name: str, layer: KvLayer) -> nn.Module:
    """Return the attention of a name, after a look at its sizes."""
    try:
        attention = module.get_submodule(name)
    except AttributeError as error:
        raise SourceError(f"kv_cache: there is no module {name} in this {type(module).__name__}") from error
    missing = [
        part for part in ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx") if not hasattr(attention, part)
    ]
    if missing:
        raise SourceError(f"kv_cache: {name} is a {type(attention).__name__} without {', '.join(missing)}")
    for part in ("k_proj", "v_proj"):
        projection: Any = getattr(attention, part)
        found = int(projection.in_features), int(projection.out_features)
        if found != (layer.hidden, layer.width):
            raise SourceError(
                f"kv_cache: {name} has hidden {layer.hidden} and width {layer.width} there; the model's"
                f" {part} has {found[0]} and {found[1]}"
            )
    if stock_layers(module)[attention.layer_idx].is_sliding:
        raise SourceError(f"kv_cache: {name} attends to a sliding window, and its cache cannot be compressed")
    rotation_of(attention)
    return attention


def _dtype(module: nn.Module, attention: nn.Module) -> torch.dtype:
    """The floating-point type of an attention; of the whole model where its weights are integers."""
    weight = getattr(attention.k_proj, "weight", None)
    for tensor in (weight, *module.parameters()):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def _device(attention: nn.Module) -> torch.device:
    for tensors in (attention.parameters(), attention.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.get_default_device()


def _rotary(module: nn.Module) -> nn.Module:
    return module.get_submodule(f"{module.base_model_prefix}.rotary_emb")
