"""What the config of a mixture-of-experts language model says, and what follows from it. Torch-free.

As with other language models the config is kept as it stands; what decides shapes and routing is read and
held against limits, because stock classes learn only in the middle of a forward that a router is asked for
more experts than there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError
from .config_values import MAX_LAYERS, MAX_WIDTH, check_flag, check_integer, check_shared_keys, is_integer
from .language_config import MAX_NUMBER, MAX_POSITIONS, check_padding, class_name_of
from .mapped_routing import KEY, is_mapped, mapping_problem, model_type_of
from .moe_classes import MOE_CLASSES

MAX_EXPERTS = 2**14
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WIDTHS = (
    "num_key_value_heads", "head_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "max_position_embeddings", "decoder_sparse_step", "n_shared_experts", "n_group", "topk_group",
)  # fmt: skip
_MAY_BE_NONE = frozenset({"num_key_value_heads", "head_dim", "q_lora_rank", "n_group", "topk_group"})
_FLAGS = (
    "tie_word_embeddings", "attention_bias", "norm_topk_prob", "qkv_bias", "lm_head_bias", "mlp_bias",
)  # fmt: skip
_METHODS = ("greedy", "group_limited_greedy")
_SPARSE_MIXER_PICKS = 2


@dataclass(frozen=True)
class HeadsShape:
    """An attention with linears for queries, keys and values.

    Attributes:
        qkv_bias, out_bias: which linears have one.
        norms: lengths of the norms of queries and keys; None where there are none.
        sinks: a learned logit per head that attends to nothing.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    norms: tuple[int, int] | None = None
    sinks: bool = False


@dataclass(frozen=True)
class LatentShape:
    """An attention whose keys and values come out of one narrow vector per token.

    Attributes:
        query_rank: channels that queries pass through; None: they are made in one step.
        value_rank: channels of the narrow vector.
        plain, rotary: channels of a head's query and key without and with position.
        value: channels of a head's value.
        bias: the linears from and to the residual stream have one.
    """

    heads: int
    query_rank: int | None
    value_rank: int
    plain: int
    rotary: int
    value: int
    bias: bool


@dataclass(frozen=True)
class Routing:
    """How a router chooses and weighs.

    Attributes:
        experts: how many there are in a layer.
        active: how many a token goes through.
        groups: the experts stand in so many groups of one size; 1: in none.
        open_groups: groups among which a token's experts are chosen.
        least_in_group: what the router needs in each.
        ignores_absent: the weights of the chosen experts do not depend on those that were not, so that
            closing the router's way to some experts and removing them are the same.
        fixed_active: stock code can compute with this number of active experts alone.
        mapped_from: the router weighs so many experts, and a matrix maps that to those that there are;
            None: it weighs those that there are.
    """

    experts: int
    active: int
    groups: int = 1
    open_groups: int = 1
    least_in_group: int = 1
    ignores_absent: bool = True
    fixed_active: int | None = None
    mapped_from: int | None = None


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a decoder with mixtures of experts.

    Attributes:
        inner: channels inside a feed-forward network that is no mixture.
        expert_inner: channels inside an expert.
        shared_inner: channels inside the experts that every token goes through; 0 where there are none.
        shared_name: of them in the block.
        shared_gate: their output is weighed.
        dense: layers that have no mixture.
        positions: the longest sequence.
        tied: the head is the embedding.
        mlp_bias, head_bias, norm_bias: of dense networks and shared experts, of the head, of all norms.
        expert_bias: experts and router have biases, and experts are stored transposed.
        corrected: the router has a correction of its choice, which is no parameter.
    """

    vocabulary: int
    width: int
    layers: int
    positions: int
    inner: int
    expert_inner: int
    attention: HeadsShape | LatentShape
    routing: Routing
    router: str
    dense: frozenset[int]
    shared_inner: int
    shared_name: str
    shared_gate: bool
    tied: bool
    mlp_bias: bool
    head_bias: bool
    norm_bias: bool
    expert_bias: bool
    corrected: bool

    @property
    def sparse(self) -> tuple[int, ...]:
        """Layers that have a mixture, ascending."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense)


def complete_moe_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config and return it as it stands, with `_class_name` as all other configs have it.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    check_shared_keys(config, model_type_of(class_name, config), MAX_NUMBER, where)
    for key in _REQUIRED:
        limit = MAX_LAYERS if key == "num_hidden_layers" else MAX_WIDTH
        check_integer(key, config.get(key), limit, where)
    check_padding(config, where)
    keys = _keys(class_name, config)
    for key in _WIDTHS:
        if key in keys and not (keys[key] is None and key in _MAY_BE_NONE):
            limit = MAX_POSITIONS if key == "max_position_embeddings" else MAX_WIDTH
            check_integer(key, keys[key], limit, where)
    for key in _FLAGS:
        if key in keys:
            check_flag(key, keys[key], where)
    _check_counts(class_name, config, keys, where)
    _check_layers(keys, where)
    full = {"_class_name": class_name, **config}
    shape = moe_shape(full)
    _check_routing(class_name, shape.routing, keys, where)
    _check_attention(shape, where)
    return full


def check_moe_config(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse a config that its checkpoint cannot belong to, before anything of its sizes is built.

    Raises:
        SourceError: naming the first value that is wrong.
    """
    full = complete_moe_config(str(class_name_of(config)), config, where)
    layers = moe_shape(full).layers
    if layers > tensors:
        raise SourceError(f"{where}: num_hidden_layers {layers} with only {tensors} stored tensors")


def expert_count(class_name: str, config: Mapping[str, Any]) -> int:
    """Return how many experts a layer with a mixture has, whichever key says it."""
    known = MOE_CLASSES[class_name]
    given = [config[key] for key in known.counts if key in config]
    return int(given[0] if given else known.defaults[known.counts[0]])


def with_expert_count(config: Mapping[str, Any], experts: int, active: int | None = None) -> dict[str, Any]:
    """Return a config that says another number of experts wherever it says one.

    Args:
        config: completed, with `_class_name`.
        experts: that each layer with a mixture is left with.
        active: experts per token; None: as it is.
    """
    known = MOE_CLASSES[config["_class_name"]]
    changed = dict(config)
    for key in known.counts:
        if key in config or key in known.written:
            changed[key] = experts
    if active is not None:
        changed["num_experts_per_tok"] = active
    return changed


def moe_shape(config: Mapping[str, Any]) -> MoeShape:
    """Return the sizes that a config implies.

    Args:
        config: of `complete_moe_config`.
    """
    name = config["_class_name"]
    keys, kind = _keys(name, config), MOE_CLASSES[name].model_type
    layers, width = int(config["num_hidden_layers"]), int(config["hidden_size"])
    expert_inner = int(keys.get(MOE_CLASSES[name].inner, config["intermediate_size"]))
    several = int(keys.get("n_shared_experts", 0)) * expert_inner
    return MoeShape(
        vocabulary=int(config["vocab_size"]),
        width=width,
        layers=layers,
        positions=int(keys["max_position_embeddings"]),
        inner=int(config["intermediate_size"]),
        expert_inner=expert_inner,
        attention=_attention(name, config, keys),
        routing=_routing(name, config, keys),
        router=MOE_CLASSES[name].router,
        dense=_dense_layers(layers, keys),
        shared_inner=int(keys.get("shared_expert_intermediate_size", several)),
        shared_name="shared_expert" if kind == "qwen2_moe" else "shared_experts",
        shared_gate=kind == "qwen2_moe",
        tied=bool(keys["tie_word_embeddings"]),
        mlp_bias=bool(keys.get("mlp_bias", False)),
        head_bias=bool(keys.get("lm_head_bias", False)),
        norm_bias=kind == "phimoe",
        expert_bias=kind == "gpt_oss",
        corrected=kind == "deepseek_v3",
    )


def _keys(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {key: config.get(key, default) for key, default in MOE_CLASSES[class_name].defaults.items()}
    # Other keys are read by stock code where a config has them, though its class does not declare them.
    if "head_dim" in config and "qk_rope_head_dim" not in keys:
        keys["head_dim"] = config["head_dim"]
    return keys


def _dense_layers(layers: int, keys: Mapping[str, Any]) -> frozenset[int]:
    first = int(keys.get("first_k_dense_replace", 0))
    step, named = int(keys.get("decoder_sparse_step", 1)), keys.get("mlp_only_layers") or ()
    return frozenset(
        layer for layer in range(layers) if layer < first or layer in named or (layer + 1) % step
    )


def _attention(name: str, config: Mapping[str, Any], keys: Mapping[str, Any]) -> HeadsShape | LatentShape:
    heads, kind = int(config["num_attention_heads"]), MOE_CLASSES[name].model_type
    if "kv_lora_rank" in keys:
        rank = keys["q_lora_rank"]
        return LatentShape(
            heads=heads, query_rank=None if rank is None else int(rank), value_rank=int(keys["kv_lora_rank"]),
            plain=int(keys["qk_nope_head_dim"]), rotary=int(keys["qk_rope_head_dim"]),
            value=int(keys["v_head_dim"]), bias=bool(keys["attention_bias"]),
        )  # fmt: skip
    width, kv_heads = int(config["hidden_size"]), int(keys["num_key_value_heads"] or heads)
    head_dim = int(keys.get("head_dim") or width // heads)
    bias = bool(keys["attention_bias"]) and kind not in ("mixtral", "qwen2_moe")
    norms = None
    if kind == "qwen3_moe":
        norms = (head_dim, head_dim)
    elif kind == "olmoe":
        norms = (width, width // heads * kv_heads)
    return HeadsShape(
        heads, kv_heads, head_dim, qkv_bias=bias or bool(keys.get("qkv_bias", False)), out_bias=bias,
        norms=norms, sinks=kind == "gpt_oss",
    )  # fmt: skip


def _routing(name: str, config: Mapping[str, Any], keys: Mapping[str, Any]) -> Routing:
    kind = MOE_CLASSES[name].model_type
    grouped = kind == "deepseek_v3" or keys.get("topk_method") == "group_limited_greedy"
    return Routing(
        experts=expert_count(name, config),
        active=int(keys["num_experts_per_tok"] or 0),
        groups=int(keys["n_group"] or 1) if grouped else 1,
        open_groups=int(keys["topk_group"] or 1) if grouped else 1,
        least_in_group=2 if kind == "deepseek_v3" else 1,
        ignores_absent=kind in ("mixtral", "gpt_oss", "deepseek_v3")
        or (kind in ("qwen2_moe", "qwen3_moe", "olmoe") and bool(keys["norm_topk_prob"])),
        fixed_active=_SPARSE_MIXER_PICKS if kind == "phimoe" else None,
        mapped_from=int(config[KEY]) if is_mapped(config) else None,
    )


def _check_counts(class_name: str, config: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> None:
    given = {key: config[key] for key in MOE_CLASSES[class_name].counts if key in config}
    for key, value in given.items():
        check_integer(key, value, MAX_EXPERTS, where)
    if len(set(given.values())) > 1:
        said = ", ".join(f"{key} {value}" for key, value in given.items())
        raise SourceError(f"{where}: {said} are to say the same number of experts")
    check_integer("num_experts_per_tok", keys["num_experts_per_tok"], MAX_EXPERTS, where)
    if is_mapped(config):
        _check_mapped(class_name, config, where)


def _check_mapped(class_name: str, config: Mapping[str, Any], where: str) -> None:
    check_integer(KEY, config[KEY], MAX_EXPERTS, where)
    problem = mapping_problem({**config, "_class_name": class_name})
    if problem:
        raise SourceError(f"{where}: {KEY}: {problem}", hint="the config was changed by hand")
    count = expert_count(class_name, config)
    if config[KEY] < count:
        raise SourceError(
            f"{where}: {KEY} {config[KEY]}: routers weigh fewer experts than the {count} that there are",
            hint="the config was changed by hand, or is damaged",
        )


def _check_layers(keys: Mapping[str, Any], where: str) -> None:
    if not is_integer(keys.get("first_k_dense_replace", 0), 0, MAX_LAYERS):
        value = keys["first_k_dense_replace"]
        raise SourceError(f"{where}: first_k_dense_replace: {value!r} is not a number of layers")
    named = keys.get("mlp_only_layers")
    if named is not None and not (
        isinstance(named, list) and all(is_integer(layer, 0, MAX_LAYERS) for layer in named)
    ):
        raise SourceError(f"{where}: mlp_only_layers: {named!r} is not a list of layers")
    method = keys.get("topk_method", "greedy")
    if method not in _METHODS:
        raise SourceError(f"{where}: topk_method: {method!r} is not one of {', '.join(_METHODS)}")


def _check_routing(class_name: str, routing: Routing, keys: Mapping[str, Any], where: str) -> None:
    problem = routing_problem(routing)
    if problem:
        raise SourceError(f"{where}: {problem}", hint="the config was changed by hand, or is damaged")
    if routing.groups > 1 and routing.open_groups > routing.groups:
        raise SourceError(f"{where}: topk_group {routing.open_groups} of n_group {routing.groups} groups")
    if class_name == "DeepseekV3ForCausalLM" and None in (keys["n_group"], keys["topk_group"]):
        raise SourceError(f"{where}: n_group and topk_group: {class_name} needs both")


def routing_problem(routing: Routing) -> str | None:
    """Return why stock code could not route so, as a sentence without an end; None where it can."""
    if routing.active > routing.experts:
        return f"{routing.active} experts per token, of {routing.experts} experts"
    if routing.fixed_active not in (None, routing.active):
        return f"{routing.active} experts per token; this kind of router picks {routing.fixed_active}"
    if routing.experts % routing.groups:
        return f"{routing.experts} experts do not stand in {routing.groups} groups of one size"
    size = routing.experts // routing.groups
    if size < routing.least_in_group:
        return f"{size} expert in each of {routing.groups} groups; the router needs {routing.least_in_group}"
    if routing.open_groups * size < routing.active:
        return (
            f"{routing.active} experts per token, of the {routing.open_groups * size} in the"
            f" {routing.open_groups} groups that a token may use"
        )
    return None


def _check_attention(shape: MoeShape, where: str) -> None:
    attention = shape.attention
    if isinstance(attention, LatentShape):
        dims, channels = attention.rotary, attention.heads * (attention.plain + attention.rotary)
    else:
        dims, channels = attention.head_dim, attention.heads * attention.head_dim
        if attention.heads % attention.kv_heads:
            raise SourceError(
                f"{where}: num_key_value_heads {attention.kv_heads} does not divide num_attention_heads"
                f" {attention.heads}"
            )
    if dims < 2 or dims % 2:
        raise SourceError(f"{where}: {dims} channels of a head are not even, as rotary positions need them")
    if channels > MAX_WIDTH:
        raise SourceError(f"{where}: all heads together have {channels} channels; at most {MAX_WIDTH}")
