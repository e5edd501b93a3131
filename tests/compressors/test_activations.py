"""What a forward keeps for the way back: counted on the meta device, and watched where it is computed."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.activations import activation_bytes
from compress.compressors.pruning.depth import Depth
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.depth import DepthSettings
from compress.recipes.schema import ModelRef

from ..tiny_denoisers import FLUX, HUNYUAN, save_denoiser

PIXART, SD3 = "PixArtTransformer2DModel", "SD3Transformer2DModel"


def watched(module, inputs):
    """Return the bytes of all storages that autograd keeps, but for the module's own."""
    own = {item.untyped_storage().data_ptr() for item in [*module.parameters(), *module.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    module.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(**inputs)
    del output
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        (FLUX, {"num_layers": 1, "num_single_layers": 1}),
        (HUNYUAN, {"sample_size": 64, "num_layers": 2}),
        (PIXART, {"sample_size": 64}),
        (SD3, {"sample_size": 64, "pos_embed_max_size": 32}),
    ],
)
def test_attention_counts_as_it_is_computed(class_name, config, make_tiny, tmp_path):
    if class_name in (FLUX, HUNYUAN):
        folder = save_denoiser(class_name, tmp_path / "model", **config)
    else:
        folder = make_tiny(class_name, **config)
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    found = activation_bytes(model.spec.meta_module().eval(), model.family)
    inputs = model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0))
    assert found == pytest.approx(watched(model.module, inputs), rel=0.1)


def test_a_rule_that_looks_at_data_needs_a_few_blocks_memory(make_tiny):
    peaks = {}
    for layers in (4, 12):
        folder = make_tiny(num_layers=layers, name=f"deep-{layers}")
        spec = open_model(ModelRef(id=str(folder)), progress=SilentProgress()).spec
        plan = Depth().plan(spec, DepthSettings.model_validate({"by": "shortgpt", "keep": 2}))
        peaks[layers] = plan.peak_memory_bytes - spec.size().bytes
    assert peaks[12] == pytest.approx(peaks[4], rel=0.1) and peaks[4] > 0
