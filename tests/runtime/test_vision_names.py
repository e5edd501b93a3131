"""Former names of tensors, and the names of today."""

from __future__ import annotations

import pytest
from compress.errors import SourceError
from compress.runtime.transformers_config import named_as_modules, named_as_stored
from compress.runtime.vision_names import by_module_name, module_name, stored_name

PAIRS = [
    ("vit.layers.0.attention.q_proj.weight", "vit.encoder.layer.0.attention.attention.query.weight"),
    ("vit.layers.11.attention.o_proj.bias", "vit.encoder.layer.11.attention.output.dense.bias"),
    ("deit.layers.2.mlp.fc1.weight", "deit.encoder.layer.2.intermediate.dense.weight"),
    ("deit.layers.2.mlp.fc2.weight", "deit.encoder.layer.2.output.dense.weight"),
    ("deit.layers.2.layernorm_before.bias", "deit.encoder.layer.2.layernorm_before.bias"),
    ("swin.encoder.layers.1.blocks.0.attention.v_proj.bias",
     "swin.encoder.layers.1.blocks.0.attention.self.value.bias"),
    ("swin.encoder.layers.1.blocks.0.mlp.fc2.weight", "swin.encoder.layers.1.blocks.0.output.dense.weight"),
    ("swin.encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table",
     "swin.encoder.layers.0.blocks.1.attention.self.relative_position_bias_table"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "stored"), PAIRS)
def test_both_names(module, stored):
    assert stored_name(module) == stored and module_name(stored) == module
    assert module_name(module) == module and stored_name(stored) == stored


@pytest.mark.parametrize(
    "name",
    ["classifier.weight", "vit.layernorm.bias", "convnext.encoder.stages.0.layers.0.pwconv1.weight",
     "swin.encoder.layers.0.downsample.reduction.weight", "vit.embeddings.cls_token"],
)  # fmt: skip
def test_most_names_never_changed(name):
    assert stored_name(name) == name == module_name(name)


def test_a_checkpoint_is_read_under_the_names_of_its_module():
    stored = {name: index for index, (_, name) in enumerate(PAIRS)}
    stored["swin.encoder.layers.0.blocks.1.attention.self.relative_position_index"] = -1
    assert by_module_name(stored, "x") == {name: index for index, (name, _) in enumerate(PAIRS)}
    twice = {"vit.layers.0.mlp.fc1.bias": 0, "vit.encoder.layer.0.intermediate.dense.bias": 1}
    with pytest.raises(SourceError, match=r"model\.safetensors: tensor 'vit\.layers\.0\.mlp\.fc1\.bias' is"):
        by_module_name(twice, "model.safetensors")


def test_other_classes_keep_their_names():
    name = "vit.encoder.layer.0.output.dense.weight"
    assert named_as_modules("LlamaForCausalLM", {name: 1}, "x") == {name: 1}
    assert (
        named_as_stored("DiTTransformer2DModel", "vit.layers.0.mlp.fc1.bias") == "vit.layers.0.mlp.fc1.bias"
    )
    assert named_as_stored("ViTForImageClassification", "vit.layers.0.mlp.fc1.bias").startswith("vit.encoder")
