"""Which models and which of their layers can have a compressed cache, read from a config. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..language_config import class_name_of, is_language_class, language_shape
from ..moe_classes import is_moe_class
from ..moe_config import HeadsShape, moe_shape

_ATTENTION = "model.layers.{}.self_attn"
# Of rotary positions whose frequencies are the same however long the text is.
_STEADY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class KvAttention:
    """An attention whose cache can be compressed.

    Attributes:
        name: of the module.
        hidden: channels of its input, h.
        kv_heads: heads of keys and values.
        head_dim: channels of a head.
    """

    name: str
    hidden: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of all its keys, and of all its values, h_kv."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Skipped:
    """An attention that keeps its stock cache.

    Attributes:
        name: of the module.
        why: as a sentence without its end.
        width: channels of all its keys, and of all its values.
        sliding_window: latest tokens that it attends to; None: all.
    """

    name: str
    why: str
    width: int
    sliding_window: int | None


@dataclass(frozen=True)
class Attentions:
    """The attentions of a model, in forward order."""

    compressible: tuple[KvAttention, ...]
    skipped: tuple[Skipped, ...]


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Return why no layer of a model can have a compressed cache; None where some can.

    Args:
        config: config.json, of any class.
    """
    name = class_name_of(config)
    if not is_language_class(name):
        return f"a compressed cache needs a causal language model that is supported, and {name} is none"
    config = {**config, "_class_name": name}
    if is_moe_class(name) and not isinstance(moe_shape(config).attention, HeadsShape):
        return "its attention is multi-head latent (MLA): it caches one narrow vector per token already"
    if config.get("num_kv_shared_layers") or config.get("kv_sharing_modes"):
        return "its layers share keys and values, so that a layer's cache is not made of its own input"
    reason = _rotary_problem(config)
    if reason is None and not _attentions(config).compressible:
        reason = "all its layers attend to a sliding window, and their stock caches hold no more than that"
    return reason


def layers_of(config: Mapping[str, Any]) -> Attentions:
    """Return which attentions can be compressed, and why others cannot.

    Args:
        config: of a model for which `unsupported` has no reason.
    """
    return _attentions({**config, "_class_name": class_name_of(config)})


def _rotary_problem(config: Mapping[str, Any]) -> str | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _STEADY:
        return (
            f"its rotary positions are of type {kind!r}, whose frequencies change with a text's length:"
            " keys rebuilt out of the cache would be rotated otherwise than those that are kept"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        return f"it rotates a part of a head's channels alone (partial_rotary_factor {partial})"
    return None


def _attentions(config: Mapping[str, Any]) -> Attentions:
    shape = moe_shape(config) if is_moe_class(config["_class_name"]) else language_shape(config)
    heads: Any = getattr(shape, "attention", shape)
    width = heads.kv_heads * heads.head_dim
    windows = _windows(config, shape.layers)
    compressible, skipped = [], []
    for index, window in enumerate(windows):
        name = _ATTENTION.format(index)
        if window is None:
            compressible.append(KvAttention(name, shape.width, heads.kv_heads, heads.head_dim))
        else:
            why = f"it attends to the last {window} tokens alone, and its stock cache holds no more"
            skipped.append(Skipped(name, why, width, window))
    return Attentions(tuple(compressible), tuple(skipped))


def _windows(config: Mapping[str, Any], layers: int) -> list[int | None]:
    """Tokens that each layer attends to, as the stock config classes understand a config; None: all."""
    name = config["_class_name"]
    default = {"MistralForCausalLM": 4096, "GptOssForCausalLM": 128}.get(name)
    if name.startswith("Qwen"):
        default = 4096
        if not config.get("use_sliding_window", False):
            return [None] * layers
    window = config.get("sliding_window", default)
    if window is None:
        return [None] * layers
    kinds = config.get("layer_types") or _default_kinds(name, config, layers)
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def _default_kinds(name: str, config: Mapping[str, Any], layers: int) -> list[str]:
    """Which layers slide by the stock class, where a config with a window has no `layer_types`."""
    first = int(config.get("max_window_layers", 28))

    def slides(index: int) -> bool:
        if name == "GptOssForCausalLM":
            return index % 2 == 0
        if name == "Qwen2MoeForCausalLM":
            return index % 2 == 0 and index < first
        return index >= first if name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") else True

    return ["sliding_attention" if slides(index) else "full_attention" for index in range(layers)]
