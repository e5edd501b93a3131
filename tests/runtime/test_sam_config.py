"""Configs of Segment Anything models are untrusted: limits, parts that must fit together, older files."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from compress.errors import SourceError
from compress.models.checkpoint import locate
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.language_config import without_code
from compress.runtime.load import load
from compress.runtime.sam_sizes import PARTS, SAM_RELATIVES, part_of, sam_encoder
from compress.runtime.transformers_config import auto_class_of, is_transformers_class, stock_arguments

from ..tiny_sam import save_tiny_sam

V, P, D = PARTS  # the parts of a config: vision, prompts, decoder
DAMAGED = [
    ({"model_type": "sam2"}, "model_type 'sam2' is not 'sam'"),
    ({V: 3}, "vision_config: int is not a mapping"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes' is not true or false"),
    ({V: {"hidden_size": 0}}, "vision_config: hidden_size: 0 is not an integer from 1"),
    ({V: {"hidden_size": True}}, "hidden_size: True is not an integer"),
    ({V: {"hidden_size": 2**21}}, "hidden_size: 2097152 is not an integer from 1 to 1048576"),
    ({V: {"image_size": [64, 64]}}, r"image_size: \[64, 64\] is not an integer"),
    ({V: {"num_attention_heads": 5}}, "num_attention_heads 5 does not divide hidden_size 48"),
    ({V: {"num_hidden_layers": 5000}}, "num_hidden_layers: 5000 is not an integer from 1 to 4096"),
    ({V: {"mlp_dim": 1.5}}, "mlp_dim: 1.5 is not an integer"),
    ({V: {"mlp_dim": None, "mlp_ratio": 0.01}}, "mlp_ratio makes 0 inner channels"),
    ({V: {"mlp_dim": None, "mlp_ratio": "4"}}, "mlp_ratio: '4' is not a number from 0 to 1024"),
    ({V: {"window_size": -1}}, "window_size: -1 is not an integer from 0"),
    ({V: {"window_size": 16000}}, "window_size 16000 make 256000000 tokens; 1 to 262144"),
    ({V: {"patch_size": 65}, P: {"patch_size": 65}}, "make 0 tokens; 1 to"),
    ({V: {"image_size": 16384, "patch_size": 1}}, "make 268500996 tokens"),
    ({V: {"global_attn_indexes": 2}}, "global_attn_indexes: 2 is not a list of the indices"),
    ({V: {"global_attn_indexes": [-1]}}, r"global_attn_indexes: \[-1\] is not a list"),
    ({V: {"use_rel_pos": 1}}, "use_rel_pos: 1 is not true or false"),
    ({V: {"layer_norm_eps": float("nan")}}, "vision_config nan is out of range"),
    ({V: {"layer_norm_eps": 2.5}}, "vision_config: layer_norm_eps: 2.5 is not a number from 0 to 1"),
    ({V: {"output_channels": 64}}, "output_channels 64 is not the hidden_size 32 of prompt_encoder_config"),
    ({V: {"num_pos_feats": 32}}, "twice num_pos_feats 64 is not the hidden_size 32"),
    ({D: {"hidden_size": 64}}, "mask_decoder_config: hidden_size 64 is not the hidden_size 32"),
    ({D: {"hidden_size": 4}}, "hidden_size 4: an eighth of it makes masks"),
    ({D: {"num_attention_heads": 3}}, "num_attention_heads 3 does not divide 32 channels"),
    ({D: {"num_attention_heads": 32, "attention_downsample_rate": 1}}, "does not divide 16 channels"),
    ({D: {"attention_downsample_rate": 16}}, "num_attention_heads 4 does not divide 2 channels"),
    ({D: {"iou_head_depth": 0}}, "iou_head_depth: 0 is not an integer"),
    ({D: {"mlp_dim": None}}, "mlp_dim: None is not an integer"),
    ({P: {"image_size": 128}}, "image_size 64 of vision_config is not the 128 of"),
    ({P: {"image_embedding_size": 2**20}}, "image_embedding_size 1048576 is not the 8 patches of a side"),
    ({P: {"mask_input_channels": 6}}, "mask_input_channels 6 is no multiple of 4"),
    ({P: {"num_point_embeddings": 3}}, "num_point_embeddings 3; points and boxes need 4"),
    ({V: {"mlp_dim": 97}}, "the config implies"),
    ({V: {"num_hidden_layers": 4}}, "missing from the weights"),
    ({V: {"num_hidden_layers": 2}}, "unknown to SamModel"),
    ({"quantization_config": {"quant_method": "fp8"}}, "already quantized"),
    *(({"architectures": [name]}, reason) for name, reason in SAM_RELATIVES.items()),
    ({"architectures": ["SamProcessor"]}, "'SamProcessor' is not supported"),
]  # fmt: skip
# What any config said in releases before 5, for itself and for each of its parts.
LEGACY: dict[str, Any] = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "begin_suppress_tokens": None, "bos_token_id": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": None,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "pad_token_id": None, "prefix": None, "problem_type": None, "pruned_heads": {},
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None,
    "torchscript": False, "transformers_version": "4.29.0.dev0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


@pytest.fixture
def changed(tmp_path):
    def build(changes):
        folder = save_tiny_sam(tmp_path / "sam")
        config = _read(folder)
        for key, value in changes.items():
            config[key] = {**config[key], **value} if key in PARTS and isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return build


def _read(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("changes", "message"), DAMAGED, ids=str)
def test_a_damaged_config_is_refused(changes, message, changed):
    folder = changed(changes)
    with pytest.raises(SourceError, match=message):
        locate(ModelRef(id=str(folder)))
    if "quantization_config" not in changes:  # `load` takes such a folder for another library's
        with pytest.raises(SourceError):
            load(folder)


@pytest.mark.parametrize("changes", [{V: {"num_hidden_layers": 300}}, {D: {"iou_head_depth": 300}}], ids=str)
def test_nothing_is_built_that_the_weights_cannot_need(changes, changed):
    with pytest.raises(SourceError, match=r"_config\.\w+ 300 with only 188 stored tensors"):
        load(changed(changes))


def test_what_the_stock_class_refuses_is_an_error_about_the_source(changed):
    with pytest.raises(SourceError, match="SamModel refuses it"):
        open_model(ModelRef(id=str(changed({V: {"hidden_act": "no_such_act"}}))), progress=SilentProgress())


def test_weights_that_were_cut_short_are_refused(changed):
    folder = changed({})
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    for opened in (lambda: locate(ModelRef(id=str(folder))), lambda: load(folder)):
        with pytest.raises(SourceError, match=r"model\.safetensors"):
            opened()


def test_a_file_of_a_former_release_opens(changed):
    parts = {key: {**LEGACY, "model_type": ""} for key in PARTS}
    folder = changed({**LEGACY, "architectures": ["SamModel"], "torch_dtype": "float32", **parts})
    config = _read(folder)
    for part in PARTS:  # releases before 5 did not write them
        config[part].pop("scale", None)
    (folder / "config.json").write_text(json.dumps(config))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    assert model.config == {**config, "_class_name": "SamModel"}
    stock = transformers.SamModel.from_pretrained(folder).eval()
    inputs = model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(**inputs).pred_masks
        for module in (model.module, load(folder)):
            assert torch.equal(module(**inputs).pred_masks, expected)


def test_what_a_config_leaves_out_is_the_stock_default():
    stock = transformers.SamConfig()
    for part in PARTS:
        for key, value in part_of({}, part).items():
            given = getattr(getattr(stock, part), key)
            wanted = 3072 if key == "mlp_dim" and value is None else value
            assert wanted == (tuple(given) if isinstance(given, list) else given), key
    encoder = sam_encoder({})
    assert (encoder.inner, encoder.head_dim, encoder.side, encoder.padded_side) == (3072, 64, 64, 70)
    assert [layer for layer in range(12) if encoder.is_global(layer)] == [2, 5, 8, 11]
    whole = sam_encoder({V: {"window_size": 0}})
    assert whole.is_global(0) and whole.padded_side == 64


def test_keys_that_decide_nothing_are_kept_and_code_is_not_chosen(changed):
    code = {"auto_map": {"AutoModel": "x.py--X"}, "attn_implementation": "somebody/kernel"}
    kernel = {"_attn_implementation_internal": "somebody/kernel"}
    folder = changed({"a_later_key": {"x": [1, None]}, **code, V: {**code, **kernel, "a_later_key": 3}})
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    assert model.config["a_later_key"] == {"x": [1, None]} and model.config[V]["a_later_key"] == 3
    arguments = stock_arguments(model.config)
    for keys in (arguments, arguments[V]):
        assert not {*code, *kernel, "architectures", "_class_name"} & keys.keys()
    assert arguments["model_type"] == "sam" and "model_type" not in arguments[V]
    assert type(model.module.vision_encoder.layers[0].attn).__name__ == "SamVisionSdpaAttention"
    assert not {*code, *kernel} & without_code(model.config)[V].keys()  # what is written says nothing of it


def test_its_loader_is_the_class_itself():
    assert is_transformers_class("SamModel") and not is_transformers_class("SamHQModel")
    assert auto_class_of("SamModel") == "SamModel"


def test_checks_need_no_torch(changed):
    folder = changed({V: {"num_pos_feats": 32}})
    code = (
        "import sys\n"
        "from compress.errors import SourceError\n"
        "from compress.models.checkpoint import locate\n"
        "from compress.recipes.schema import ModelRef\n"
        "try:\n"
        f"    locate(ModelRef(id={str(folder)!r}))\n"
        "except SourceError as error:\n"
        "    sys.exit(0 if 'num_pos_feats' in str(error) and 'torch' not in sys.modules else 1)\n"
        "sys.exit(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
