"""What the config of a U-Net may say; another kind of U-Net is refused by what asks for it."""

from __future__ import annotations

import pytest
from compress.errors import SourceError
from compress.runtime.config import check_config, complete_config
from compress.runtime.config_unet import layer_count
from compress.runtime.validate import read_headers, read_json

CLASS = "UNet2DConditionModel"
SMALL = {"sample_size": 8, "block_out_channels": [32, 64], "down_block_types": ["DownBlock2D"] * 2,
         "up_block_types": ["UpBlock2D"] * 2}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types: 'AttnDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]}, "'SimpleCrossAttnUpBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type: 'UNetMidBlock2DSimpleCr"),
        ({"down_block_types": "DownBlock2D"}, "is not a list of 1 to 16 kinds"),
        ({"down_block_types": [["DownBlock2D"], 3]}, "down_block_types: ['DownBlock2D'] is not supported"),
        ({"up_block_types": ["UpBlock2D"]}, "2 down_block_types, but 1 up_block_types"),
        ({"class_embed_type": "timestep"}, "class_embed_type: 'timestep' is not supported"),
        ({"addition_embed_type": "image"}, "addition_embed_type: 'image'"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim: 256"),
        ({"dual_cross_attention": True}, "dual_cross_attention: True"),
        ({"addition_embed_type": "text_time"}, "needs projection_class_embeddings_input_dim"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 48},
            "leaves no place for a text beside 6 sizes of 8",
        ),
        ({"sample_size": None}, "sample_size: None is not an integer from 1 to 4096"),
        ({"sample_size": [64, 64]}, "sample_size: [64, 64]"),
        ({"sample_size": 1}, "sample_size 1 cannot be halved 1 times"),
        ({"in_channels": 9}, "in_channels 9 is not out_channels 4"),
        ({"block_out_channels": [32]}, "block_out_channels has 1 entries; the model has 2 stages"),
        ({"block_out_channels": 32}, "block_out_channels: 32 is not a list"),
        ({"block_out_channels": [32, True]}, "block_out_channels: True"),
        ({"block_out_channels": [32, 2**20]}, "block_out_channels: 1048576"),
        ({"norm_num_groups": 64}, "norm_num_groups 64 does not divide 32 channels"),
        ({"norm_num_groups": None}, "norm_num_groups: None"),
        ({"attention_head_dim": 5}, "attention_head_dim 5 (the number of heads) does not divide 64"),
        ({"cross_attention_dim": [8, 16]}, "one text cannot have several widths"),
        ({"layers_per_block": 0}, "layers_per_block: 0"),
        ({"layers_per_block": 4096}, "layers; at most 4096"),
        ({"transformer_layers_per_block": 1.5}, "transformer_layers_per_block: 1.5"),
        ({"transformer_layers_per_block": [1]}, "transformer_layers_per_block: [1] is not a list with one"),
        ({"transformer_layers_per_block": [1, [1, 1]]}, "reverse_transformer_layers_per_block is missing"),
        (
            {"transformer_layers_per_block": [1, [1]], "reverse_transformer_layers_per_block": [1, 1]},
            "transformer_layers_per_block: [1] is not a list of 2 numbers",
        ),
        (
            {"reverse_transformer_layers_per_block": [1, [1, 1]]},
            "reverse_transformer_layers_per_block: [1, 1] is not a list of 3 numbers",
        ),
        ({"reverse_transformer_layers_per_block": 3}, "reverse_transformer_layers_per_block: 3"),
        ({"conv_in_kernel": 2}, "conv_in_kernel 2 is even"),
        ({"norm_eps": "small"}, "norm_eps: 'small' is not a number"),
        ({"dropout": float("nan")}, "dropout: nan is not finite"),
        ({"use_linear_projection": 1}, "use_linear_projection: 1 is not true or false"),
    ],
)  # fmt: skip
def test_values_are_checked(config, message):
    with pytest.raises(SourceError) as caught:
        complete_config(CLASS, SMALL | config, "folder/config.json")
    assert caught.value.message.startswith("folder/config.json: ")
    assert message in caught.value.message


def test_a_stored_config_is_checked_alike():
    check_config({"_class_name": CLASS, **SMALL}, 1000, "c", tensors=200)
    with pytest.raises(SourceError, match="'KDownBlock2D' is not supported"):
        check_config(
            {"_class_name": CLASS, **SMALL, "down_block_types": ["KDownBlock2D"] * 2}, 1000, "c", tensors=200
        )


def test_layers_are_held_against_the_stored_tensors():
    config = {"_class_name": CLASS, **SMALL, "transformer_layers_per_block": 1000,
              "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1}  # fmt: skip
    full = complete_config(CLASS, config, "c")
    check_config(config, 1000, "c", tensors=layer_count(full))
    with pytest.raises(SourceError, match=f"make {layer_count(full)} layers, with only 200 stored tensors"):
        check_config(config, 1000, "c", tensors=200)


def test_there_are_fewer_layers_than_tensors_in_a_model(make_tiny):
    folder = make_tiny(CLASS)
    full = complete_config(CLASS, read_json(folder / "config.json"), "c")
    # Residual blocks: 2 going down, 4 up; the middle one's two are not counted. Transformers: 2, 2 * 2 and 2.
    assert layer_count(full) == 6 + 8 < len(read_headers(folder)[0])


def test_defaults_need_a_size_only():
    full = complete_config(CLASS, {"sample_size": 64, "unknown": 3}, "c")
    assert "unknown" not in full and full["cross_attention_dim"] == 1280
