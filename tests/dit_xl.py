"""The published DiT-XL/2 of 256 pixels: its config, and what it and shallower ones are said to be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.40.0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
}
POSITIONS = 256 * 1152
"""The paper's checkpoints hold the fixed embedding of positions as a parameter; diffusers computes it."""


@dataclass(frozen=True)
class Figures:
    """Of a DiT-XL/2 of some depth.

    Attributes:
        parameters_stored: as diffusers stores it.
        parameters: copies of the embedder once.
        published: parameters as the paper on TinyFusion (arXiv 2412.01199) counts them.
        macs: multiply-accumulates of one forward.
        linear_macs: without the products of the attention, as that paper counts them.
    """

    parameters_stored: int
    parameters: int
    published: int
    macs: float
    linear_macs: float


FIGURES = {
    28: Figures(749_826_464, 674_834_720, 675_129_632, 118.7e9, 114.44e9),
    19: Figures(509_682_848, 459_688_352, 459_983_264, 80.5e9, 77.66e9),
    14: Figures(376_269_728, 340_162_592, 340_457_504, 59.3e9, 57.23e9),
    7: Figures(189_491_360, 172_826_528, 173_121_440, 29.7e9, 28.62e9),
}
"""Blocks -> figures."""
WHOLE = FIGURES[28]


def write_config(folder: Path) -> Path:
    """Write the config alone, without weights, into a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
