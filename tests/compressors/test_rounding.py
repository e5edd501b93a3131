import pytest
import torch
from compress.compressors.quantization.grid import (
    Grid,
    QuantizedWeight,
    dequantize,
    find_steps,
    round_to_nearest,
)
from compress.compressors.quantization.low_rank import split
from compress.compressors.quantization.rounding import round_with_compensation
from compress.errors import StageError


def problem(seed=0, columns=160):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    rows = torch.randn(2000, columns, generator=generator) @ mix
    return torch.randn(48, columns, generator=generator), rows, rows.T @ rows / len(rows)


@pytest.mark.parametrize(
    "grid",
    [Grid(4, False, "minmax"), Grid(3, True, "mse"), Grid(4, False, "mse", 32), Grid(8, False, "minmax")],
    ids=str,
)
def test_compensation_lowers_the_output_error(grid):
    weight, rows, gram = problem()
    steps = find_steps(weight, grid)

    def error(q):
        return float(((dequantize(QuantizedWeight(q, steps)) - weight) @ rows.T).square().sum())

    q = round_with_compensation(weight, gram, steps, grid)
    low, high = grid.bounds
    assert int(q.min()) >= low
    assert int(q.max()) <= high
    assert error(q) < 0.9 * error(round_to_nearest(weight, steps, grid))
    assert torch.equal(q, round_with_compensation(weight, gram, steps, grid))


def test_white_inputs_leave_nothing_to_compensate():
    weight, _, _ = problem()
    grid = Grid(4, False, "minmax")
    steps = find_steps(weight, grid)
    q = round_with_compensation(weight, torch.eye(160), steps, grid)
    assert torch.equal(q, round_to_nearest(weight, steps, grid))


def test_dead_channels_and_singular_inputs_are_survived():
    weight, rows, _ = problem()
    rows = rows[:20].clone()
    rows[:, 7] = 0
    grid = Grid(4, False, "minmax")
    steps = find_steps(weight, grid)
    q = round_with_compensation(weight, rows.T @ rows, steps, grid)
    values = dequantize(QuantizedWeight(q, steps))
    assert (values - weight).abs().max() < 10 * weight.abs().max()


def test_inputs_that_are_not_finite_are_refused():
    weight, _, gram = problem()
    gram[0, 0] = float("nan")
    with pytest.raises(StageError, match="not finite"):
        round_with_compensation(
            weight, gram, find_steps(weight, Grid(4, True, "minmax")), Grid(4, True, "minmax")
        )


def test_correlations_that_cannot_be_inverted_name_the_layer():
    weight, _, _ = problem()
    grid = Grid(4, True, "minmax")
    with pytest.raises(StageError, match=r"blocks\.3\.to_q: .* cannot be inverted"):
        round_with_compensation(
            weight, -3e38 * torch.eye(160), find_steps(weight, grid), grid, "blocks.3.to_q"
        )


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_the_branch_is_the_truncated_svd(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    down, up = split(weight, 5, torch.float32)
    assert down.shape == (5, shape[1])
    assert up.shape == (shape[0], 5)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = left[:, :5] * values[:5] @ right[:5]
    torch.testing.assert_close(up @ down, expected, rtol=1e-3, atol=1e-3)
