"""Blocks that are removed, and blocks that are gated: both give the same model, and stock code loads it."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from compress.errors import PlanError, StageError
from compress.models.blocks import block_lists, checked, depths, drop_blocks, renamed, shallower_config
from compress.models.gating import gated

from ..small_dits import equal_embedders_of

DIT, PIXART = "DiTTransformer2DModel", "PixArtTransformer2DModel"
SD3, FLUX, HUNYUAN = "SD3Transformer2DModel", "FluxTransformer2DModel", "HunyuanDiT2DModel"
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
SQUARE: dict[str, Any] = {"sample_size": 8, "in_channels": 4}
CONFIGS: Mapping[str, dict[str, Any]] = {
    DIT: {**HEADS, **SQUARE, "out_channels": 8, "num_layers": 6, "num_embeds_ada_norm": 10},
    PIXART: {
        **HEADS, **SQUARE, "out_channels": 8, "num_layers": 6, "cross_attention_dim": 32,
        "caption_channels": 16,
    },
    SD3: {
        **HEADS, **SQUARE, "out_channels": 4, "num_layers": 6, "joint_attention_dim": 24,
        "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 12,
    },
    FLUX: {
        **HEADS, "patch_size": 1, "in_channels": 4, "num_layers": 3, "num_single_layers": 4,
        "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 4, 8),
    },
    HUNYUAN: {
        **HEADS, **SQUARE, "num_layers": 8, "patch_size": 2, "hidden_size": 32, "cross_attention_dim": 12,
        "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "text_len": 3, "text_len_t5": 4,
    },
}  # fmt: skip


def _inputs(class_name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    call: dict[str, Any] = {"hidden_states": normal(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
    if class_name == DIT:
        return call | {"class_labels": torch.tensor([1, 5])}
    if class_name == PIXART:
        nothing = {"resolution": None, "aspect_ratio": None}
        return call | {"encoder_hidden_states": normal(2, 5, 16), "added_cond_kwargs": nothing}
    if class_name == SD3:
        return call | {"encoder_hidden_states": normal(2, 5, 24), "pooled_projections": normal(2, 20)}
    if class_name == FLUX:
        return {
            "hidden_states": normal(2, 16, 4), "timestep": torch.tensor([0.3, 0.8]),
            "encoder_hidden_states": normal(2, 5, 24), "pooled_projections": normal(2, 20),
            "img_ids": normal(16, 3), "txt_ids": torch.zeros(5, 3),
        }  # fmt: skip
    return call | {
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_hidden_states": normal(2, 3, 12), "text_embedding_mask": torch.ones(2, 3),
        "encoder_hidden_states_t5": normal(2, 4, 16), "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.arange(12).view(2, 6), "style": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip


@pytest.fixture
def built() -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return `built(class_name, **config)` -> (stock module with random weights, its config)."""

    def build(class_name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
        module = getattr(diffusers, class_name)(**CONFIGS[class_name] | changes).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.2, generator=generator)
            if class_name == DIT:
                equal_embedders_of(module)
        config = {key: value for key, value in module.config.items() if not key.startswith("_")}
        return module, config | {"_class_name": class_name}

    return build


def _run(module: Any, class_name: str) -> torch.Tensor:
    output: torch.Tensor = module(**_inputs(class_name), return_dict=False)[0]
    return output


CASES = [
    (DIT, {}, {"transformer_blocks": (1, 2, 5)}),
    (DIT, {}, {"transformer_blocks": (0,)}),
    (PIXART, {}, {"transformer_blocks": (0, 3)}),
    *(
        (SD3, {"dual_attention_layers": dual, "qk_norm": norm}, {"transformer_blocks": kept})
        for dual, norm, kept in (
            ((), None, (0, 2, 5)), ((), None, (1, 3)), ((0, 1, 3), None, (0, 3, 4)),
            ((0, 1, 3), "rms_norm", (1, 3)), ((), "rms_norm", (4,)),
        )
    ),
    (FLUX, {}, {"transformer_blocks": (0, 2), "single_transformer_blocks": (1,)}),
    (FLUX, {}, {"single_transformer_blocks": (0, 3)}),
    (HUNYUAN, {}, {"blocks": (0, 3, 4, 7)}),
    (HUNYUAN, {}, {"blocks": (1, 3, 4, 6)}),
    (HUNYUAN, {}, {"blocks": (3, 4)}),
]  # fmt: skip


@pytest.mark.parametrize(("class_name", "config", "kept"), CASES)
@torch.no_grad()
def test_gated_dropped_and_reloaded_models_are_one(class_name, config, kept, built, tmp_path):
    module, config = built(class_name, **config)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    whole = _run(module, class_name)
    sizes = depths(config)
    chosen = checked(config, kept)
    with gated(module, class_name) as gates:
        gates.masks = {name: torch.ones(2, depth) for name, depth in sizes.items()}
        assert torch.equal(_run(module, class_name), whole)
        gates.masks = {
            name: torch.tensor([float(place in chosen[name]) for place in range(depth)]).expand(2, -1)
            for name, depth in sizes.items()
        }
        skipped = _run(module, class_name)
        with torch.enable_grad():  # here every block runs
            computed = _run(module, class_name)
    assert torch.equal(_run(module, class_name), whole), "the gates are gone"
    drop_blocks(module, config, kept)
    left = _run(module, class_name)
    assert torch.equal(left, skipped) and torch.equal(left, computed)
    assert not torch.allclose(left, whole)
    _same_weights(state, module, chosen, class_name)
    module.save_pretrained(tmp_path)
    again, found = type(module).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(_run(again, class_name), left)
    assert {blocks.name: len(again.get_submodule(blocks.name)) for blocks in block_lists(class_name)} | {
        name: len(places) for name, places in chosen.items()
    } == {blocks.name: again.config[blocks.depth_key] for blocks in block_lists(class_name)}


def _same_weights(before, module, chosen, class_name):
    """What stays is the original's, bit for bit; of SD3's last block two chunks have changed places."""
    now = module.state_dict()
    named = {renamed(name, chosen): value for name, value in before.items()}
    different = [name for name, value in now.items() if not torch.equal(named[name][: len(value)], value)]
    last = f"transformer_blocks.{len(chosen.get('transformer_blocks', ())) - 1}.norm1_context.linear"
    moved = class_name == SD3 and chosen["transformer_blocks"][-1] != 5
    assert different == ([f"{last}.weight", f"{last}.bias"] if moved else [])
    missing = set(named) - set(now) - {None}
    assert all(moved and name.startswith(last.removesuffix(".norm1_context.linear")) for name in missing)


def test_masks_are_of_every_sample_and_have_gradients(built):
    module, config = built(DIT)
    masks = torch.ones(2, 6)
    masks[0, 2] = masks[1, 4] = 0.0
    masks.requires_grad_()
    with gated(module, DIT) as gates:
        gates.masks = {"transformer_blocks": masks}
        found = _run(module, DIT)
        found.square().mean().backward()
        gates.masks = {"transformer_blocks": masks.detach()[:1].expand(2, -1)}
        first = _run(module, DIT)
    assert torch.allclose(found[0], first[0], atol=1e-5) and not torch.allclose(found[1], first[1], atol=1e-3)
    assert bool((masks.grad != 0).all()), "also of the blocks that a sample went without"


def test_a_block_that_the_whole_batch_goes_without_has_a_gradient(built):
    module, _ = built(DIT)
    masks = torch.ones(2, 6)
    masks[:, 3] = 0.0
    masks.requires_grad_()
    with gated(module, DIT) as gates:
        gates.masks = {"transformer_blocks": masks}
        _run(module, DIT).square().mean().backward()
    assert bool((masks.grad[:, 3] != 0).all())


def test_both_halves_of_guidance_have_the_masks_of_the_batch(built):
    module, _ = built(DIT)
    call = {name: torch.cat([value, value]) for name, value in _inputs(DIT).items()}
    masks = torch.tensor([[1.0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])
    with gated(module, DIT) as gates, torch.no_grad():
        gates.masks = {"transformer_blocks": masks}
        alone = _run(module, DIT)
        both = module(**call, return_dict=False)[0]
    assert torch.allclose(both, torch.cat([alone, alone]), atol=1e-5)


def test_embedders_that_differ_keep_block_0(built):
    module, config = built(DIT)
    weight = module.transformer_blocks[3].norm1.emb.timestep_embedder.linear_1.weight
    with torch.no_grad():
        weight.view(-1)[7] += 1e-3
    before = list(module.transformer_blocks)
    with pytest.raises(StageError, match=r"transformer_blocks\.0\.norm1\.emb\.\S+ differs .*block 3"):
        drop_blocks(module, config, {"transformer_blocks": (3, 4)})
    assert list(module.transformer_blocks) == before, "nothing has changed"
    drop_blocks(module, config, {"transformer_blocks": (2, 3)})
    assert len(module.transformer_blocks) == 2


@pytest.mark.parametrize(
    ("class_name", "kept", "message"),
    [
        (DIT, {"blocks": (1,)}, "no such blocks"),
        (DIT, {"transformer_blocks": ()}, "no block is left"),
        (DIT, {"transformer_blocks": (1, 1)}, "named twice"),
        (DIT, {"transformer_blocks": (1, 6)}, "0 to 5"),
        (DIT, {"transformer_blocks": (-1, 2)}, "0 to 5"),
        (DIT, {"transformer_blocks": range(6)}, "nothing would be removed"),
        (DIT, {}, "nothing would be removed"),
        (HUNYUAN, {"blocks": (0, 3, 4)}, "block 0 would stay without block 7"),
        (HUNYUAN, {"blocks": (0, 1, 6, 7)}, "blocks 3 and 4 are the middle"),
    ],
)
def test_what_cannot_be_left_is_refused(class_name, kept, message, built):
    _, config = built(class_name)
    with pytest.raises(PlanError, match=message):
        checked(config, kept)


def test_an_odd_depth_with_long_skips_is_refused():
    config = {"_class_name": HUNYUAN, "num_layers": 7}
    with pytest.raises(PlanError, match="odd depth of 7"):
        checked(config, {"blocks": (0, 3, 6)})
    with pytest.raises(PlanError, match="UNet2DConditionModel: nothing is known"):
        block_lists("UNet2DConditionModel")


def test_the_config_of_what_is_left():
    config = {"_class_name": SD3, "num_layers": 24, "dual_attention_layers": (0, 1, 2, 12), "qk_norm": None}
    left = shallower_config(config, {"transformer_blocks": (1, 2, 5, 12, 23)})
    assert left == config | {"num_layers": 5, "dual_attention_layers": (0, 1, 3)}
    chosen = {"transformer_blocks": (1, 2, 12)}
    assert (
        renamed("transformer_blocks.12.attn.to_q.weight", chosen) == "transformer_blocks.2.attn.to_q.weight"
    )
    assert renamed("transformer_blocks.1", chosen) == "transformer_blocks.0"
    assert renamed("transformer_blocks.10.attn.to_q.weight", chosen) is None
    assert renamed("proj_out.weight", chosen) == "proj_out.weight"
