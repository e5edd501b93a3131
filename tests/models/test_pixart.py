"""The PixArt adapter on tiny models, with and without size conditions."""

from __future__ import annotations

import pytest
from compress.recipes.patterns import select

CLASS = "PixArtTransformer2DModel"
ALPHA = {"use_additional_conditions": True, "attention_head_dim": 24, "cross_attention_dim": 96}
CONFIGS = [{}, ALPHA, {"cross_attention_dim": 48, "caption_channels": None}, {"activation_fn": "geglu"}]


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_order(open_tiny, check_forward_order, config):
    check_forward_order(open_tiny(CLASS, **config))


@pytest.mark.parametrize("config", CONFIGS)
def test_macs(open_tiny, check_macs, config):
    check_macs(open_tiny(CLASS, **config))


def test_folds(open_tiny, check_folds):
    check_folds(open_tiny(CLASS), groups=4)


def test_roles_and_default_keep(open_tiny):
    model = open_tiny(CLASS, **ALPHA)
    kept = select(model.family.default_keep(), [site.name for site in model.linears()])
    assert set(kept) == {site.name for site in model.linears() if site.role in ("embedder", "head")}
    assert [site.name for site in model.linears() if site.role == "adaln"] == ["adaln_single.linear"]
    assert sum(site.role.startswith("cross.") for site in model.linears()) == 8
    assert model.spec.shared == {}


def test_attentions(open_tiny):
    model = open_tiny(CLASS)
    assert [name for name, _ in model.family.attentions(model.module)] == [
        "transformer_blocks.0.attn1", "transformer_blocks.0.attn2",
        "transformer_blocks.1.attn1", "transformer_blocks.1.attn2",
    ]  # fmt: skip
