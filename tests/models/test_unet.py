"""The adapter of U-Nets, on tiny models and on the published shapes of SDXL-Turbo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compress.models.open import read_spec
from compress.models.unet import time_ids
from compress.recipes.patterns import select
from compress.recipes.schema import ModelRef
from compress.runtime.manifest import KernelScheme, QuantizedModule

CLASS = "UNet2DConditionModel"
SDXL_TURBO = Path(__file__).parent / "data" / "sdxl_turbo"
# As Stable Diffusion 1.x: 1x1 convolutions as projections, heads by number, no sizes.
FIRST = {
    "use_linear_projection": False, "addition_embed_type": None, "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None, "attention_head_dim": 4, "transformer_layers_per_block": 1,
}  # fmt: skip
DEEP = {
    "block_out_channels": (16, 32, 32), "attention_head_dim": (2, 4, 4), "layers_per_block": (1, 2, 1),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": (1, (2, 1), 1),
    "reverse_transformer_layers_per_block": (1, (1, 2, 1), 1), "upcast_attention": True,
}  # fmt: skip
CONFIGS = [
    {},
    FIRST,
    DEEP,
    FIRST | {"mid_block_type": None, "layers_per_block": 2, "downsample_padding": 0},
    {"sample_size": 9, "conv_in_kernel": 5, "conv_out_kernel": 1},
]


@pytest.fixture(scope="module")
def turbo():
    return read_spec(ModelRef(id=str(SDXL_TURBO)))


def test_published_shapes(turbo):
    """Of SDXL-Turbo: 794 layers with 2.566 G weights, and how they fall into content and quality."""
    sites = turbo.family.linears(turbo.meta_module())
    weights = {site.name: site.shape[0] * site.shape[1] for site in sites}
    assert len(sites) == 794
    assert sum(site.kernel is not None for site in sites) == 51
    assert sum(weights.values()) == 2_565_880_320
    content = [site.name for site in sites if site.role.startswith(("cross", "ff"))]
    assert (len(content), len(sites) - len(content)) == (420, 374)
    share = sum(weights[name] for name in content)
    assert share / (sum(weights.values()) - share) == pytest.approx(2.2418, abs=5e-5)
    assert turbo.parameters == 2_567_463_684
    assert turbo.size().bytes == 2 * turbo.parameters
    assert sum(weights.values()) * 4 / 8 == pytest.approx(1.283e9, rel=1e-4)
    assert sum(site.role in ("cross.k", "cross.v") for site in sites) == 140


def test_published_blocks_and_kept_layers(turbo):
    module = turbo.meta_module()
    sites = turbo.family.linears(module)
    assert [name for name, _ in turbo.family.blocks(module)] == [
        "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block",
        "up_blocks.0", "up_blocks.1", "up_blocks.2",
    ]  # fmt: skip
    assert len(turbo.family.attentions(module)) == 140
    kept = select(turbo.family.default_keep(), [site.name for site in sites])
    assert set(kept) == {site.name for site in sites if site.role in ("embedder", "head")}
    assert set(kept.values()) == set(turbo.family.default_keep())
    shares = {site.name: site.shape[0] * site.shape[1] for site in sites}
    assert sum(shares[name] for name in kept) / sum(shares.values()) == pytest.approx(0.003, abs=3e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_order(open_tiny, config):
    model = open_tiny(CLASS, **config)
    sites, order = model.linears(), []
    for site in sites:
        model.module.get_submodule(site.name).register_forward_pre_hook(
            lambda _, __, name=site.name: None if name in order else order.append(name)
        )
    blocks, attentions = model.family.blocks(model.module), model.family.attentions(model.module)
    for name, module in [*blocks, *attentions]:
        module.register_forward_pre_hook(lambda _, args, name=name: order.append(name))
    with torch.no_grad():
        model.module(**model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0)))
    named = {name for name, _ in [*blocks, *attentions]}
    assert [site.name for site in sites] == [name for name in order if name not in named]
    assert [name for name, _ in blocks] == [name for name in order if name in dict(blocks)]
    assert [name for name, _ in attentions] == [name for name in order if name in dict(attentions)]
    layers = {
        name: (tuple(module.weight.flatten(1).shape), isinstance(module, torch.nn.Conv2d))
        for name, module in model.module.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert {site.name: (site.shape, site.kernel is not None) for site in sites} == layers
    for site in sites:
        inside = None if site.block is None else f"{blocks[site.block][0]}."
        assert site.name.startswith(inside or "") and (inside or "block" not in site.name)


@pytest.mark.parametrize("config", CONFIGS)
def test_macs(open_tiny, check_macs, config):
    check_macs(open_tiny(CLASS, **config))


@pytest.mark.parametrize(("config", "groups"), [({}, 4 + 8 * 6), (FIRST, 4 * 6)])
def test_folds(open_tiny, check_folds, config, groups):
    check_folds(open_tiny(CLASS, **config), groups=groups)


def test_roles_and_windows(open_tiny):
    model = open_tiny(CLASS)
    sites = {site.name: site for site in model.linears()}
    roles = [site.role for site in sites.values() if site.block == 1]
    attention = [f"{kind}.{part}" for kind in ("attention", "cross") for part in ("q", "k", "v", "out")]
    assert roles == [
        "conv", "adaln", "conv", "conv.shortcut",
        "projection", *[*attention, "ff.in", "ff.out"] * 2, "projection",
    ]  # fmt: skip
    assert sites["down_blocks.0.downsamplers.0.conv"].kernel == KernelScheme(
        size=(3, 3), stride=(2, 2), padding=(1, 1)
    )
    assert sites["down_blocks.1.resnets.0.conv_shortcut"].kernel == KernelScheme(size=(1, 1))
    assert sites["conv_in"].shape == (32, 4 * 9)
    first = open_tiny(CLASS, name="first", **FIRST)
    projections = [site for site in first.linears() if site.role == "projection"]
    assert all(site.kernel == KernelScheme(size=(1, 1)) for site in projections) and len(projections) == 8


def test_quantized_layers_keep_their_sites(open_tiny):
    class Quantized(torch.nn.Module):
        def __init__(self, **fields):
            super().__init__()
            self.scheme = QuantizedModule(bits=8, symmetric=True, bias=True, method="rtn", **fields)

    model = open_tiny(CLASS)
    before = model.linears()
    kernel = KernelScheme(size=(3, 3), padding=(1, 1))
    model.module.mid_block.resnets[0].conv1 = Quantized(shape=(64, 64 * 9), kernel=kernel)
    model.module.time_embedding.linear_1 = Quantized(shape=(128, 32))
    assert model.linears() == before


def test_unknown_layers_are_a_defect(open_tiny):
    model = open_tiny(CLASS)
    model.module.extra = torch.nn.Conv2d(2, 2, 1)
    with pytest.raises(KeyError, match="extra"):
        model.linears()


def test_example_inputs_are_seeded(open_tiny):
    model = open_tiny(CLASS)
    one, two = (
        model.family.example_inputs(model.module, 3, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert one["sample"].shape == (3, 4, 8, 8) and one["encoder_hidden_states"].shape == (3, 77, 32)
    assert one["added_cond_kwargs"]["text_embeds"].shape == (3, 24)
    assert torch.equal(one["added_cond_kwargs"]["time_ids"], time_ids(64, 3))
    assert torch.equal(one["sample"], two["sample"])


def test_a_pipeline_with_a_unet_is_found(tmp_path):
    from compress.models.checkpoint import locate

    shutil.copytree(SDXL_TURBO, tmp_path / "turbo")
    checkpoint = locate(ModelRef(id=str(tmp_path / "turbo")), weights=False)
    assert checkpoint.folder == tmp_path / "turbo" / "unet"
    assert checkpoint.pipeline == tmp_path / "turbo"
    assert checkpoint.scheduler == tmp_path / "turbo" / "scheduler" / "scheduler_config.json"
    assert locate(ModelRef(id=str(checkpoint.folder)), weights=False).pipeline == tmp_path / "turbo"


def test_the_config_is_kept_as_it_was(turbo):
    written = json.loads((SDXL_TURBO / "unet" / "config.json").read_text())
    assert {key: turbo.config[key] for key in written} == written
