"""The adapter of Hunyuan-DiT on tiny models, and its sizes at the real ones."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from compress.errors import SourceError
from compress.models.open import open_model, read_spec
from compress.models.registry import family_for
from compress.models.shapes import complete_config, expected_shapes
from compress.progress import SilentProgress
from compress.recipes.patterns import select
from compress.recipes.schema import ModelRef
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

from ..tiny_denoisers import HUNYUAN, TINY, save_denoiser

SMALL = TINY[HUNYUAN]
PLAIN = {"use_style_cond_and_image_meta_size": False}
REAL = {
    "in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637,
    "sample_size": 128,
}  # fmt: skip
CONFIGS = [{}, PLAIN | {"activation_fn": "geglu"}, {"num_layers": 4, "learn_sigma": False}]


@pytest.fixture
def opened(tmp_path):
    """Return `opened(**config) -> open model`."""
    return lambda **config: open_model(
        ModelRef(id=str(save_denoiser(HUNYUAN, tmp_path / "hunyuan", **config))), progress=SilentProgress()
    )


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL | PLAIN | {"num_layers": 8, "learn_sigma": False, "activation_fn": "geglu"},
        SMALL | {"attention_head_dim": 24, "hidden_size": 48, "num_layers": 2, "text_len_t5": 9},
        REAL | {"num_layers": 4},
        REAL | PLAIN | {"num_layers": 2},
    ],
)
def test_shapes_are_those_of_the_stock_class(config):
    full = complete_config(HUNYUAN, config, "config.json")
    with torch.device("meta"):
        stock = diffusers.HunyuanDiT2DModel(**config)
    assert expected_shapes(HUNYUAN, full) == {name: tuple(t.shape) for name, t in stock.state_dict().items()}


@pytest.mark.parametrize("style", [True, False])
def test_the_real_size_is_known_from_the_config_alone(style, tmp_path):
    config = {**REAL, "use_style_cond_and_image_meta_size": style}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": HUNYUAN, **config}))
    spec = read_spec(ModelRef(id=str(tmp_path)))
    with torch.device("meta"):
        stock = diffusers.HunyuanDiT2DModel(**config)
    assert spec.size().parameters == sum(item.numel() for item in stock.parameters())
    assert round(spec.size().parameters / 1e9, 2) == (1.52 if style else 1.5)


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_order(opened, config):
    model = opened(**config)
    order = []
    sites = [site.name for site in model.linears()]
    for name in sites:
        layer = model.module.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, __, name=name: order.append(name))
    with torch.no_grad():
        model.module(**model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0)))
    assert order == [name for name in sites if ".pooler." not in name]
    linears = {name for name, item in model.module.named_modules() if isinstance(item, torch.nn.Linear)}
    assert set(sites) == linears and len(sites) == len(linears)


@pytest.mark.parametrize("config", CONFIGS)
def test_macs(opened, check_macs, config):
    check_macs(opened(**config))


def test_roles_blocks_and_default_keep(opened):
    model = opened()
    sites = {site.name: site for site in model.linears()}
    kept = select(model.family.default_keep(), list(sites))
    assert set(kept) == {site.name for site in sites.values() if site.role in ("embedder", "head")}
    assert [name for name, site in sites.items() if site.role == "projection"] == [
        "blocks.4.skip_linear", "blocks.5.skip_linear",
    ]  # fmt: skip
    assert sites["blocks.4.attn2.to_k"].role == "cross.k" and sites["blocks.4.attn2.to_k"].block == 4
    assert len(model.family.attentions(model.module)) == 12


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "config"), [("float32", {}), ("float32", PLAIN), ("bfloat16", {})])
def test_what_is_not_given_is_what_the_stock_pipeline_gives(dtype, config, opened):
    model = opened(dtype=dtype, **config)
    kind = getattr(torch, dtype)
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(1))
    made = {"image_rotary_emb", "image_meta_size", "style"}
    bare = {name: value for name, value in inputs.items() if name not in made}
    stock = diffusers.HunyuanDiT2DModel.from_pretrained(model.source.folder, torch_dtype=kind)
    grid = get_resize_crop_region_for_grid((4, 4), 512 // 8 // 2)
    wanted = stock(
        **bare,
        image_rotary_emb=get_2d_rotary_pos_embed(16, grid, (4, 4), device="cpu", output_type="pt"),
        image_meta_size=torch.tensor([[1024, 1024, 64, 64, 0, 0]] * 2, dtype=kind),
        style=torch.tensor([0, 0]),
        return_dict=False,
    )[0]
    assert torch.equal(model.module(**bare, return_dict=False)[0], wanted)
    assert torch.equal(model.module(**inputs, return_dict=False)[0], wanted)
    whole = {**bare, "timestep": bare["timestep"].float().round().long()}
    assert torch.equal(model.module(**whole).sample, wanted), "timesteps of any type"
    clone = copy.deepcopy(model.module)
    assert type(clone).__name__ == HUNYUAN and torch.equal(clone(**bare).sample, wanted)
    assert torch.equal(family_for(HUNYUAN).adopt(stock)(**bare).sample, wanted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": None}, "in_channels: None is not an integer"),
        ({"hidden_size": 1152}, "hidden_size 1152 is not num_attention_heads"),
        ({"attention_head_dim": 90, "hidden_size": 1440}, "attention_head_dim 90 is no multiple of 4"),
        ({"cross_attention_dim_t5": 2044}, "cross_attention_dim_t5 2044 is no multiple of 8"),
        ({"sample_size": 33}, "patch_size 2 does not divide sample_size 33"),
        ({"num_layers": 39}, "num_layers 39 is odd"),
        ({"sample_size": 2**19}, "tokens; at most"),
        ({"mlp_ratio": 0}, "mlp_ratio: 0 is not a number from"),
        ({"learn_sigma": "yes"}, "learn_sigma: 'yes' is not true or false"),
        ({"activation_fn": "swish"}, "activation_fn: 'swish' is not supported"),
        ({"norm_type": "rms"}, "norm_type: 'rms' is not 'layer_norm'"),
        ({"cross_attention_dim": None}, "cross_attention_dim: None"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(SourceError, match=message):
        complete_config(HUNYUAN, REAL | config, "config.json")
