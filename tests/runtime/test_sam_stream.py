"""Modules of an encoder that do not fit together are refused when they are cut, not when they compute."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.pruning.sam.cutting import planned_surgery
from compress.errors import SourceError
from compress.runtime.manifest import ModuleSurgery
from compress.runtime.sam_stream import check_stream
from compress.runtime.surgery import apply_surgery

from ..tiny_sam import tiny_sam

LAYER = "vision_encoder.layers.1"


def surgery_of(module):
    config = {**module.config.to_dict(), "_class_name": "SamModel"}
    return planned_surgery(config, 24, (6, 4, 6), (48, 20, 90))


def test_a_planned_cut_fits_together():
    module = tiny_sam()
    apply_surgery(module, surgery_of(module))
    assert module.vision_encoder.neck.conv1.weight.shape[1] == 24
    check_stream(tiny_sam(use_abs_pos=False))
    check_stream(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("vision_encoder", {"pos_embed": (1, 8, 8, 20)}, "pos_embed: 20 channels, and .* has 24"),
        (f"{LAYER}.layer_norm1", {"weight": (20,), "bias": (20,)}, "layer_norm1.weight: 20 channels"),
        (f"{LAYER}.layer_norm2", {"weight": (20,), "bias": (20,)}, "layer_norm2.weight: 20 channels"),
        (f"{LAYER}.attn.qkv", {"weight": (48, 20), "bias": (48,)}, "qkv.weight: 20 channels"),
        (f"{LAYER}.attn.proj", {"weight": (20, 16), "bias": (20,)}, "proj.weight: 20 channels"),
        (f"{LAYER}.mlp.lin1", {"weight": (20, 20), "bias": (20,)}, "lin1.weight: 20 channels"),
        (f"{LAYER}.mlp.lin2", {"weight": (20, 20), "bias": (20,)}, "lin2.weight: 20 channels"),
        (f"{LAYER}.mlp.lin2", {"weight": (24, 12), "bias": (24,)}, "mlp: 20 channels go into .* 12 come out"),
        ("vision_encoder.neck.conv1", {"weight": (32, 20, 1, 1)}, "conv1.weight: 20 channels"),
    ],
)
def test_what_does_not_fit_is_refused(name, shapes, message):
    module = tiny_sam()
    surgery = surgery_of(module)
    cut = ModuleSurgery(shapes=shapes, attributes=surgery[name].attributes)
    with pytest.raises(SourceError, match=message):
        apply_surgery(module, {**surgery, name: cut})


def test_a_module_that_is_left_out_is_missed():
    module = tiny_sam()
    surgery = surgery_of(module)
    del surgery["vision_encoder.patch_embed.projection"]
    with pytest.raises(SourceError, match="pos_embed: 24 channels, and the residual stream has 48"):
        apply_surgery(module, surgery)
