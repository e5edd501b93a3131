"""Entering a model at a block: equal bit by bit, or not done at all."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.suffix import Kept, SuffixRunner
from compress.errors import StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from torch import nn


class Toy(nn.Module):
    """Four blocks between a stem and a head; `wiring` says what else is connected."""

    def __init__(self, wiring="chain"):
        super().__init__()
        self.wiring = wiring
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.calls = [0] * 4
        for index, block in enumerate(self.blocks):
            block.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index):
        self.calls[index] += 1

    def forward(self, x, return_dict=True):
        x = self.stem(x)
        first = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            first = x if index == 0 else first
            if self.wiring == "in place":
                x += 1
        if self.wiring == "skip":
            x = x + first
        if self.wiring == "again":
            x = self.blocks[0](x)
        if self.wiring == "inner":
            x = self.blocks[0][0](x)
        return (self.head(x),)


NAMES = ["stem", "blocks.0.0", "blocks.1.0", "blocks.3.0", "head"]


def toy(wiring):
    torch.manual_seed(0)
    model = Toy(wiring).eval().requires_grad_(False)
    call = {"x": torch.randn(3, 6)}
    return model, call, SuffixRunner(model, list(model.blocks), call, NAMES)


@pytest.mark.parametrize(
    ("wiring", "mode"),
    [("chain", "last"), ("inner", "last"), ("skip", "all"), ("in place", "whole"), ("again", "whole")],
)
def test_what_is_kept_follows_the_wiring(wiring, mode):
    model, call, runner = toy(wiring)
    assert runner.mode == mode
    entries = [0, 0, 0, 0, 0] if mode == "whole" else [0, 0, 1, 3, 4]
    assert runner.entries == dict(zip(NAMES, entries, strict=True))
    for name in NAMES:
        layer, kept = model.get_submodule(name), runner.keep(call, runner.entries[name])
        before = layer.weight.clone()
        layer.weight.mul_(1.5)
        assert torch.equal(runner.run(call, kept), model(**call)[0]), name
        layer.weight.copy_(before)


def test_blocks_before_the_entry_do_not_compute():
    model, call, runner = toy("chain")
    inner = [0] * 4
    for index, block in enumerate(model.blocks):
        block[0].register_forward_hook(lambda *_, index=index: inner.__setitem__(index, inner[index] + 1))
    kept = runner.keep(call, 3)
    assert inner == [1, 1, 1, 0]  # and the last one is not reached
    assert set(kept.outputs) == {2}
    assert kept.bytes == 3 * 6 * 4
    runner.run(call, kept)
    assert inner == [1, 1, 1, 1]


def test_nothing_stays_in_the_model():
    model, call, runner = toy("skip")
    hooks = [len(block._forward_hooks) for block in model.blocks]
    kept = runner.keep(call, 2)
    model.head.weight.data = torch.zeros(1)  # breaks the forward
    with pytest.raises(RuntimeError):
        runner.run(call, kept)
    with pytest.raises(RuntimeError):
        runner.run(call, Kept(0))
    assert [len(block._forward_hooks) for block in model.blocks] == hooks == [1] * 4
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert all(not block._forward_pre_hooks for block in model.blocks)


def test_a_forward_of_its_own_is_put_back():
    model, call, runner = toy("chain")
    own = model.blocks[0].forward
    model.blocks[0].forward = own
    runner.run(call, runner.keep(call, 2))
    assert model.blocks[0].__dict__["forward"] is own


def test_a_tied_weight_is_changed_everywhere():
    torch.manual_seed(0)
    model = Toy().eval().requires_grad_(False)
    model.head.weight = model.blocks[0][0].weight
    runner = SuffixRunner(model, list(model.blocks), {"x": torch.randn(3, 6)}, ["head", "blocks.2.0"])
    assert runner.entries == {"head": 0, "blocks.2.0": 2}


def test_unknown_and_unreached_layers_are_refused():
    model = Toy().eval()
    model.unused = nn.Linear(6, 6)
    for name, message in (("nowhere", "no such layer"), ("unused", "no recorded call reaches")):
        with pytest.raises(StageError, match=message):
            SuffixRunner(model, list(model.blocks), {"x": torch.zeros(1, 6)}, [name])


@pytest.mark.parametrize(
    ("class_name", "mode"),
    [
        ("DiTTransformer2DModel", "last"), ("PixArtTransformer2DModel", "last"),
        ("SD3Transformer2DModel", "last"), ("UNet2DConditionModel", "all"),
    ],
)  # fmt: skip
def test_what_the_families_keep_of_a_call(make_tiny, class_name, mode):
    ref = ModelRef(id=str(make_tiny(class_name)))
    model = open_model(ref, progress=SilentProgress())
    call = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    sites = model.linears()
    blocks = [block for _, block in model.family.blocks(model.module)]
    runner = SuffixRunner(model.module, blocks, call, [site.name for site in sites])
    assert runner.mode == mode
    for site in sites:
        outside = 0 if runner.entries[site.name] == 0 else len(blocks)
        assert runner.entries[site.name] == (outside if site.block is None else site.block), site.name
