"""Cuts of a Segment Anything encoder: one set of channels everywhere, exact if it can be, as planned."""

import copy
import itertools

import pytest
import torch
import transformers
from compress.compressors.pruning.sam.choosing import Kept, Widths, choose, widths_after
from compress.compressors.pruning.sam.cutting import (
    cut_bottleneck,
    cut_embedding,
    planned_surgery,
    slice_bottleneck,
    slice_embedding,
)
from compress.compressors.pruning.sam.scores import DisturbedTaylor, score
from compress.compressors.pruning.sam.sites import encoder_sites
from compress.errors import StageError
from compress.models.base import flat_shapes
from compress.models.open import open_model
from compress.recipes.schema import ModelRef
from compress.recipes.slimsam import SlimSamSettings
from compress.runtime.surgery import apply_surgery

from ....tiny_sam import save_tiny_sam, tiny_sam
from .encoders import QUIET, embed, heavy_tailed, shown

STREAM = {
    "patch_embed.projection.weight": 0, "patch_embed.projection.bias": 0, "pos_embed": 3,
    "neck.conv1.weight": 1,
    **{
        f"layers.{layer}.{name}": axis
        for layer in range(3)
        for name, axis in {
            "layer_norm1.weight": 0, "layer_norm1.bias": 0, "layer_norm2.weight": 0, "layer_norm2.bias": 0,
            "attn.qkv.weight": 1, "attn.proj.weight": 0, "attn.proj.bias": 0,
            "mlp.lin1.weight": 1, "mlp.lin2.weight": 0, "mlp.lin2.bias": 0,
        }.items()
    },
}  # fmt: skip
"""Of the encoder: everything that has the channels of the residual stream -> their axis."""
ATTENTIONS = ("eager", "sdpa")


def random_kept(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(size, generator=generator)[:kept].sort().values for size, kept in sizes]


def unequal(seed=0):
    """What stays, of layers that lose unequally much: (within heads, inner channels)."""
    return (
        random_kept([(12, 6), (12, 3), (12, 11)], seed), random_kept([(96, 48), (96, 20), (96, 95)], seed)
    )  # fmt: skip


def uniform(seed=0):
    """What stays where the stock class can say it: (embedding, within heads, inner channels)."""
    (embedding,) = random_kept([(48, 24)], seed)
    return embedding, random_kept([(12, 6)] * 3, seed + 1), random_kept([(96, 40)] * 3, seed + 2)


@torch.no_grad()
def zeroed(module, attention, inner):
    """Return a copy with zeros in place of what is removed, written head by head."""
    found = copy.deepcopy(module)
    for layer, within, channels in zip(found.vision_encoder.layers, attention, inner, strict=True):
        attn, head_dim = layer.attn, layer.attn.qkv.out_features // 3 // layer.attn.num_attention_heads
        for third, head, channel in itertools.product(
            range(3), range(attn.num_attention_heads), range(head_dim)
        ):
            if channel not in within.tolist():
                row = (third * attn.num_attention_heads + head) * head_dim + channel
                attn.qkv.weight[row] = 0
                if attn.qkv.bias is not None:
                    attn.qkv.bias[row] = 0
        gone = sorted(set(range(layer.mlp.lin1.out_features)) - set(channels.tolist()))
        layer.mlp.lin2.weight[:, gone] = 0
    return found


def apart(one, other, pixels):
    return float((embed(one, pixels) - embed(other, pixels)).abs().max())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "vision", [{}, {"qkv_bias": False}, {"use_rel_pos": False}, {"use_abs_pos": False}, {"window_size": 4}]
)
def test_a_cut_bottleneck_computes_what_zeros_would(attention, vision):
    module, pixels = tiny_sam(attention=attention, **vision), shown(2).pixels([0, 1])
    within, inner = unequal()
    reference = zeroed(module, within, inner)
    found = copy.deepcopy(module)
    slice_bottleneck(found, within, inner, attn_scale="preserve", rel_pos="slice")
    assert apart(found, reference, pixels) < 1e-5
    assert apart(found, module, pixels) > 0.1  # the cut itself is seen
    without = copy.deepcopy(module)
    slice_bottleneck(without, within, inner, attn_scale="reset", rel_pos="slice")
    assert apart(without, reference, pixels) > 1e-3


def test_both_attentions_of_the_library_agree_on_a_cut_model():
    pixels, modules = shown(2).pixels([0, 1]), []
    for attention in ATTENTIONS:
        module = tiny_sam(attention=attention)
        slice_bottleneck(module, *unequal(), attn_scale="preserve", rel_pos="slice")
        modules.append(module)
    assert apart(*modules, pixels) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keys_are_folded_in_their_own_type(dtype):
    module = tiny_sam().to(dtype)
    with torch.no_grad():
        module.vision_encoder.layers[1].attn.qkv.weight.mul_(1 / 3)  # digits that float32 has not
    before = copy.deepcopy(module).vision_encoder.layers[1].attn.qkv
    within, inner = unequal()
    slice_bottleneck(module, within, inner, attn_scale="preserve", rel_pos="slice")
    after = module.vision_encoder.layers[1].attn.qkv
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    rows = (torch.arange(4)[:, None] * 12 + within[1]).flatten()
    for third, factor in enumerate((1.0, 0.5, 1.0)):  # 3 of 12 channels: a half
        for name in ("weight", "bias"):
            old = before.get_parameter(name)[48 * third + rows]
            assert torch.equal(after.get_parameter(name)[12 * third :][:12], old * factor)
    assert module.vision_encoder.layers[1].attn.scale == 3**-0.5


@pytest.mark.parametrize("rel_pos", ["slice", "zero"])
def test_one_set_of_channels_goes_everywhere_and_nowhere_else(rel_pos):
    module = tiny_sam()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    objects = dict(module.named_parameters())
    (kept,) = random_kept([(48, 20)])
    slice_embedding(module, kept, rel_pos=rel_pos)
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, axis in STREAM.items():
        name = f"vision_encoder.{name}"
        assert torch.equal(after[name], before[name].index_select(axis, kept)), name
    untouched = set(before) - {f"vision_encoder.{name}" for name in STREAM}
    tables = {name for name in untouched if "rel_pos" in name}
    for name in untouched - (tables if rel_pos == "zero" else set()):
        assert torch.equal(after[name], before[name]), name
        if name in objects:
            assert module.get_parameter(name) is objects[name], name
    assert all(bool(after[name].any()) == (rel_pos == "slice") for name in tables)
    assert {name for name in untouched if "neck" in name}
    assert sum("mask_decoder" in name for name in untouched) > 50
    assert sum("prompt_encoder" in name for name in untouched) > 10
    assert embed(module, shown(1).pixels([0])).shape == (1, 32, 8, 8)
    for child in module.modules():
        if isinstance(child, torch.nn.LayerNorm):
            assert child.normalized_shape == tuple(child.weight.shape)
        elif isinstance(child, torch.nn.Linear):
            assert (child.out_features, child.in_features) == tuple(child.weight.shape)


@pytest.mark.parametrize("attn_scale", ["preserve", "reset"])
def test_heads_stay_and_lose_the_same_channels(attn_scale):
    module = tiny_sam()
    before = copy.deepcopy(module).vision_encoder.layers
    within, inner = unequal()
    decoder = {name: value.clone() for name, value in module.state_dict().items() if "vision" not in name}
    slice_bottleneck(module, within, inner, attn_scale=attn_scale, rel_pos="slice")
    assert all(torch.equal(module.state_dict()[name], value) for name, value in decoder.items())
    for old, new, kept, channels in zip(before, module.vision_encoder.layers, within, inner, strict=True):
        assert new.attn.num_attention_heads == old.attn.num_attention_heads == 4
        factor = (len(kept) / 12) ** 0.5 if attn_scale == "preserve" else 1.0
        for third, head in itertools.product(range(3), range(4)):
            rows = old.attn.qkv.weight[48 * third + 12 * head :][:12][kept]
            ours = new.attn.qkv.weight.unflatten(0, (3, 4, -1))[third, head]
            assert torch.allclose(ours, rows * (factor if third == 1 else 1.0), rtol=1e-6)
        for head in range(4):
            columns = old.attn.proj.weight[:, 12 * head :][:, :12][:, kept]
            assert torch.equal(new.attn.proj.weight.unflatten(1, (4, -1))[:, head], columns)
        assert torch.equal(new.attn.proj.bias, old.attn.proj.bias)
        assert torch.equal(new.mlp.lin1.weight, old.mlp.lin1.weight[channels])
        assert torch.equal(new.mlp.lin1.bias, old.mlp.lin1.bias[channels])
        assert torch.equal(new.mlp.lin2.weight, old.mlp.lin2.weight[:, channels])
        assert torch.equal(new.mlp.lin2.bias, old.mlp.lin2.bias)


def test_tables_keep_the_columns_of_the_channels_or_start_from_zero():
    within, inner = unequal()
    for rel_pos in ("slice", "zero"):
        module = tiny_sam()
        before = copy.deepcopy(module).vision_encoder.layers
        slice_bottleneck(module, within, inner, attn_scale="preserve", rel_pos=rel_pos)
        for index, (old, new, kept) in enumerate(
            zip(before, module.vision_encoder.layers, within, strict=True)
        ):
            positions = 15 if index == 2 else 5  # 8 tokens a side, or windows of 3
            for table in ("rel_pos_h", "rel_pos_w"):
                found = new.attn.get_parameter(table)
                assert found.shape == (positions, len(kept))
                expected = old.attn.get_parameter(table)[:, kept]
                assert expected.any()
                assert torch.equal(found, expected if rel_pos == "slice" else torch.zeros_like(expected))


def test_parameters_keep_their_flags_and_have_no_gradients():
    module = tiny_sam()
    encoder = module.vision_encoder
    encoder.layers[0].requires_grad_(True)
    for parameter in encoder.layers[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    embedding, within, inner = uniform()
    slice_embedding(module, embedding, rel_pos="slice")
    slice_bottleneck(module, within, inner, attn_scale="preserve", rel_pos="slice")
    flags = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert flags == [name for name, _ in module.named_parameters() if "vision_encoder.layers.0." in name]
    assert encoder.layers[0].mlp.lin2.weight.grad is None
    assert all(parameter.is_contiguous() for parameter in module.parameters())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("rel_pos", ["slice", "zero"])
def test_equal_widths_are_a_stock_model(attention, rel_pos):
    module, pixels = tiny_sam(attention=attention), shown(2).pixels([0, 1])
    embedding, within, inner = uniform()
    slice_embedding(module, embedding, rel_pos=rel_pos)
    slice_bottleneck(module, within, inner, attn_scale="preserve", rel_pos=rel_pos)
    stock = tiny_sam(seed=9, attention=attention, hidden_size=24, mlp_dim=40)
    stock.load_state_dict(module.state_dict(), strict=True)
    assert apart(module, stock, pixels) < 1e-6
    scales = [layer.attn.scale for layer in stock.vision_encoder.layers]
    assert [layer.attn.scale for layer in module.vision_encoder.layers] == scales


def test_the_order_of_the_cuts_does_not_matter():
    embedding, within, inner = uniform()
    one, other = tiny_sam(), tiny_sam()
    slice_embedding(one, embedding, rel_pos="slice")
    slice_bottleneck(one, within, inner, attn_scale="preserve", rel_pos="slice")
    slice_bottleneck(other, within, inner, attn_scale="preserve", rel_pos="slice")
    slice_embedding(other, embedding, rel_pos="slice")
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kept", [[], [3, 1], [1, 1], [-1, 2], [1, 48]])
def test_indices_that_do_not_fit_change_nothing(kept):
    kept, module = torch.tensor(kept, dtype=torch.int64), tiny_sam()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(StageError, match="residual stream"):
        slice_embedding(module, kept, rel_pos="zero")
    within, inner = unequal()
    for bad_within, bad_inner, what in (
        ([*within[:2], kept], inner, "heads of vision_encoder.layers.2"),
        (within, [inner[0], 2 * kept, inner[2]], "network of vision_encoder.layers.1"),
        (within[:2], inner, "2 attentions and 3"),
    ):
        with pytest.raises(StageError, match=what):
            slice_bottleneck(module, bad_within, bad_inner, attn_scale="preserve", rel_pos="zero")
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_replaced_linear_and_another_model_are_refused_by_name():
    module = tiny_sam()
    module.vision_encoder.layers[1].mlp.lin1 = torch.nn.Identity()
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.lin1 is a Identity") as caught:
        encoder_sites(module)
    assert "before quantizing" in caught.value.hint
    with pytest.raises(StageError, match="no Segment Anything model"):
        encoder_sites(torch.nn.Linear(2, 2))


VARIANTS = ({}, {"qkv_bias": False, "use_rel_pos": False}, {"use_abs_pos": False}, {"window_size": 4})


def saved(folder, **vision):
    return open_model(ModelRef(id=str(save_tiny_sam(folder, **vision))), progress=QUIET)


@pytest.fixture(params=range(len(VARIANTS)))
def model(request, tmp_path):
    return saved(tmp_path / "model", **VARIANTS[request.param])


def flat_attributes(surgery):
    return {name: dict(cut.attributes) for name, cut in surgery.items() if cut.attributes}


@pytest.mark.parametrize("equal_widths", [True, False])
def test_what_is_planned_is_what_a_cut_records(model, equal_widths):
    embedding, within, inner = uniform()
    if not equal_widths:
        within, inner = unequal()
    cut_embedding(model, embedding, rel_pos="slice")
    planned = planned_surgery(model.config, 24, [12] * 3, [96] * 3)
    assert list(model.surgery.items()) == list(planned.items())
    assert not flat_attributes(model.surgery)
    cut_bottleneck(model, within, inner, attn_scale="preserve", rel_pos="slice")
    counts = [[len(kept) for kept in one] for one in (within, inner)]
    planned = planned_surgery(model.config, 24, *counts)
    assert list(model.surgery.items()) == list(planned.items())
    real = {name: tuple(value.shape) for name, value in model.module.state_dict().items()}
    assert {name: real[name] for name in flat_shapes(planned)} == flat_shapes(planned)
    spec = model.dense()
    assert {name: tensor.shape for name, tensor in spec.tensors.items()} == real
    assert spec.parameters == sum(value.numel() for value in model.module.parameters())
    scales = [cut["scale"] for cut in flat_attributes(planned).values()]
    assert scales == [layer.attn.scale for layer in model.module.vision_encoder.layers]
    assert not planned_surgery(model.config, 48, [12] * 3, [96] * 3)


@pytest.mark.parametrize("rel_pos", ["slice", "zero"])
def test_what_is_recorded_builds_the_cut_model_again(model, rel_pos):
    cut_embedding(model, uniform()[0], rel_pos=rel_pos)
    cut_bottleneck(model, *unequal(), attn_scale="preserve", rel_pos=rel_pos)
    again = model.family.build(model.config).eval()
    apply_surgery(again, model.surgery)
    again.load_state_dict(model.module.state_dict(), strict=True)
    pixels = shown(1).pixels([0])
    assert torch.equal(embed(again, pixels), embed(model.module, pixels))


def test_a_whole_choice_on_one_model(tmp_path):
    """Score, choose and cut in turns, as the stage does: what one phase leaves alone keeps its size."""
    model = saved(tmp_path / "model")
    model.module = heavy_tailed()
    settings = SlimSamSettings(ratio=0.5, ranking="global")
    objective = DisturbedTaylor(shown(2), 0.01, 0)

    def chosen(**parts) -> Kept:
        found = score(
            model, objective, **parts, gradients="summed", recompute=True, folder=None, progress=QUIET
        )
        return choose(found, encoder_sites(model.module), settings)

    kept = chosen(embedding=True, bottleneck=False)
    cut_embedding(model, kept.embedding, rel_pos="slice")
    assert Widths.of(encoder_sites(model.module)) == Widths(24, (12,) * 3, (96,) * 3)
    kept = chosen(embedding=False, bottleneck=True)
    cut_bottleneck(model, kept.attention, kept.inner, attn_scale="preserve", rel_pos="slice")
    after = Widths.of(encoder_sites(model.module))
    assert after.embedding == 24
    assert 18 <= sum(after.head_dims) <= 21
    assert 144 <= sum(after.inner) <= 144 + 3 * 3
    assert all(inner % 4 == 0 for inner in after.inner)
    assert torch.isfinite(embed(model.module, shown(1).pixels([0]))).all()


@pytest.mark.parametrize(
    ("ratio", "between", "encoder", "parameters"),
    [(0.5, 45_209_472, 23_897_216, 27_962_032), (0.77, 20_199_912, 5_658_968, 9_723_784)],
)
def test_sizes_of_the_published_models(ratio, between, encoder, parameters):
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = transformers.SamModel(transformers.SamConfig())
    sites = encoder_sites(module)
    after = widths_after(Widths.of(sites), 12, SlimSamSettings(ratio=ratio))
    slice_embedding(module, torch.arange(after.embedding), rel_pos="slice")
    assert sum(value.numel() for value in module.vision_encoder.parameters()) == between
    slice_bottleneck(
        module,
        [torch.arange(head_dim) for head_dim in after.head_dims],
        [torch.arange(inner) for inner in after.inner],
        attn_scale="preserve",
        rel_pos="slice",
    )
    assert sum(value.numel() for value in module.vision_encoder.parameters()) == encoder
    assert sum(value.numel() for value in module.parameters()) == parameters
