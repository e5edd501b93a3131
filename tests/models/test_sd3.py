"""The MMDiT adapter on tiny models, with and without dual attention and query norms."""

from __future__ import annotations

import pytest
from compress.recipes.patterns import select

CLASS = "SD3Transformer2DModel"
DUAL = {"dual_attention_layers": (0,), "qk_norm": "rms_norm", "num_layers": 3}
CONFIGS = [{}, DUAL, {"dual_attention_layers": (1,)}]


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_order(open_tiny, check_forward_order, config):
    check_forward_order(open_tiny(CLASS, **config))


@pytest.mark.parametrize("config", CONFIGS)
def test_macs(open_tiny, check_macs, config):
    check_macs(open_tiny(CLASS, **config))


@pytest.mark.parametrize(("config", "groups"), [({}, 9), (DUAL, 16)])
def test_folds(open_tiny, check_folds, config, groups):
    # A block has five groups, the last one four, and dual attention adds two.
    check_folds(open_tiny(CLASS, **config), groups)


def test_roles_and_default_keep(open_tiny):
    model = open_tiny(CLASS, **DUAL)
    kept = select(model.family.default_keep(), [site.name for site in model.linears()])
    assert set(kept) == {site.name for site in model.linears() if site.role in ("embedder", "head")}
    adaln = [site.name for site in model.linears() if site.role == "adaln"]
    assert adaln[-1] == "norm_out.linear"
    assert len(adaln) == 7


def test_the_stored_position_table_is_no_parameter(open_tiny):
    model = open_tiny(CLASS)
    assert "pos_embed.pos_embed" in model.spec.tensors
    assert model.spec.parameters == sum(parameter.numel() for parameter in model.module.parameters())
