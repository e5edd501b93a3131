"""The tensors that a config implies, without importing torch.

Importing diffusers takes seconds; a checkpoint whose shapes do not fit its config must be refused in
less. So the constructors' arithmetic stands here once more, and a test holds it against the stock
classes on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import SourceError

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

MAX_WIDTH = 2**20
MAX_LAYERS = 2**12
MAX_TOKENS = 2**18
TIMESTEP_CHANNELS = 256

_DIT_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None,
    "num_layers": 28, "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": 32,
    "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "upcast_attention": False, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}  # fmt: skip
_PIXART_DEFAULTS: dict[str, Any] = {
    **_DIT_DEFAULTS, "out_channels": 8, "cross_attention_dim": 1152, "sample_size": 128,
    "norm_type": "ada_norm_single", "norm_eps": 1e-6, "interpolation_scale": None,
    "use_additional_conditions": None, "caption_channels": None, "attention_type": "default",
}  # fmt: skip
_SD3_DEFAULTS: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
    "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96,
    "dual_attention_layers": (), "qk_norm": None,
}  # fmt: skip

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DiTTransformer2DModel": _DIT_DEFAULTS,
    "PixArtTransformer2DModel": _PIXART_DEFAULTS,
    "SD3Transformer2DModel": _SD3_DEFAULTS,
}
PERSISTENT_BUFFERS: Mapping[str, frozenset[str]] = {
    "SD3Transformer2DModel": frozenset({"pos_embed.pos_embed"}),
}
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu", "gelu-approximate", "geglu"),
    "attention_type": ("default",),
    "qk_norm": (None, "rms_norm"),
}
_OPTIONAL_WIDTHS = ("out_channels", "cross_attention_dim", "caption_channels")


def complete_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config's values and fill in the stock class's defaults.

    Keys that the stock class does not take (left over from older library versions) are dropped, as
    the stock class does.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    defaults = DEFAULTS[class_name]
    full = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in full.items():
        _check_value(class_name, key, value, where)
    _check_relations(class_name, full, where)
    if isinstance(full.get("dual_attention_layers"), list):
        full["dual_attention_layers"] = tuple(full["dual_attention_layers"])
    kept = {key: config[key] for key in ("_diffusers_version",) if key in config}
    return {"_class_name": class_name, **kept, **full}


def expected_shapes(class_name: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the state dict's names and shapes, persistent buffers included.

    Args:
        class_name: a key of `DEFAULTS`.
        config: completed by `complete_config`.
    """
    return dict(_BUILDERS[class_name](config))


def _check_value(class_name: str, key: str, value: Any, where: str) -> None:
    default = DEFAULTS[class_name][key]
    if key in _ALLOWED:
        if value not in _ALLOWED[key]:
            raise SourceError(f"{where}: {key}: {value!r} is not supported; supported: {_ALLOWED[key]}")
    elif key == "norm_type":
        if value != default:
            raise SourceError(f"{where}: norm_type: {value!r} is not {default!r}, which {class_name} needs")
    elif key == "dual_attention_layers":
        if not isinstance(value, list | tuple) or not all(_is_int(item, 0, MAX_LAYERS) for item in value):
            raise SourceError(f"{where}: {key}: {value!r} is not a list of block indices")
    elif isinstance(default, bool) or key == "use_additional_conditions":
        if not isinstance(value, bool) and not (value is None and default is None):
            raise SourceError(f"{where}: {key}: {value!r} is not true or false")
    elif isinstance(default, int) or key in _OPTIONAL_WIDTHS:
        _check_width(key, value, where)


def _check_width(key: str, value: Any, where: str) -> None:
    if value is None and key in _OPTIONAL_WIDTHS:
        return
    limit = MAX_LAYERS if key == "num_layers" else MAX_WIDTH
    if not _is_int(value, 1, limit):
        raise SourceError(f"{where}: {key}: {value!r} is not an integer from 1 to {limit}")


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_relations(class_name: str, config: Mapping[str, Any], where: str) -> None:
    sample, patch = config["sample_size"], config["patch_size"]
    if sample % patch:
        raise SourceError(f"{where}: patch_size {patch} does not divide sample_size {sample}")
    side = max(sample // patch, config.get("pos_embed_max_size", 1))
    if side * side > MAX_TOKENS:
        raise SourceError(f"{where}: sample_size {sample} makes {side * side} tokens; at most {MAX_TOKENS}")
    width = _width(config)
    if width > MAX_WIDTH:
        raise SourceError(f"{where}: num_attention_heads * attention_head_dim = {width}; at most {MAX_WIDTH}")
    if class_name == "SD3Transformer2DModel" and config["caption_projection_dim"] != width:
        raise SourceError(
            f"{where}: caption_projection_dim {config['caption_projection_dim']} is not the width {width}"
        )


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def uses_additional_conditions(config: Mapping[str, Any]) -> bool:
    """Tell whether a PixArt model takes resolution and aspect ratio (the stock class's rule)."""
    given = config["use_additional_conditions"]
    return bool(config["sample_size"] == 128 if given is None else given)


def _linear(name: str, out_features: int, in_features: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _mlp(name: str, width: int, in_features: int) -> Named:
    yield from _linear(f"{name}.linear_1", width, in_features)
    yield from _linear(f"{name}.linear_2", width, width)


def _affine(name: str, width: int, present: bool) -> Named:
    if present:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)


def _patches(config: Mapping[str, Any], width: int) -> Named:
    patch = config["patch_size"]
    yield "pos_embed.proj.weight", (width, config["in_channels"], patch, patch)
    yield "pos_embed.proj.bias", (width,)


def _pixels(config: Mapping[str, Any]) -> int:
    out_channels = config["out_channels"] or config["in_channels"]
    return int(config["patch_size"] ** 2 * out_channels)


def _attention(name: str, width: int, source_width: int, bias: bool) -> Named:
    yield from _linear(f"{name}.to_q", width, width, bias)
    yield from _linear(f"{name}.to_k", width, source_width, bias)
    yield from _linear(f"{name}.to_v", width, source_width, bias)
    yield from _linear(f"{name}.to_out.0", width, width)


def _feed_forward(name: str, width: int, gated: bool = False) -> Named:
    yield from _linear(f"{name}.net.0.proj", width * (8 if gated else 4), width)
    yield from _linear(f"{name}.net.2", width, width * 4)


def _dit(config: Mapping[str, Any]) -> Named:
    width, affine = _width(config), config["norm_elementwise_affine"]
    yield from _patches(config, width)
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        yield from _mlp(f"{block}.norm1.emb.timestep_embedder", width, TIMESTEP_CHANNELS)
        classes = config["num_embeds_ada_norm"] + 1  # the last one is the null class of guidance
        yield f"{block}.norm1.emb.class_embedder.embedding_table.weight", (classes, width)
        yield from _linear(f"{block}.norm1.linear", 6 * width, width)
        yield from _attention(f"{block}.attn1", width, width, config["attention_bias"])
        yield from _affine(f"{block}.norm3", width, affine)
        yield from _feed_forward(f"{block}.ff", width, config["activation_fn"] == "geglu")
    yield from _linear("proj_out_1", 2 * width, width)
    yield from _linear("proj_out_2", _pixels(config), width)


def _pixart(config: Mapping[str, Any]) -> Named:
    width, bias = _width(config), config["attention_bias"]
    yield "scale_shift_table", (2, width)
    yield from _patches(config, width)
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        yield f"{block}.scale_shift_table", (6, width)
        yield from _affine(f"{block}.norm1", width, config["norm_elementwise_affine"])
        yield from _attention(f"{block}.attn1", width, width, bias)
        yield from _affine(f"{block}.norm2", width, config["norm_elementwise_affine"])
        if config["cross_attention_dim"] is not None:
            yield from _attention(f"{block}.attn2", width, config["cross_attention_dim"], bias)
        yield from _feed_forward(f"{block}.ff", width, config["activation_fn"] == "geglu")
    yield from _linear("proj_out", _pixels(config), width)
    yield from _mlp("adaln_single.emb.timestep_embedder", width, TIMESTEP_CHANNELS)
    if uses_additional_conditions(config):
        for name in ("resolution_embedder", "aspect_ratio_embedder"):
            yield from _mlp(f"adaln_single.emb.{name}", width // 3, TIMESTEP_CHANNELS)
    yield from _linear("adaln_single.linear", 6 * width, width)
    if config["caption_channels"] is not None:
        yield from _mlp("caption_projection", width, config["caption_channels"])


def _sd3(config: Mapping[str, Any]) -> Named:
    width = _width(config)
    yield "pos_embed.pos_embed", (1, config["pos_embed_max_size"] ** 2, width)
    yield from _patches(config, width)
    yield from _mlp("time_text_embed.timestep_embedder", width, TIMESTEP_CHANNELS)
    yield from _mlp("time_text_embed.text_embedder", width, config["pooled_projection_dim"])
    yield from _linear("context_embedder", config["caption_projection_dim"], config["joint_attention_dim"])
    for index in range(config["num_layers"]):
        yield from _sd3_block(config, index, width)
    yield from _linear("norm_out.linear", 2 * width, width)
    yield from _linear("proj_out", _pixels(config), width)


def _sd3_block(config: Mapping[str, Any], index: int, width: int) -> Named:
    block, last = f"transformer_blocks.{index}", index == config["num_layers"] - 1
    dual = index in config["dual_attention_layers"]
    yield from _linear(f"{block}.norm1.linear", (9 if dual else 6) * width, width)
    yield from _linear(f"{block}.norm1_context.linear", (2 if last else 6) * width, width)
    norms = ("norm_q", "norm_k") if config["qk_norm"] else ()
    head_dim = config["attention_head_dim"]
    for name in (*norms, *(("norm_added_q", "norm_added_k") if norms else ())):
        yield f"{block}.attn.{name}.weight", (head_dim,)
    yield from _attention(f"{block}.attn", width, width, True)
    for name in ("add_k_proj", "add_v_proj", "add_q_proj") + (() if last else ("to_add_out",)):
        yield from _linear(f"{block}.attn.{name}", width, width)
    if dual:
        for name in norms:
            yield f"{block}.attn2.{name}.weight", (head_dim,)
        yield from _attention(f"{block}.attn2", width, width, True)
    yield from _feed_forward(f"{block}.ff", width)
    if not last:
        yield from _feed_forward(f"{block}.ff_context", width)


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], Named]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
}
