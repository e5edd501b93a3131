"""Measures against cases worked by hand."""

import math

import pytest
import torch
from compress.evaluation.metrics import (
    PERFECT_DB,
    class_agreement,
    decibels,
    frechet_distance,
    moments,
    psnr_db,
    sqnr_db,
    ssim,
)


def test_sqnr_of_a_case_worked_by_hand():
    reference = torch.tensor([3.0, 4.0])  # power 25
    other = torch.tensor([3.0, 4.5])  # error power 0.25
    assert sqnr_db(reference, other) == pytest.approx(20.0)


def test_sqnr_does_not_change_with_the_scale_and_is_capped_at_equality():
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    other = reference + 0.01
    assert sqnr_db(reference, other) == pytest.approx(sqnr_db(8 * reference, 8 * other), abs=1e-6)
    assert sqnr_db(reference, reference) == PERFECT_DB


def test_decibels_of_silence():
    assert decibels(0.0, 1.0) == -PERFECT_DB
    assert decibels(0.0, 0.0) == PERFECT_DB
    assert decibels(1.0, 10.0) == pytest.approx(-10.0)


def test_sqnr_accumulates_in_double_precision():
    # In bfloat16 the sum of a million ones stops at 256.
    reference = torch.ones(1_000_000, dtype=torch.bfloat16)
    assert sqnr_db(reference, reference * 2) == pytest.approx(0.0, abs=1e-9)


def test_unequal_shapes_are_refused():
    for measure in (sqnr_db, lambda a, b: psnr_db(a, b, 1.0), lambda a, b: ssim(a, b, 1.0)):
        with pytest.raises(ValueError, match="differ"):
            measure(torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 12, 13))


def test_psnr_is_the_mean_over_images():
    reference = torch.zeros(2, 1, 4, 4)
    other = reference.clone()
    other[0] += 0.2  # range 2: 10 log10(4 / 0.04) = 20 dB
    other[1] += 0.02  # 40 dB
    assert psnr_db(reference, other, 2.0) == pytest.approx(30.0, abs=1e-4)


def test_ssim_of_equal_images_is_one():
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert ssim(images, images, 1.0) == pytest.approx(1.0)


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b, data_range = 0.25, 0.75, 1.0
    c1 = (0.01 * data_range) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b), data_range) == pytest.approx(
        expected, abs=1e-9
    )


def _ssim_by_loops(a: torch.Tensor, b: torch.Tensor, size: int, data_range: float) -> float:
    """The definition, window by window, on two images [H, W]."""
    offsets = [index - (size - 1) / 2 for index in range(size)]
    line = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in offsets]
    total = sum(line) ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for top in range(a.shape[0] - size + 1):
        for left in range(a.shape[1] - size + 1):
            weights = [(i, j, line[i] * line[j] / total) for i in range(size) for j in range(size)]
            x = [(float(a[top + i, left + j]), float(b[top + i, left + j]), w) for i, j, w in weights]
            mean_a, mean_b = sum(p * w for p, _, w in x), sum(q * w for _, q, w in x)
            var_a = sum((p - mean_a) ** 2 * w for p, _, w in x)
            var_b = sum((q - mean_b) ** 2 * w for _, q, w in x)
            cov = sum((p - mean_a) * (q - mean_b) * w for p, q, w in x)
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * cov + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return sum(values) / len(values)


@pytest.mark.parametrize(("side", "window"), [(14, 11), (12, 11), (8, 7), (5, 5)])
def test_ssim_is_the_definition(side, window):
    generator = torch.Generator().manual_seed(side)
    a = torch.rand(side, side, generator=generator, dtype=torch.float64)
    b = (a + 0.2 * torch.rand(side, side, generator=generator, dtype=torch.float64)).clamp(0, 1)
    assert ssim(a[None, None], b[None, None], 1.0) == pytest.approx(
        _ssim_by_loops(a, b, window, 1.0), abs=1e-10
    )


def test_moments_by_hand():
    mean, covariance = moments(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert mean.tolist() == [1.0, 2.0]
    assert covariance.tolist() == [[2.0, 4.0], [4.0, 8.0]]


def test_frechet_distance_of_diagonal_gaussians():
    # (1 - 3)^2 + (sqrt 4 - sqrt 1)^2 + (sqrt 9 - sqrt 16)^2
    distance = frechet_distance(
        torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([4.0, 9.0])),
        torch.tensor([3.0, 0.0]), torch.diag(torch.tensor([1.0, 16.0])),
    )  # fmt: skip
    assert distance == pytest.approx(4 + 1 + 1)


def test_frechet_distance_against_the_general_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = a @ a.T, b @ b.T
    root = linalg.sqrtm((a @ b).numpy()).real
    expected = float(a.trace() + b.trace()) - 2 * float(root.trace())
    zero = torch.zeros(6)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a))


def test_frechet_distance_of_equal_gaussians_is_zero_even_when_singular():
    covariance = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    assert frechet_distance(torch.ones(3), covariance, torch.ones(3), covariance) == pytest.approx(
        0, abs=1e-12
    )


def test_class_agreement():
    assert class_agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match="labels"):
        class_agreement(torch.tensor([1]), torch.tensor([1, 2]))
