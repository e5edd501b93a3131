"""The DiT adapter, on a tiny model and on the published DiT-XL/2 shapes."""

from __future__ import annotations

import json

import pytest
import torch
from compress.models.open import read_spec
from compress.models.registry import family_for
from compress.recipes.patterns import select
from compress.recipes.schema import ModelRef

from ..dit_xl import CONFIG, FIGURES, POSITIONS, WHOLE

CLASS = "DiTTransformer2DModel"
# Nothing but what the class does not assume by itself.
XL = {
    name: CONFIG[name]
    for name in (
        "_class_name", "num_layers", "num_attention_heads", "attention_head_dim", "in_channels",
        "out_channels", "sample_size", "patch_size", "num_embeds_ada_norm",
    )
}  # fmt: skip


@pytest.fixture
def xl(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(XL))
    return read_spec(ModelRef(id=str(tmp_path)))


def test_published_size(xl):
    assert (xl.parameters_stored, xl.parameters) == (WHOLE.parameters_stored, WHOLE.parameters)
    assert xl.parameters + POSITIONS == WHOLE.published
    assert xl.size().bytes == 2 * xl.parameters


def test_published_work(xl):
    assert xl.family.macs(xl.config) == pytest.approx(WHOLE.macs, rel=0.005)
    assert xl.family.macs(xl.config, attention_products=False) == pytest.approx(WHOLE.linear_macs, rel=0.001)


@pytest.mark.parametrize(("layers", "told"), FIGURES.items())
def test_work_of_shallower_models(xl, layers, told):
    config = dict(xl.config) | {"num_layers": layers}
    assert xl.family.macs(config) == pytest.approx(told.macs, rel=0.005)
    assert xl.family.macs(config, attention_products=False) == pytest.approx(told.linear_macs, rel=0.001)


def test_shares_of_the_xl_model(xl):
    """Counted by hand from the architecture: blocks 446.2 M, adaLN 223.1 M."""
    shapes = {site.name: site for site in xl.family.linears(xl.meta_module())}
    count = {True: 0, False: 0}
    for site in shapes.values():
        if site.role.startswith(("attention", "ff", "adaln")):
            count[site.role == "adaln"] += site.shape[0] * site.shape[1] + site.shape[0]
    assert count[False] == pytest.approx(446.2e6, rel=0.001)
    assert count[True] == pytest.approx(223.1e6, rel=0.001)


def test_forward_order(open_tiny, check_forward_order):
    check_forward_order(open_tiny(CLASS))


@pytest.mark.parametrize(
    "config", [{}, {"activation_fn": "geglu"}, {"patch_size": 4, "out_channels": 4}, {"num_layers": 3}]
)
def test_macs(open_tiny, check_macs, config):
    check_macs(open_tiny(CLASS, **config))


@pytest.mark.parametrize("config", [{}, {"norm_elementwise_affine": True}, {"attention_bias": False}])
def test_folds(open_tiny, check_folds, config):
    check_folds(open_tiny(CLASS, **config), groups=6)


def test_roles_and_default_keep(open_tiny):
    model = open_tiny(CLASS)
    roles = [site.role for site in model.linears() if site.block == 1]
    assert roles == [
        "embedder", "embedder", "adaln", "attention.q", "attention.k", "attention.v", "attention.out",
        "ff.in", "ff.out",
    ]  # fmt: skip
    kept = select(model.family.default_keep(), [site.name for site in model.linears()])
    assert set(kept) == {site.name for site in model.linears() if site.role in ("embedder", "head")}
    assert set(kept.values()) == set(model.family.default_keep())


def test_structure(open_tiny):
    model = open_tiny(CLASS)
    assert [name for name, _ in model.family.blocks(model.module)] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
    ]
    assert [name for name, _ in model.family.attentions(model.module)] == [
        "transformer_blocks.0.attn1", "transformer_blocks.1.attn1",
    ]  # fmt: skip


def test_replicas_are_the_embedders(open_tiny):
    model = open_tiny(CLASS)
    groups = model.family.replicas(model.config)
    names = {name for name, _ in model.module.named_parameters() if ".norm1.emb." in name}
    assert {name for group in groups for name in group} == names
    assert all(len(group) == 2 and group[0].startswith("transformer_blocks.0.") for group in groups)


def test_example_inputs_are_seeded_and_in_range(open_tiny):
    model = open_tiny(CLASS)
    one, two = (
        model.family.example_inputs(model.module, 64, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["hidden_states"].shape == (64, 4, 8, 8)
    assert one["class_labels"].max() < 10
    assert model.module.half().dtype == torch.float16
    assert (
        model.family.example_inputs(model.module, 1, torch.Generator())["hidden_states"].dtype
        == torch.float16
    )


def test_quantized_linears_keep_their_sites(open_tiny):
    from compress.runtime.manifest import QuantizedModule

    class Quantized(torch.nn.Module):
        scheme = QuantizedModule(shape=(256, 64), bits=8, symmetric=True, bias=True, method="rtn")

    model = open_tiny(CLASS)
    before = model.linears()
    model.module.transformer_blocks[0].ff.net[0].proj = Quantized()
    assert model.linears() == before


def test_unknown_linears_are_a_defect(open_tiny):
    model = open_tiny(CLASS)
    model.module.extra = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError, match="extra"):
        model.linears()


def test_registered():
    assert CLASS in family_for(CLASS).class_names
