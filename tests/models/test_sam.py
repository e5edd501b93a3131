"""Segment Anything: shapes, work, order and copies against the stock class, and published sizes."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
import transformers
from compress.errors import SourceError
from compress.models.building import meta_module
from compress.models.checkpoint import locate
from compress.models.open import open_model, read_spec
from compress.models.registry import family_for, task_of
from compress.models.sam_macs import decoder_macs, encoder_macs, encoder_parameters, position_macs
from compress.models.shapes import complete_config, expected_shapes
from compress.preflight import linear_names
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.load import load
from compress.runtime.sam_config import POSITIONS, POSITIONS_COPY
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..tiny_sam import TINY, save_tiny_sam

VARIANTS = [
    {},
    {"qkv_bias": False, "mlp_dim": None, "mlp_ratio": 1.5},
    {"use_rel_pos": False, "use_abs_pos": False},
    {"window_size": 0},
    {"window_size": 14, "num_channels": 1},
    {"global_attn_indexes": [0, 1, 2, 7], "num_attention_heads": 6},
    {"num_hidden_layers": 1},
]
# (changes of the vision config) -> parameters, of the encoder, billions of linears and convolutions, and with
# products; from the published configs.
REAL = {
    "base": ({}, 93_735_728, 89_670_912, 368.7, 483.6),
    "half": ({"hidden_size": 384, "mlp_dim": 1536}, 27_962_032, 23_897_216, 94.8, 152.2),
    "quarter": ({"hidden_size": 168, "mlp_dim": 696}, 9_723_784, 5_658_968, 20.9, 46.0),
    "large": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "global_attn_indexes": [5, 11, 17, 23]},
        312_343_088, 308_278_272, 1311.1, 1487.9,
    ),
    "huge": (
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16,
         "global_attn_indexes": [7, 15, 23, 31]},
        641_090_864, 637_026_048, 2732.3, 2972.9,
    ),
}  # fmt: skip
PUBLISHED = {"base": 372, "half": 98, "quarter": 23, "large": 1315, "huge": 2736}


def _config(**vision):
    return complete_config("SamModel", {"model_type": "sam", "vision_config": vision}, "config.json")


def _opened(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def _inputs(model, batch=2):
    return model.family.example_inputs(model.module, batch, torch.Generator().manual_seed(7))


def _outputs(module, inputs):
    with torch.no_grad():
        found = module(**inputs)
    return found.pred_masks, found.iou_scores


@pytest.mark.parametrize("size", REAL)
def test_real_sizes_are_the_published_ones(size):
    vision, parameters, of_encoder, without, with_products = REAL[size]
    config, family = _config(**vision), family_for("SamModel")
    module = meta_module(family, config)
    assert expected_shapes("SamModel", config) == {n: tuple(t.shape) for n, t in module.state_dict().items()}
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert encoder_parameters(config, {}) == of_encoder
    assert sum(p.numel() for p in module.vision_encoder.parameters()) == of_encoder
    assert round(family.paper_macs(config) / 1e9, 1) == without
    assert round(encoder_macs(config, {}) / 1e9, 1) == with_products
    total = family.macs(config, attention_products=False)
    assert 1.77e9 < total - family.paper_macs(config) < 1.78e9  # prompts and decoder
    assert -0.01 < PUBLISHED[size] - total / 1e9 < 2.5  # the paper counts a little more


@pytest.mark.parametrize("vision", VARIANTS, ids=str)
def test_shapes_and_order_are_those_of_the_stock_class(vision, tmp_path, check_forward_order):
    model = _opened(save_tiny_sam(tmp_path / "sam", **vision))
    stock = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
    assert expected_shapes("SamModel", model.config) == stock
    check_forward_order(model)
    assert {site.role for site in model.linears()} >= {"attention.qkv", "attention.out", "cross.q", "head"}


@pytest.mark.parametrize("rate", [1, 2, 4])
def test_layers_of_the_decoder_halve_their_cross_attentions_whatever_the_config_says(rate):
    decoder = {**TINY["mask_decoder_config"], "attention_downsample_rate": rate}
    given = transformers.SamConfig(**{**TINY, "mask_decoder_config": decoder}).to_dict()
    config = complete_config("SamModel", given, "config.json")
    module = meta_module(family_for("SamModel"), config)
    assert expected_shapes("SamModel", config) == {n: tuple(t.shape) for n, t in module.state_dict().items()}


@pytest.mark.parametrize("vision", VARIANTS, ids=str)
def test_work_is_what_torch_counts(vision, tmp_path):
    model = _opened(save_tiny_sam(tmp_path / "sam", **vision))
    inputs = _inputs(model, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.module(**inputs)
    counted = model.size().macs + position_macs(model.config, {})
    assert counter.get_total_flops() == 2 * counted
    inputs["input_points"] = inputs["input_points"].expand(1, 3, 1, 2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.module(**inputs)
    more = decoder_macs(model.config, points=3) - decoder_macs(model.config)
    assert counter.get_total_flops() == 2 * (counted + more)


def test_products_are_the_difference_of_the_two_conventions():
    config = _config()
    windowed, whole = 8 * 25 * 196 * 196 * 768, 4 * 4096 * 4096 * 768
    assert encoder_macs(config, {}) - encoder_macs(config, {}, attention_products=False) == 2 * (
        windowed + whole
    )
    assert position_macs(config, {}) == 2 * 768 * (8 * 4900 * 14 + 4 * 4096 * 64)


def test_shapes_of_a_cut_model_count(tmp_path):
    config = _config()
    cut = {
        "vision_encoder.layers.0.attn.qkv.weight": (3 * 384, 768),
        "vision_encoder.layers.0.attn.proj.weight": (768, 384),
        "vision_encoder.layers.2.mlp.lin1.weight": (1000, 768),
        "vision_encoder.layers.2.mlp.lin2.weight": (768, 1000),
    }
    whole = dict(expected_shapes("SamModel", config))
    less = sum(prod(whole[name]) - prod(shape) for name, shape in cut.items())
    assert encoder_parameters(config, {}) - encoder_parameters(config, cut) == less
    saved = encoder_macs(config, {}) - encoder_macs(config, cut)
    assert saved == 4900 * 4 * 768 * 384 + 2 * 4900 * 196 * 384 + 4096 * 2 * 768 * 2072


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_it_opens_as_the_stock_loader_does(stored, tmp_path):
    folder = save_tiny_sam(tmp_path / "sam")
    if stored == "twice":  # as older files on the Hub
        tensors = load_file(folder / "model.safetensors")
        assert POSITIONS in tensors and POSITIONS_COPY not in tensors
        tensors[POSITIONS_COPY] = tensors[POSITIONS].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = _opened(folder)
    stock = transformers.SamModel.from_pretrained(folder).eval()
    inputs = _inputs(model)
    for ours, loaded, theirs in zip(
        _outputs(model.module, inputs), _outputs(load(folder), inputs), _outputs(stock, inputs), strict=True
    ):
        assert torch.equal(ours, theirs) and torch.equal(loaded, theirs)
    assert model.size() == read_spec(ModelRef(id=str(folder))).size()
    assert model.size().parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert model.shared == {POSITIONS_COPY: POSITIONS}
    copy, first = (model.module.get_parameter(name) for name in (POSITIONS_COPY, POSITIONS))
    assert copy is first
    assert model.config == {**json.loads((folder / "config.json").read_text()), "_class_name": "SamModel"}


def test_copies_that_differ_are_refused(tmp_path):
    folder = save_tiny_sam(tmp_path / "sam")
    tensors = load_file(folder / "model.safetensors")
    tensors[POSITIONS_COPY] = tensors[POSITIONS] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"positional_embedding' differs from"):
        _opened(folder)
    with pytest.raises(SourceError, match="positional_embedding differs from"):
        load(folder)


def test_the_reference_input_is_an_image_of_the_configs_size_and_a_point(tmp_path):
    model = _opened(save_tiny_sam(tmp_path / "sam"))
    model.module.to(torch.bfloat16)
    inputs = _inputs(model, 3)
    assert inputs["pixel_values"].shape == (3, 3, 64, 64) and inputs["pixel_values"].dtype == torch.bfloat16
    points = inputs["input_points"]
    assert points.shape == (3, 1, 1, 2) and points.dtype == torch.float32
    assert float(points.min()) >= 0 and float(points.max()) < 64
    again = _inputs(model, 3)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    masks, scores = _outputs(model.module, inputs)
    assert masks.shape == (3, 1, 3, 32, 32) and scores.shape == (3, 1, 3)


def test_names_and_task(tmp_path):
    family = family_for("SamModel")
    assert (family.name, family.task, task_of("sam")) == ("sam", "segment", "segment")
    folder = save_tiny_sam(tmp_path / "sam")
    model = _opened(folder)
    assert [name for name, _ in family.blocks(model.module)] == [
        f"vision_encoder.layers.{i}" for i in range(3)
    ]
    assert [name for name, _ in family.attentions(model.module)] == [
        f"vision_encoder.layers.{i}.attn" for i in range(3)
    ]
    assert "vision_encoder.layers.0.attn.qkv" in linear_names(locate(ModelRef(id=str(folder))))


@pytest.mark.parametrize("model_type", ["sam", "sam_hq"])
def test_a_config_without_a_class_is_of_the_class_of_its_type(model_type, tmp_path):
    folder = save_tiny_sam(tmp_path / "sam")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    if model_type == "sam":
        assert _opened(folder).spec.family.name == "sam"
    else:
        with pytest.raises(SourceError, match="'SamHQModel' is not supported: its mask decoder"):
            _opened(folder)
