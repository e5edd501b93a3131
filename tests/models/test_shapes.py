"""The torch-free arithmetic of shapes against the stock classes themselves."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from compress.errors import SourceError
from compress.models.registry import family_for
from compress.models.shapes import DEFAULTS, PERSISTENT_BUFFERS, complete_config, expected_shapes

SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "sample_size": 8}
SD3 = {
    **SMALL, "joint_attention_dim": 12, "caption_projection_dim": 24, "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}  # fmt: skip
UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": [2, 4],
    "cross_attention_dim": 12, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SDXL_TURBO = Path(__file__).parent / "data" / "sdxl_turbo" / "unet"
CASES = [
    ("DiTTransformer2DModel", {}),
    ("DiTTransformer2DModel", SMALL),
    (
        "DiTTransformer2DModel",
        SMALL | {"out_channels": 8, "attention_bias": False, "norm_elementwise_affine": True},
    ),
    ("DiTTransformer2DModel", SMALL | {"activation_fn": "geglu", "num_embeds_ada_norm": 7, "patch_size": 4}),
    ("DiTTransformer2DModel", SMALL | {"activation_fn": "gelu", "in_channels": 1}),
    ("PixArtTransformer2DModel", {"num_layers": 3, "caption_channels": 4096}),
    (
        "PixArtTransformer2DModel",
        SMALL | {"cross_attention_dim": 20, "caption_channels": 16, "out_channels": None},
    ),
    (
        "PixArtTransformer2DModel",
        SMALL | {"use_additional_conditions": True, "norm_elementwise_affine": True},
    ),
    ("PixArtTransformer2DModel", SMALL | {"cross_attention_dim": None, "attention_bias": False}),
    ("PixArtTransformer2DModel", SMALL | {"sample_size": 128, "activation_fn": "geglu"}),
    ("SD3Transformer2DModel", {"num_layers": 2}),
    ("SD3Transformer2DModel", SD3),
    ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm"}),
    ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": [0], "out_channels": 3}),
    ("SD3Transformer2DModel", SD3 | {"dual_attention_layers": [0, 1], "num_layers": 3}),
    ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    ("UNet2DConditionModel", UNET),
    ("UNet2DConditionModel", UNET | {"use_linear_projection": True, "mid_block_type": None}),
    ("UNet2DConditionModel", UNET | {"layers_per_block": [1, 3], "time_embedding_dim": 24}),
    (
        "UNet2DConditionModel",
        UNET
        | {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "conv_in_kernel": 5}
        | {"projection_class_embeddings_input_dim": 40, "transformer_layers_per_block": [[2, 1], 3]}
        | {"reverse_transformer_layers_per_block": [[1, 2, 1], 2], "act_fn": "swish"},
    ),
    (
        "UNet2DConditionModel",
        UNET
        | {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "downsample_padding": 0}
        | {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "block_out_channels": [16, 16]},
    ),
    ("UNet2DConditionModel", json.loads((SDXL_TURBO / "config.json").read_text())),
]


@pytest.mark.parametrize(("class_name", "config"), CASES)
def test_equal_to_the_stock_class(class_name, config):
    full = complete_config(class_name, config, "config.json")
    with torch.device("meta"):
        module = family_for(class_name).build(full)
    stock = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert expected_shapes(class_name, full) == stock
    buffers = {name for name, _ in module.named_buffers()} & set(stock)
    assert buffers == PERSISTENT_BUFFERS.get(class_name, frozenset())


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_defaults_are_the_stock_classes(class_name):
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    stock = {
        name: parameter.default for name, parameter in parameters.items() if name not in ("self", "kwargs")
    }
    assert dict(DEFAULTS[class_name]) == stock


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 0}, "num_layers: 0 is not an integer from 1"),
        ({"num_layers": 10**9}, "num_layers: 1000000000"),
        ({"num_layers": "28"}, "num_layers: '28'"),
        ({"num_layers": True}, "num_layers: True"),
        ({"in_channels": 2.5}, "in_channels: 2.5"),
        ({"out_channels": -1}, "out_channels: -1"),
        ({"attention_bias": "yes"}, "attention_bias: 'yes'"),
        ({"norm_type": "layer_norm"}, "norm_type: 'layer_norm' is not 'ada_norm_zero'"),
        ({"activation_fn": "swish"}, "activation_fn: 'swish' is not supported"),
        ({"activation_fn": ["gelu"]}, "activation_fn"),
        ({"sample_size": 33}, "patch_size 2 does not divide sample_size 33"),
        ({"sample_size": 2**20}, "tokens; at most"),
        ({"num_attention_heads": 2**12, "attention_head_dim": 2**12}, "at most"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm: None"),
    ],
)
def test_values_are_checked(config, message):
    with pytest.raises(SourceError) as caught:
        complete_config("DiTTransformer2DModel", config, "folder/config.json")
    assert caught.value.message.startswith("folder/config.json: ")
    assert message in caught.value.message


def test_more_values_of_the_text_models():
    with pytest.raises(SourceError, match="caption_projection_dim 8 is not the width 1152"):
        complete_config("SD3Transformer2DModel", {"caption_projection_dim": 8}, "c")
    with pytest.raises(SourceError, match="not a list of block indices"):
        complete_config("SD3Transformer2DModel", {"dual_attention_layers": 3}, "c")
    with pytest.raises(SourceError, match="qk_norm"):
        complete_config("SD3Transformer2DModel", {"qk_norm": "layer_norm"}, "c")
    with pytest.raises(SourceError, match="attention_type"):
        complete_config("PixArtTransformer2DModel", {"attention_type": "gated"}, "c")


def test_keys_that_the_stock_class_does_not_take_are_dropped():
    full = complete_config(
        "DiTTransformer2DModel", {"num_vector_embeds": None, "_diffusers_version": "0.12"}, "c"
    )
    assert "num_vector_embeds" not in full
    assert full["_diffusers_version"] == "0.12"
    assert full["_class_name"] == "DiTTransformer2DModel"
