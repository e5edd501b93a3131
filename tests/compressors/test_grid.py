import pytest
import torch
from compress.compressors.quantization.grid import (
    Grid,
    QuantizedWeight,
    dequantize,
    find_steps,
    quantize,
    rescaled,
    round_to_nearest,
)

WEIGHT = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) * 0.05
GRIDS = [
    Grid(bits, symmetric, clip, group)
    for bits in (2, 3, 4, 6, 8)
    for symmetric in (True, False)
    for clip in ("minmax", "mse")
    for group in (None, 32)
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shapes_dtypes_and_range(grid):
    q, (scale, zero) = quantize(WEIGHT, grid)
    groups = 3 if grid.group_size else 1
    assert q.dtype == torch.int8
    assert q.shape == WEIGHT.shape
    assert scale.shape == (24, groups)
    assert scale.dtype == (torch.float16 if grid.group_size else torch.float32)
    assert (zero is None) == grid.symmetric
    assert zero is None or zero.dtype == (torch.int16 if grid.bits == 8 else torch.int8)
    low, high = grid.bounds
    assert int(q.min()) >= low
    assert int(q.max()) <= high


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.clip == "minmax"], ids=str)
def test_min_max_clips_nothing(grid):
    quantized = quantize(WEIGHT, grid)
    error = (dequantize(quantized) - WEIGHT).abs().view(24, quantized.steps.scale.shape[1], -1)
    assert (error <= quantized.steps.scale.float().unsqueeze(-1) * 0.50001).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_asymmetric_grid_is_the_papers(bits):
    q, (scale, zero) = quantize(WEIGHT, Grid(bits, False, "minmax"))
    w = WEIGHT.double()
    high, low = w.amax(1, keepdim=True).clamp_min(0), w.amin(1, keepdim=True).clamp_max(0)
    step = (high - low) / (2**bits - 1)
    offset = torch.round(low / step) + 2 ** (bits - 1)
    torch.testing.assert_close(scale.double(), step, rtol=1e-7, atol=0)
    assert torch.equal(zero.double(), offset)
    expected = (torch.round(w / step) - offset).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    # Values that fall on a tie in float64 may fall on either side of it in float32.
    assert (q.double() - expected).abs().max() <= 1
    assert ((q.double() != expected).double().mean()) < 1e-3


def test_a_row_worked_by_hand():
    q, (scale, zero) = quantize(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), Grid(2, False, "minmax"))
    assert scale.tolist() == [[1.0]]
    assert zero.tolist() == [[1]]
    assert q.tolist() == [[-2, -1, -1, 1]]  # 0.5 rounds to the even 0
    assert quantize(torch.tensor([[-1.0, 7.0]]), Grid(4, True, "minmax")).q.tolist() == [[-1, 7]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_clipping_lowers_the_error(symmetric):
    for bits in (2, 3, 4):
        errors = [
            float((dequantize(quantize(WEIGHT, Grid(bits, symmetric, clip))) - WEIGHT).square().sum())
            for clip in ("minmax", "mse")
        ]
        assert errors[1] < errors[0]


def test_gaussian_rows_reach_the_known_error():
    weight = torch.randn(256, 1152, generator=torch.Generator().manual_seed(1))

    def sqnr(grid):
        error = (dequantize(quantize(weight, grid)) - weight).square().sum()
        return float(10 * torch.log10(weight.square().sum() / error))

    assert sqnr(Grid(4, True, "minmax")) == pytest.approx(16.8, abs=0.5)
    assert sqnr(Grid(4, False, "minmax")) == pytest.approx(17.9, abs=0.5)
    assert sqnr(Grid(4, True, "mse")) == pytest.approx(19.3, abs=0.7)


def test_importance_moves_the_error_to_columns_that_do_not_matter():
    importance = torch.ones(96)
    importance[:8] = 1000.0
    grid = Grid(3, False, "mse")
    plain, weighted = (dequantize(quantize(WEIGHT, grid, how)) for how in (None, importance))

    def cost(values):
        return float(((values - WEIGHT).square() * importance).sum())

    assert cost(weighted) < cost(plain)


def test_rounding_is_idempotent_and_zero_rows_stay_zero():
    weight = WEIGHT.clone()
    weight[3] = 0
    for grid in GRIDS:
        quantized = quantize(weight, grid)
        values = dequantize(quantized)
        assert torch.equal(round_to_nearest(values, quantized.steps, grid), quantized.q)
        assert values[3].abs().max() < 1e-5


def test_steps_do_not_depend_on_the_chunks():
    grid = Grid(4, False, "mse", 32)
    whole = find_steps(WEIGHT, grid)
    halves = [find_steps(part, grid) for part in WEIGHT.split(5)]
    assert torch.equal(whole.scale, torch.cat([part.scale for part in halves]))
    assert torch.equal(whole.zero, torch.cat([part.zero for part in halves]))


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.clip == "mse" and g.bits <= 4], ids=str)
def test_a_rescaled_weight_is_as_long_along_the_original(grid):
    rounded = quantize(WEIGHT, grid)
    steps = rescaled(WEIGHT, rounded, grid)

    def shares(scale_of):
        parts = [item.double().view(24, steps.scale.shape[1], -1) for item in (WEIGHT, dequantize(scale_of))]
        return (parts[0] * parts[1]).sum(-1) / parts[0].square().sum(-1)

    before, after = shares(rounded), shares(QuantizedWeight(rounded.q, steps))
    assert before.mean() < 1 - 1e-4  # clipping has shrunk it
    assert torch.allclose(after, torch.ones_like(after), atol=2e-3 if grid.group_size else 1e-5)
    assert steps.scale.dtype == rounded.steps.scale.dtype


def test_a_rescaled_weight_gives_outputs_as_large_on_its_inputs():
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 96)
    gram, grid = x.T @ x / len(x), Grid(2, True, "mse", 32)
    rounded = quantize(WEIGHT, grid, gram.diagonal())
    steps = rescaled(WEIGHT, rounded, grid, gram)
    y, found = x @ WEIGHT.T, x @ dequantize(QuantizedWeight(rounded.q, steps)).T
    share = (y * found).sum(0) / y.square().sum(0)
    assert torch.allclose(share, torch.ones_like(share), atol=2e-3)
    ratio = steps.scale / rounded.steps.scale
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=2e-3)  # one factor per output


def test_weights_of_zeros_keep_their_scale():
    weight = WEIGHT.clone()
    weight[3] = 0
    rounded = quantize(weight, Grid(4, True, "mse"))
    steps = rescaled(weight, rounded, Grid(4, True, "mse"))
    assert steps.scale[3] == rounded.steps.scale[3]
    assert torch.isfinite(steps.scale).all()
