"""The adapter of Flux on tiny models, and its sizes at the real ones."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from compress.errors import SourceError
from compress.models.flux import FluxFamily
from compress.models.flux_module import packed, unpacked
from compress.models.latent_sizes import check_latents, latent_shape, tokens_of
from compress.models.open import open_model, read_spec
from compress.models.registry import family_for
from compress.models.shapes import complete_config, expected_shapes
from compress.progress import SilentProgress
from compress.recipes.patterns import select
from compress.recipes.schema import ModelRef

from ..tiny_denoisers import FLUX, TINY, save_denoiser

SMALL = TINY[FLUX]
CONFIGS = [{}, {"guidance_embeds": True, "num_layers": 1}, {"num_single_layers": 0}]


@pytest.fixture
def opened(tmp_path):
    """Return `opened(**config) -> open model`."""
    return lambda **config: open_model(
        ModelRef(id=str(save_denoiser(FLUX, tmp_path / "flux", **config))), progress=SilentProgress()
    )


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 1, "num_single_layers": 1},
        {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True},
        SMALL,
        SMALL | {"guidance_embeds": True, "num_single_layers": 0, "attention_head_dim": 24}
        | {"axes_dims_rope": [8, 8, 8], "num_attention_heads": 3},
    ],
)  # fmt: skip
def test_shapes_are_those_of_the_stock_class(config):
    full = complete_config(FLUX, config, "config.json")
    with torch.device("meta"):
        stock = diffusers.FluxTransformer2DModel(**config)
    assert expected_shapes(FLUX, full) == {name: tuple(t.shape) for name, t in stock.state_dict().items()}


@pytest.mark.parametrize("guidance", [True, False])
def test_the_real_size_is_known_from_the_config_alone(guidance, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": FLUX, "guidance_embeds": guidance}))
    spec = read_spec(ModelRef(id=str(tmp_path)))
    with torch.device("meta"):
        stock = diffusers.FluxTransformer2DModel(guidance_embeds=guidance)
    counted = sum(item.numel() for item in stock.parameters())
    assert spec.size().parameters == counted == (11_901_408_320 if guidance else 11_891_178_560)
    assert spec.size().bytes == 2 * counted


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_order(opened, check_forward_order, config):
    check_forward_order(opened(**config))


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_macs(opened, check_macs, config):
    check_macs(opened(**config))


def test_roles_blocks_and_default_keep(opened):
    model = opened(guidance_embeds=True)
    sites = {site.name: site for site in model.linears()}
    kept = select(model.family.default_keep(), list(sites))
    assert set(kept) == {site.name for site in sites.values() if site.role in ("embedder", "head")}
    single = sites["single_transformer_blocks.1.proj_out"]
    assert (single.role, single.block, single.shape) == ("ff.out", 3, (32, 160))
    assert sites["transformer_blocks.1.attn.add_k_proj"].role == "cross.k"
    assert sites["proj_out"].role == "head" and sites["proj_out"].block is None
    assert [name for name, _ in model.family.attentions(model.module)] == [
        *(f"transformer_blocks.{index}.attn" for index in range(2)),
        *(f"single_transformer_blocks.{index}.attn" for index in range(4)),
    ]


def test_tokens_are_those_of_the_stock_pipeline():
    images = torch.randn(2, 4, 8, 12)
    tokens = diffusers.FluxPipeline._pack_latents(images, 2, 4, 8, 12)
    assert torch.equal(packed(images), tokens)
    assert torch.equal(unpacked(tokens, 8, 12), images)
    assert torch.equal(packed(images.transpose(2, 3)), packed(images.transpose(2, 3).contiguous()))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "guidance"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_a_call_with_images_is_the_call_that_the_stock_pipeline_makes(dtype, guidance, opened):
    model = opened(guidance_embeds=guidance, dtype=dtype)
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 4, 8, 8, generator=generator).to(kind)
    texts = {
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator).to(kind),
        "pooled_projections": torch.randn(2, 20, generator=generator).to(kind),
    }
    if guidance:
        texts["guidance"] = torch.tensor([3.5, 3.5])
    times = torch.tensor([981.25, 17.5])
    stock = diffusers.FluxTransformer2DModel.from_pretrained(model.source.folder, torch_dtype=kind)
    tokens = stock(
        hidden_states=diffusers.FluxPipeline._pack_latents(images, 2, 4, 8, 8),
        timestep=times.to(kind) / 1000,
        img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", kind),
        txt_ids=torch.zeros(5, 3, dtype=kind),
        return_dict=False,
        **texts,
    )[0]
    wanted = diffusers.FluxPipeline._unpack_latents(tokens, 64, 64, 8)
    found = model.module(hidden_states=images, timestep=times, return_dict=False, **texts)[0]
    assert torch.equal(found, wanted)
    assert torch.equal(model.module(hidden_states=images, timestep=times, **texts).sample, wanted)


@torch.no_grad()
def test_the_module_goes_by_the_name_of_the_stock_class(opened, tmp_path):
    model = opened()
    inputs = model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0))
    output = model.module(**inputs).sample
    clone = copy.deepcopy(model.module)
    assert type(clone).__name__ == FLUX and torch.equal(clone(**inputs).sample, output)
    model.module.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["_class_name"] == FLUX
    stock = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(stock(**inputs).sample, output)
    adopted = family_for(FLUX).adopt(stock)
    assert adopted(
        hidden_states=torch.zeros(1, 4, 4, 4), timestep=torch.tensor([5.0]),
        encoder_hidden_states=inputs["encoder_hidden_states"],
        pooled_projections=inputs["pooled_projections"],
    ).sample.shape == (1, 4, 4, 4)  # fmt: skip


def test_sizes_of_images():
    config = complete_config(FLUX, {}, "c")
    assert latent_shape(config) == (16, 128, 128) and latent_shape(config, 512) == (16, 64, 64)
    assert tokens_of(config, (16, 128, 128)) == 4096
    check_latents(config, (16, 32, 32), "here", "model")
    for shape in ((4, 32, 32), (16, 32, 30), (16, 31, 31), (16, 32)):
        with pytest.raises(SourceError, match=r"an item is \[.*takes \[16, "):
            check_latents(config, shape, "here", "model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"axes_dims_rope": [16, 56, 54]}, "does not add up to attention_head_dim 128"),
        ({"axes_dims_rope": [17, 55, 56]}, "is not a list of 3 even numbers"),
        ({"axes_dims_rope": 3}, "is not a list of 3 even numbers"),
        ({"in_channels": 62}, "in_channels 62 is no multiple of 4"),
        ({"in_channels": 384, "out_channels": 64}, "given more than what they denoise"),
        ({"patch_size": 2}, "patch_size: 2 is not supported"),
        ({"guidance_embeds": 1}, "guidance_embeds: 1 is not true or false"),
        ({"num_single_layers": -1}, "num_single_layers: -1"),
        ({"num_layers": 0}, "num_layers: 0"),
        ({"num_attention_heads": 2**14}, "at most 1048576"),
        ({"joint_attention_dim": None}, "joint_attention_dim: None"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(SourceError, match=message):
        complete_config(FLUX, config, "config.json")


def test_nothing_is_folded(opened):
    assert FluxFamily().folds(opened().module) == []
