"""What the config of a language model may say, and what follows from it. Torch-free.

A config of transformers is kept as it stands: what it says about positions, windows or tokens is no
concern of ours and must reach the exported folder unchanged. Only what decides shapes is read here,
and held against limits, because a config is untrusted input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError
from .config_values import MAX_LAYERS, MAX_WIDTH, check_flag, check_integer, check_shared_keys
from .mapped_routing import STOCK_CLASSES
from .moe_classes import is_moe_class
from .sam_sizes import CLASS_OF_TYPE

MAX_POSITIONS = 2**24
MAX_NUMBER = 2.0**40  # bases of rotary positions, ids, windows

_OPTIONAL: dict[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
# Of every class: its model_type, and the stock defaults of what decides shapes and may be left out.
LANGUAGE_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "LlamaForCausalLM": ("llama", _OPTIONAL),
    "MistralForCausalLM": (
        "mistral", {**_OPTIONAL, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}
    ),
    "Qwen2ForCausalLM": (
        "qwen2", {**_OPTIONAL, "num_key_value_heads": 32, "max_position_embeddings": 32768}
    ),
    "Qwen3ForCausalLM": (
        "qwen3",
        {**_OPTIONAL, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    ),
}  # fmt: skip
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
# They choose code instead of a structure: kernels, classes of the repository's own.
_CODE = frozenset({"attn_implementation", "auto_map", "experts_implementation"})
_RENAMED: Mapping[str, str] = {
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    **STOCK_CLASSES,
}  # by checkpoints with code of their own
_INTERNAL = "_internal"  # behind a leading underscore: how stock code keeps its choice
_NOT_STRUCTURE = _CODE | {"architectures", "quantization_config", "per_layer_config", "transformers_weights"}


@dataclass(frozen=True)
class LanguageShape:
    """The sizes of a decoder with gated feed-forward networks.

    Attributes:
        head_dim: channels of a head; heads * head_dim need not be `width`.
        qkv_bias, out_bias, mlp_bias: which linears have one.
        head_norms: queries and keys are normalised per head.
        positions: the longest sequence.
        tied: the head is the embedding.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    tied: bool


def is_language_class(class_name: object) -> bool:
    """Tell whether a stock class is a language model that is supported, a mixture of experts or not."""
    return is_moe_class(class_name) or (isinstance(class_name, str) and class_name in LANGUAGE_CLASSES)


def class_name_of(config: Mapping[str, Any]) -> str | None:
    """Return the stock class that a config.json names: its `_class_name`, or the first of `architectures`.

    Without either it is what the `model_type` can only mean, where there is such a class.
    """
    given = config.get("_class_name")
    architectures = config.get("architectures")
    if not given and isinstance(architectures, list) and architectures:
        given = architectures[0]
    model_type = config.get("model_type")
    if not given and isinstance(model_type, str):
        given = CLASS_OF_TYPE.get(model_type)
    return _RENAMED.get(given, given) if isinstance(given, str) and given else None


def complete_language_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config and return it as it stands, with `_class_name` as all other configs have it.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    model_type = LANGUAGE_CLASSES[class_name][0]
    check_shared_keys(config, model_type, MAX_NUMBER, where)
    for key in _REQUIRED:
        limit = MAX_LAYERS if key == "num_hidden_layers" else MAX_WIDTH
        check_integer(key, config.get(key), limit, where)
    shape_keys = _structural(class_name, config)
    for key in ("num_key_value_heads", "head_dim"):
        if shape_keys[key] is not None:
            check_integer(key, shape_keys[key], MAX_WIDTH, where)
    check_integer("max_position_embeddings", shape_keys["max_position_embeddings"], MAX_POSITIONS, where)
    check_padding(config, where)
    for key in _FLAGS:
        check_flag(key, shape_keys[key], where)
    full = {"_class_name": class_name, **config}
    _check_relations(language_shape(full), where)
    return full


def language_shape(config: Mapping[str, Any]) -> LanguageShape:
    """Return the sizes that a config implies.

    Args:
        config: of `complete_language_config`.
    """
    class_name = config["_class_name"]
    keys = _structural(class_name, config)
    heads = int(config["num_attention_heads"])
    has_bias_key = class_name in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    bias = bool(keys["attention_bias"]) and has_bias_key
    return LanguageShape(
        vocabulary=int(config["vocab_size"]),
        width=int(config["hidden_size"]),
        inner=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(keys["num_key_value_heads"] or heads),
        head_dim=int(keys["head_dim"] or config["hidden_size"] // heads),
        positions=int(keys["max_position_embeddings"]),
        qkv_bias=bias or class_name == "Qwen2ForCausalLM",
        out_bias=bias,
        mlp_bias=bool(keys["mlp_bias"]) and class_name == "LlamaForCausalLM",
        head_norms=class_name == "Qwen3ForCausalLM",
        tied=bool(keys["tie_word_embeddings"]),
    )


def tied_head(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the head of a language model where it is the embedding: copy -> stored name."""
    tied = config.get("tie_word_embeddings", False)
    return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what makes stock code fetch or run other code than its own."""
    return {
        key: without_code(value) if isinstance(value, dict) else value  # parts have configs of their own
        for key, value in config.items()
        if key.strip("_").removesuffix(_INTERNAL) not in _CODE
    }


def structural_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the stock config class may be given; nothing that makes it fetch or run other code."""
    return {
        key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_STRUCTURE
    }


def check_language_config(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse a config that its checkpoint cannot belong to, before anything of its sizes is built.

    Args:
        config: config.json of a folder.
        tensors: how many the folder stores.
        where: for the message.

    Raises:
        SourceError: naming the first value that is wrong.
    """
    full = complete_language_config(str(class_name_of(config)), config, where)
    layers = language_shape(full).layers
    if layers > tensors:
        raise SourceError(f"{where}: num_hidden_layers {layers} with only {tensors} stored tensors")


def _structural(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config.get(key, default) for key, default in LANGUAGE_CLASSES[class_name][1].items()}


def check_padding(config: Mapping[str, Any], where: str) -> None:
    """Hold the id of the padding, which stock classes index the embedding with, against the vocabulary."""
    value, size = config.get("pad_token_id"), int(config["vocab_size"])
    # Stock code counts a negative one from the end, as -1 in many older configs.
    if value is not None and (type(value) is not int or not -size <= value < size):
        raise SourceError(
            f"{where}: pad_token_id: {value!r} is no id of a vocabulary of {size}",
            hint="the config was changed by hand, or belongs to other weights; null means no padding",
        )


def _check_relations(shape: LanguageShape, where: str) -> None:
    if shape.heads % shape.kv_heads:
        raise SourceError(
            f"{where}: num_key_value_heads {shape.kv_heads} does not divide num_attention_heads {shape.heads}"
        )
    if shape.head_dim < 2 or shape.head_dim % 2:
        raise SourceError(f"{where}: head_dim {shape.head_dim} is not even, as rotary positions need it")
    if shape.heads * shape.head_dim > MAX_WIDTH:
        raise SourceError(
            f"{where}: num_attention_heads * head_dim = {shape.heads * shape.head_dim}; at most {MAX_WIDTH}"
        )
