"""Configs of image classifiers are untrusted: limits, and what stock classes could not run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from compress.errors import SourceError
from compress.models.checkpoint import locate
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.load import load
from compress.runtime.transformers_config import (
    auto_class_of,
    check_transformers_config,
    is_transformers_class,
    stock_arguments,
)
from compress.runtime.vision_sizes import VISION_CLASSES

VIT, CONVNEXT, SWIN = (
    "ViTForImageClassification", "ConvNextForImageClassification", "SwinForImageClassification",
)  # fmt: skip
DAMAGED = [
    (VIT, {"model_type": "deit"}, "model_type 'deit' is not 'vit'"),
    (VIT, {"hidden_size": 0}, "hidden_size: 0 is not an integer from 1"),
    (VIT, {"hidden_size": True}, "hidden_size: True is not an integer"),
    (VIT, {"hidden_size": 2**21}, "hidden_size: 2097152 is not an integer from 1 to 1048576"),
    (VIT, {"num_hidden_layers": 5000}, "num_hidden_layers: 5000 is not an integer from 1 to 4096"),
    (VIT, {"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64"),
    (VIT, {"head_dim": None}, "head_dim: None is not an integer"),
    (VIT, {"head_dim": 2**19}, r"num_attention_heads \* head_dim = 2097152"),
    (VIT, {"intermediate_size": "128"}, "intermediate_size: '128' is not an integer"),
    (VIT, {"qkv_bias": 1}, "qkv_bias: 1 is not true or false"),
    (VIT, {"image_size": [16]}, r"image_size: \[16\] is not one or two integers"),
    (VIT, {"image_size": 2**15}, "image_size: 32768 is not one or two integers"),
    (VIT, {"patch_size": 17}, "make 0 patches"),
    (VIT, {"image_size": 16384, "patch_size": 1}, "patches; 1 to 262144"),
    (VIT, {"layer_norm_eps": float("inf")}, "layer_norm_eps inf is out of range"),
    (VIT, {"layer_norm_eps": -2.5}, "layer_norm_eps: -2.5 is not a number from 0 to 1"),
    (VIT, {"dtype": []}, r"dtype: \[\] is not the name of a type"),
    (VIT, {"id2label": ["a", "b"]}, "id2label: list is not a mapping"),
    (VIT, {"id2label": {}}, "id2label names 0 classes"),
    (VIT, {"num_labels": 3}, "num_labels 3, but id2label names 10 classes"),
    (VIT, {"id2label": None, "num_labels": 0}, "num_labels: 0 is not an integer from 1"),
    (VIT, {"intermediate_size": 96}, "the config implies"),
    (VIT, {"num_hidden_layers": 3}, "missing from the weights"),
    (VIT, {"num_hidden_layers": 1}, "unknown to ViTForImageClassification"),
    (VIT, {"quantization_config": {"quant_method": "fp8"}}, "already quantized"),
    (VIT, {"architectures": ["ViTForMaskedImageModeling"]}, "'ViTForMaskedImageModeling' is not supported"),
    (CONVNEXT, {"depths": [1, 1, 2]}, "depths has 3 entries, but num_stages says 4 stages"),
    (CONVNEXT, {"hidden_sizes": 16}, "hidden_sizes: 16 is not a list"),
    (CONVNEXT, {"hidden_sizes": [16, 24, 32, 2**19]}, r"hidden_sizes: 4 \* 524288 is over"),
    (CONVNEXT, {"depths": [4000, 4000, 1, 1]}, "depths: 8002 blocks"),
    (CONVNEXT, {"layer_scale_init_value": None}, "layer_scale_init_value: None is not a number"),
    (CONVNEXT, {"image_size": 24}, "leaves 0 x 0 pixels to the last stage"),
    (SWIN, {"window_size": 33}, "window_size: 33 is not an integer from 1 to 32"),
    (SWIN, {"window_size": 9}, "window_size 9 does not fit the 8 x 8 tokens of stage 1"),
    (SWIN, {"num_heads": [2]}, "num_heads has 1 entries, but depths says 2 stages"),
    (SWIN, {"num_heads": [2, 5]}, r"num_heads\[1\] 5 does not divide its width 32"),
    (SWIN, {"mlp_ratio": 0.0}, "mlp_ratio 0.0 is not over 0"),
    (SWIN, {"mlp_ratio": 0.01}, "make widths of 32 and 0; at most"),
    (SWIN, {"embed_dim": 2**18}, "make widths of 524288"),
    (SWIN, {"image_size": 33, "use_absolute_embeddings": True}, r"is no multiple of patch_size \(2, 2\)"),
]


def _changed(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("class_name", "changes", "message"), DAMAGED)
def test_a_damaged_config_is_refused(class_name, changes, message, make_vit):
    folder = _changed(make_vit(class_name), changes)
    with pytest.raises(SourceError, match=message):
        locate(ModelRef(id=str(folder)))
    if "quantization_config" not in changes:  # `load` takes such a folder for another library's
        with pytest.raises(SourceError):
            load(folder)


@pytest.mark.parametrize(
    ("class_name", "changes", "message"),
    [
        (VIT, {"num_hidden_layers": 200}, "200 layers with only 40 stored tensors"),
        (SWIN, {"depths": [40, 40]}, "80 layers with only"),
        (SWIN, {"image_size": 256, "window_size": 32}, "window_size 32 gives tables of 33554432 bytes"),
    ],
)
def test_nothing_is_built_that_the_weights_cannot_need(class_name, changes, message, make_vit):
    folder = _changed(make_vit(class_name), changes)
    with pytest.raises(SourceError, match=message):
        load(folder)


def test_what_the_stock_class_refuses_is_an_error_about_the_source(make_vit):
    folder = _changed(make_vit(VIT), {"hidden_act": "no_such_activation"})
    with pytest.raises(SourceError, match="ViTForImageClassification refuses it"):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def test_keys_that_decide_nothing_are_kept_and_code_is_not_chosen(make_vit):
    raw = {"a_later_key": {"x": [1, None]}, "auto_map": {"AutoModel": "x.py--X"},
           "attn_implementation": "somebody/kernel", "hidden_act": "relu"}  # fmt: skip
    folder = _changed(make_vit(VIT), raw)
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    assert model.config["a_later_key"] == {"x": [1, None]}
    arguments = stock_arguments(model.config)
    assert not {"auto_map", "attn_implementation", "architectures", "_class_name"} & arguments.keys()
    assert arguments["model_type"] == "vit" and arguments["hidden_act"] == "relu"
    assert model.module.config._attn_implementation == "sdpa"


def test_classes_of_transformers_are_told_from_others():
    assert all(map(is_transformers_class, [*VISION_CLASSES, "LlamaForCausalLM"]))
    assert not any(map(is_transformers_class, ["DiTTransformer2DModel", None, "ViTModel"]))
    assert auto_class_of(SWIN) == "AutoModelForImageClassification"
    assert auto_class_of("Qwen2ForCausalLM") == "AutoModelForCausalLM"
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8,
              "intermediate_size": 8, "num_hidden_layers": 9, "num_attention_heads": 2}  # fmt: skip
    with pytest.raises(SourceError, match="num_hidden_layers 9 with only 5"):
        check_transformers_config(config, 5, 10**6, "config.json")


def test_checks_need_no_torch(make_vit):
    folder = _changed(make_vit(SWIN), {"window_size": 9})
    code = (
        "import sys\n"
        "from compress.errors import SourceError\n"
        "from compress.models.checkpoint import locate\n"
        "from compress.recipes.schema import ModelRef\n"
        "try:\n"
        f"    locate(ModelRef(id={str(folder)!r}))\n"
        "except SourceError as error:\n"
        "    sys.exit(0 if 'window_size 9' in str(error) and 'torch' not in sys.modules else 1)\n"
        "sys.exit(2)\n"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
