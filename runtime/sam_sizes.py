"""The sizes that the config of a Segment Anything model of transformers implies. Torch-free.

A config is kept as it stands, and what it leaves out is what the stock class assumes. Only
`sam_config.complete_sam_config` may be trusted to have checked the values that are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAM_CLASSES: Mapping[str, str] = {"SamModel": "sam"}
"""Class -> its model_type."""
CLASS_OF_TYPE: Mapping[str, str] = {
    **{model_type: name for name, model_type in SAM_CLASSES.items()},
    "sam_hq": "SamHQModel", "sam2": "Sam2Model", "sam3": "Sam3Model",
}  # fmt: skip
"""model_type -> class. A config written without a model names no class, and the type leaves no choice."""
_ENCODER = "it has another image encoder, and none of its parts are those of a SamModel"
_ALONE = "it is the image encoder alone; without the mask decoder there are no masks to compare"
SAM_RELATIVES: Mapping[str, str] = {
    "SamHQModel": "its mask decoder reads the encoder's inner stream at full width, which slimming changes",
    **dict.fromkeys(("SamVisionModel", "SamHQVisionModel"), _ALONE),
    **dict.fromkeys(
        ("Sam2Model", "Sam2VideoModel", "Sam3Model", "Sam3VideoModel", "Sam3TrackerModel", "EdgeTamModel",
         "EdgeTamVideoModel"), _ENCODER,
    ),
}  # fmt: skip
"""Class that looks like one of `SAM_CLASSES` -> why it is not supported."""

VISION: Mapping[str, Any] = {
    "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 1024, "patch_size": 16, "qkv_bias": True, "mlp_ratio": 4.0,
    "use_abs_pos": True, "use_rel_pos": True, "window_size": 14, "global_attn_indexes": (2, 5, 8, 11),
    "num_pos_feats": 128, "mlp_dim": None,
}  # fmt: skip
PROMPT: Mapping[str, Any] = {
    "hidden_size": 256, "image_size": 1024, "patch_size": 16, "mask_input_channels": 16,
    "num_point_embeddings": 4,
}  # fmt: skip
DECODER: Mapping[str, Any] = {
    "hidden_size": 256, "mlp_dim": 2048, "num_hidden_layers": 2, "num_attention_heads": 8,
    "attention_downsample_rate": 2, "num_multimask_outputs": 3, "iou_head_depth": 3,
    "iou_head_hidden_dim": 256,
}  # fmt: skip
PARTS: Mapping[str, Mapping[str, Any]] = {
    "vision_config": VISION, "prompt_encoder_config": PROMPT, "mask_decoder_config": DECODER,
}  # fmt: skip
"""Key of config.json -> what in it decides shapes, with the stock defaults."""
LAYER_DOWNSAMPLE_RATE = 2
"""Of the cross attentions in the decoder's layers; stock code takes only the last one's from the config."""


@dataclass(frozen=True)
class SamEncoder:
    """The image encoder, as the config has it.

    Attributes:
        image_size: side in pixels of the square images that it takes.
        patch: side of a patch in pixels.
        channels: of an image.
        width: of the residual stream.
        heads: of every layer; `head_dim` channels each.
        inner: channels inside every feed-forward network.
        window: side in tokens of the windows of layers that are not global.
        global_layers: indices of the layers that attend to the whole image.
        out_channels: of the embedding that the neck puts out.
    """

    image_size: int
    patch: int
    channels: int
    width: int
    layers: int
    heads: int
    inner: int
    window: int
    global_layers: tuple[int, ...]
    qkv_bias: bool
    absolute_positions: bool
    relative_positions: bool
    out_channels: int

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def side(self) -> int:
        """Tokens along a side of an image."""
        return self.image_size // self.patch

    @property
    def padded_side(self) -> int:
        """Tokens along a side, filled up to whole windows."""
        return self.side if self.window == 0 else -(-self.side // self.window) * self.window

    def is_global(self, layer: int) -> bool:
        """Tell whether a layer attends to the whole image."""
        return layer in self.global_layers or self.window == 0


def is_sam_class(class_name: object) -> bool:
    """Tell whether a stock class is a Segment Anything model that is supported."""
    return isinstance(class_name, str) and class_name in SAM_CLASSES


def part_of(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what decides the shapes of one of `PARTS`, with the stock defaults."""
    given = config.get(key) or {}
    return {name: given.get(name, default) for name, default in PARTS[key].items()}


def sam_encoder(config: Mapping[str, Any]) -> SamEncoder:
    """Return the sizes of the image encoder.

    Args:
        config: of `complete_sam_config`.
    """
    keys = part_of(config, "vision_config")
    width, inner = int(keys["hidden_size"]), keys["mlp_dim"]
    return SamEncoder(
        image_size=int(keys["image_size"]), patch=int(keys["patch_size"]), channels=int(keys["num_channels"]),
        width=width, layers=int(keys["num_hidden_layers"]), heads=int(keys["num_attention_heads"]),
        inner=int(width * keys["mlp_ratio"]) if inner is None else int(inner),
        window=int(keys["window_size"]), global_layers=tuple(map(int, keys["global_attn_indexes"])),
        qkv_bias=bool(keys["qkv_bias"]), absolute_positions=bool(keys["use_abs_pos"]),
        relative_positions=bool(keys["use_rel_pos"]), out_channels=int(keys["output_channels"]),
    )  # fmt: skip
