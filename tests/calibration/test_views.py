"""Convolutions: observers see every window once, in bounded parts; sensitivities know them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from compress.calibration import views as views_module
from compress.calibration.diffusion import record
from compress.calibration.sensitivity import Candidate, Target, measure
from compress.calibration.sensitivity_calls import RecordedCalls
from compress.calibration.similarity import powers
from compress.calibration.statistics import ChannelAbsMax, Gram, RowSample
from compress.calibration.views import views
from compress.compressors.quantization.grid import Grid, dequantize, quantize
from compress.errors import StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from torch import nn
from torch.nn import functional as F

QUIET = SilentProgress()
SETTINGS = CalibrationSettings(samples=4, steps=3, guidance_scale=3.0, batch_size=2)
PATCHES = "pos_embed.proj"


@pytest.fixture
def recorded(tiny_dit, tmp_path):
    """A model whose first layer is a convolution, and a recording of it."""
    model = open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)
    return model, record(model, SETTINGS, seed=3, cache=tmp_path, progress=QUIET)


def unfolded(model, calibration):
    """Windows of all calls, found by the stock function: [calls, batch, positions, columns]."""
    conv = model.module.get_submodule(PATCHES)
    return torch.stack(
        [
            F.unfold(call["hidden_states"], conv.kernel_size, stride=conv.stride).transpose(1, 2)
            for call in calibration.calls()
        ]
    )


@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_statistics_of_windows_do_not_depend_on_the_parts(recorded, monkeypatch, elements):
    model, calibration = recorded
    monkeypatch.setattr(views_module, "WINDOW_ELEMENTS", elements)
    expected = unfolded(model, calibration)
    rows = expected.flatten(0, 2)
    maximum, gram, sample = ChannelAbsMax(per_timestep=True), Gram(), RowSample(7, torch.Generator())
    everything = RowSample(len(rows), torch.Generator())
    largest = 0

    def observe(name, x, timesteps):
        nonlocal largest
        largest = max(largest, x.numel())
        assert (name, len(timesteps)) == (PATCHES, len(x))
        for statistic in (maximum, gram, sample, everything):
            statistic.update(x, timesteps)

    calibration.observe(model, [PATCHES], observe, QUIET)
    assert torch.equal(maximum.maximum, rows.abs().amax(0))
    times = [float(call["timestep"][0]) for call in calibration.calls()]
    for time in set(times):
        of_time = expected[torch.tensor([other == time for other in times])]
        assert torch.equal(maximum.by_timestep[time], of_time.abs().flatten(0, 2).amax(0))
    assert torch.allclose(gram.mean(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    assert gram.rows == sample.seen == len(rows)
    found, wanted = (sorted(map(tuple, some.tolist())) for some in (everything.rows, rows))
    assert found == wanted
    assert set(map(tuple, sample.rows.tolist())) <= set(wanted)
    side = expected.shape[2] ** 0.5
    assert largest <= max(elements, side * expected.shape[3])


def test_a_convolution_that_is_no_product_of_windows_is_named():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    with pytest.raises(StageError, match=r"down\.conv: Conv2d\(4, 4.*is no product of one weight"):
        list(views("down.conv", conv, torch.zeros(1, 4, 5, 5), torch.zeros(1)))


@contextmanager
def rounded(name, layer, candidate):
    before = layer.weight
    grid = Grid(candidate.bits, symmetric=True, clip="minmax")
    weight = dequantize(quantize(before.detach().flatten(1), grid)).view_as(before)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    yield
    layer.weight = before


def test_a_convolution_is_measured_and_restored(recorded, tmp_path):
    model, calibration = recorded
    calls = RecordedCalls(calibration, 2)
    before = model.module.get_submodule(PATCHES).weight.detach().clone()
    candidates = tuple(Candidate("weight", f"w{bits}", bits) for bits in (2, 4, 8))

    def run(targets):
        path = tmp_path / f"{targets[0].layer}.jsonl"
        return measure(model, calls, targets, rounded, path=path, settings={}, threads=1, progress=QUIET)

    rows = run([Target(PATCHES, candidates)]).rows
    assert torch.equal(model.module.get_submodule(PATCHES).weight, before)
    assert [row.label for row in rows] == ["w2", "w4", "w8"]
    assert rows[0].value + 6 < rows[1].value < rows[2].value - 12

    exact = [model.module(**call, return_dict=False)[0] for call in calls]
    with rounded(PATCHES, model.module.get_submodule(PATCHES), candidates[1]):
        after = [model.module(**call, return_dict=False)[0] for call in calls]
    pairs = [powers(one, other) for one, other in zip(exact, after, strict=True)]
    assert rows[1].loss == sum(noise for _, noise in pairs) / sum(signal for signal, _ in pairs)

    norm = "transformer_blocks.0.norm3"
    with pytest.raises(StageError, match=f"{norm}: a LayerNorm, not a linear layer or convolution"):
        run([Target(norm, candidates)])
