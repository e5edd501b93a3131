"""The sizes that the config of an image classifier of transformers implies. Torch-free.

A config is kept as it stands, and what it leaves out is what the stock class assumes. Only
`vision_config.complete_vision_config` may be trusted to have checked the values that are read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_COMMON: dict[str, Any] = {"image_size": 224, "num_channels": 3}
_VIT: dict[str, Any] = {
    **_COMMON, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "qkv_bias": True,
}  # fmt: skip
_CONVNEXT: dict[str, Any] = {
    **_COMMON, "patch_size": 4, "num_stages": 4, "hidden_sizes": (96, 192, 384, 768), "depths": (3, 3, 9, 3),
    "layer_scale_init_value": 1e-6,
}  # fmt: skip
_SWIN: dict[str, Any] = {
    **_COMMON, "patch_size": 4, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24),
    "window_size": 7, "mlp_ratio": 4.0, "qkv_bias": True, "use_absolute_embeddings": False,
}  # fmt: skip
VISION_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ViTForImageClassification": ("vit", _VIT),
    "DeiTForImageClassification": ("deit", _VIT),
    "DeiTForImageClassificationWithTeacher": ("deit", _VIT),
    "ConvNextForImageClassification": ("convnext", _CONVNEXT),
    "SwinForImageClassification": ("swin", _SWIN),
}
"""Of every class: its model_type, and the stock defaults of what decides shapes."""

VISION_KINDS: Mapping[str, str] = {"vit": "vit", "deit": "vit", "convnext": "convnext", "swin": "swin"}
"""model_type -> the kind of structure, which one adapter serves."""


@dataclass(frozen=True)
class Images:
    """What a classifier reads and answers.

    Attributes:
        channels: of an image.
        size: (height, width) of an image in pixels.
        patch: (height, width) of a patch in pixels.
        labels: how many classes.
    """

    channels: int
    size: tuple[int, int]
    patch: tuple[int, int]
    labels: int

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in (height, width)."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]


@dataclass(frozen=True)
class VitShape:
    """The sizes of a ViT or DeiT.

    Attributes:
        root: name of the module that holds everything but the classifiers.
        head_dim: channels of a head; heads * head_dim need not be `width`.
        special_tokens: tokens that are no patches.
        classifiers: names of the last linears.
    """

    images: Images
    root: str
    width: int
    inner: int
    layers: int
    heads: int
    head_dim: int
    qkv_bias: bool
    special_tokens: int
    classifiers: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        height, width = self.images.grid
        return height * width + self.special_tokens


@dataclass(frozen=True)
class ConvNextShape:
    """The sizes of a ConvNeXt; the inner width of a block is four times its stage's width."""

    images: Images
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    layer_scale: bool

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Pixels (height, width) of every stage; a convolution drops what does not fill its window."""
        height, width = self.images.grid
        return tuple((height // 2**stage, width // 2**stage) for stage in range(len(self.depths)))


@dataclass(frozen=True)
class SwinShape:
    """The sizes of a Swin Transformer.

    Attributes:
        widths: channels of every stage, each twice the one before.
        inner: inner width of the feed-forward networks of every stage.
        heads: of every stage.
        window: side of a window in tokens.
        positions: a table of positions is added to the patches.
    """

    images: Images
    widths: tuple[int, ...]
    inner: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    qkv_bias: bool
    positions: bool

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Tokens (height, width) of every stage; the image and the stages are padded to whole patches."""
        sides = zip(self.images.size, self.images.patch, strict=True)
        height, width = (-(-side // patch) for side, patch in sides)
        return tuple((-(-height // 2**stage), -(-width // 2**stage)) for stage in range(len(self.depths)))


def is_vision_class(class_name: object) -> bool:
    """Tell whether a stock class is an image classifier that is supported."""
    return isinstance(class_name, str) and class_name in VISION_CLASSES


def layer_count(config: Mapping[str, Any]) -> int:
    """Return how many repeated blocks a checked config asks for."""
    keys = structural(config["_class_name"], config)
    return int(sum(keys["depths"]) if "depths" in keys else keys["num_hidden_layers"])


def image_shape(config: Mapping[str, Any]) -> Images:
    """Return what the classifier of a checked config reads and answers."""
    keys = structural(config["_class_name"], config)
    return Images(
        int(keys["num_channels"]), _pair(keys["image_size"]), _pair(keys["patch_size"]), _labels(config)
    )


def vit_shape(config: Mapping[str, Any]) -> VitShape:
    """Return the sizes of a ViT or DeiT.

    Args:
        config: of `complete_vision_config`.
    """
    name = config["_class_name"]
    keys = structural(name, config)
    teacher = name == "DeiTForImageClassificationWithTeacher"
    heads, width = int(keys["num_attention_heads"]), int(keys["hidden_size"])
    root = VISION_CLASSES[name][0]
    return VitShape(
        images=image_shape(config), root=root, width=width, inner=int(keys["intermediate_size"]),
        layers=int(keys["num_hidden_layers"]), heads=heads,
        head_dim=int(config.get("head_dim") or width // heads), qkv_bias=bool(keys["qkv_bias"]),
        special_tokens=2 if root == "deit" else 1,
        classifiers=("cls_classifier", "distillation_classifier") if teacher else ("classifier",),
    )  # fmt: skip


def convnext_shape(config: Mapping[str, Any]) -> ConvNextShape:
    """Return the sizes of a ConvNeXt.

    Args:
        config: of `complete_vision_config`.
    """
    keys = structural(config["_class_name"], config)
    return ConvNextShape(
        image_shape(config), tuple(map(int, keys["hidden_sizes"])), tuple(map(int, keys["depths"])),
        bool(keys["layer_scale_init_value"] > 0),
    )  # fmt: skip


def swin_shape(config: Mapping[str, Any]) -> SwinShape:
    """Return the sizes of a Swin Transformer.

    Args:
        config: of `complete_vision_config`.
    """
    keys = structural(config["_class_name"], config)
    depths = tuple(map(int, keys["depths"]))
    widths = tuple(int(keys["embed_dim"]) * 2**stage for stage in range(len(depths)))
    return SwinShape(
        images=image_shape(config), widths=widths, depths=depths, heads=tuple(map(int, keys["num_heads"])),
        inner=tuple(int(keys["mlp_ratio"] * width) for width in widths), window=int(keys["window_size"]),
        qkv_bias=bool(keys["qkv_bias"]), positions=bool(keys["use_absolute_embeddings"]),
    )  # fmt: skip


def structural(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the shapes of a class, with the stock defaults."""
    return {key: config.get(key, default) for key, default in VISION_CLASSES[class_name][1].items()}


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Sequence):
        return int(value[0]), int(value[1])
    return int(value), int(value)


def _labels(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) else int(config.get("num_labels") or 2)
