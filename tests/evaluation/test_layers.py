"""Per-block and per-linear error, each block on the original's own input."""

import weakref

import pytest
import torch
from compress.evaluation import layers
from compress.evaluation.layers import ROLES, compare_layers, record_layers
from compress.evaluation.metrics import PERFECT_DB
from safetensors.torch import load_file

CLASSES = (
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel",
)  # fmt: skip


def _inputs(model):
    return model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))


def _spoil(model, name, amount=0.05):
    weight = model.module.get_submodule(name).weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight += amount * weight.std() * noise


def _hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.module.modules())


@pytest.mark.parametrize("class_name", CLASSES)
def test_an_unchanged_model_has_no_error_and_keeps_no_hooks(open_tiny, class_name, tmp_path):
    model = open_tiny(class_name)
    inputs = _inputs(model)
    record_layers(model, inputs, tmp_path)
    sums = {}
    compare_layers(model, inputs, tmp_path, sums)
    blocks = [name for name, _ in model.family.blocks(model.module)]
    linears = {site.name for site in model.linears() if site.block is not None and site.role in ROLES}
    absorbing = {name for fold in model.family.folds(model.module) for name in fold.producers}
    assert set(sums) == {*blocks, *linears} - absorbing
    assert all(value.sqnr_db == PERFECT_DB for value in sums.values())
    assert _hooks(model) == 0


@pytest.mark.parametrize("class_name", CLASSES)
def test_an_error_stays_in_its_block(open_tiny, class_name, tmp_path):
    model = open_tiny(class_name)
    inputs = _inputs(model)
    record_layers(model, inputs, tmp_path)
    blocks = [name for name, _ in model.family.blocks(model.module)]
    target = next(site for site in model.linears() if site.role == "ff.out")
    _spoil(model, target.name)
    sums = {}
    compare_layers(model, inputs, tmp_path, sums)
    assert sums[target.name].sqnr_db == pytest.approx(26.0, abs=2.0)  # 1 / 0.05^2 = 26 dB
    spoiled = blocks.pop(target.block)
    assert sums[spoiled].sqnr_db < 60
    # A U-Net's way up reads what the spoiled block of the way down left: the original's, here.
    assert all(sums[name].sqnr_db == PERFECT_DB for name in blocks)


@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "UNet2DConditionModel"])
def test_a_folded_scale_is_no_error(open_tiny, tmp_path, class_name):
    """What a fold changes inside a pair of layers must not look like an error of either."""
    model = open_tiny(class_name)
    inputs = _inputs(model)
    record_layers(model, inputs, tmp_path)
    for fold in model.family.folds(model.module):
        first = model.module.get_submodule(fold.targets[0])
        m = torch.linspace(0.5, 2.0, first.in_features)
        fold.absorb(model.module, m)
        with torch.no_grad():
            for name in fold.targets:
                model.module.get_submodule(name).weight.div_(m)
    sums = {}
    compare_layers(model, inputs, tmp_path, sums)
    assert min(value.sqnr_db for value in sums.values()) > 90


def test_a_convolutions_rows_are_pixels(open_tiny, tmp_path):
    model = open_tiny("UNet2DConditionModel", sample_size=32)
    record_layers(model, _inputs(model), tmp_path)
    rows = load_file(tmp_path / "down_blocks.0.safetensors")["rows|down_blocks.0.resnets.0.conv1"]
    seen = []
    handle = (
        model.module.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *call: seen.append(call[2]))
    )
    with torch.no_grad():
        model.module(**_inputs(model))
    handle.remove()
    assert rows.shape == (2, 64, 32)
    assert torch.equal(rows[:, 1], seen[0][:, :, 0, 16])  # every 16th of 32 * 32


def test_hooks_are_gone_after_a_failure(open_tiny, tmp_path):
    model = open_tiny("DiTTransformer2DModel")
    inputs = _inputs(model)
    inputs["hidden_states"] = inputs["hidden_states"][:, :1]
    with pytest.raises(RuntimeError):
        record_layers(model, inputs, tmp_path)
    assert _hooks(model) == 0


@pytest.mark.parametrize("class_name", CLASSES)
def test_memory_holds_one_block(open_tiny, class_name, tmp_path, monkeypatch):
    """What is kept of a block is on the disk and forgotten before the next block begins."""
    kept, live = [], []
    keep = layers._Recorder._keep

    def count(self, name, tensor):
        keep(self, name, tensor)
        kept.append(weakref.ref(self._found[name]))
        live.append(sum(reference() is not None for reference in kept))

    monkeypatch.setattr(layers._Recorder, "_keep", count)
    model = open_tiny(class_name)
    record_layers(model, _inputs(model), tmp_path / "layers")
    blocks = [name for name, _ in model.family.blocks(model.module)]
    assert {path.stem for path in (tmp_path / "layers").iterdir()} == set(blocks)
    assert len(blocks) > 1
    assert max(live) < 0.6 * len(kept)  # of two blocks, which need not be equally large
