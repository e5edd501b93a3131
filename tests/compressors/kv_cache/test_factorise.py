"""Factors of a weight: the published formulas, the closed-form optimum, and what both lose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress.compressors.kv_cache.energies import Energy
from compress.compressors.kv_cache.factorise import (
    Pair,
    asvd_scale,
    factorise,
    lost_share,
    mean_square_error,
    random_pair,
    scaled,
    spectrum_of,
    weight_of,
)
from compress.errors import StageError
from torch import nn

HIDDEN, WIDTH = 12, 8


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def weight():
    return torch.randn(WIDTH, HIDDEN, generator=seeded(1), dtype=torch.float64)


@pytest.fixture
def x():
    """Inputs of very different channels that depend on each other, 200 tokens."""
    mixed = torch.randn(200, HIDDEN, generator=seeded(2), dtype=torch.float64)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=seeded(3), dtype=torch.float64)
    return mixed @ mixing * torch.logspace(-1, 1, HIDDEN, dtype=torch.float64) + 0.5


def energy_of(x):
    return Energy(x.T @ x / len(x), x.abs().mean(dim=0), len(x))


def made(weight, x, rank, init, alpha=0.5):
    energy = energy_of(x)
    spectrum = spectrum_of(weight, energy.gram)
    return factorise(weight, energy, spectrum, rank, init, alpha=alpha, generator=seeded())


def product(pair):
    return (pair.b.double() @ pair.a.double()).numpy()


@pytest.mark.parametrize("rank", [1, 3, WIDTH])
def test_whitened_factors_are_those_of_the_cholesky_root(weight, x, rank):
    gram = (x.T @ x / len(x)).numpy()
    root = np.linalg.cholesky(gram)
    u, s, vt = np.linalg.svd(root.T @ weight.numpy().T, full_matrices=False)
    a = np.linalg.inv(root.T) @ u[:, :rank] * np.sqrt(s[:rank])
    b = np.sqrt(s[:rank])[:, None] * vt[:rank]
    pair = made(weight, x, rank, "whiten")
    signs = np.sign((pair.b.double().numpy() * b.T).sum(axis=0))
    np.testing.assert_allclose(pair.b.double().numpy() * signs, b.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((pair.a.double().numpy().T * signs), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5, WIDTH])
def test_the_error_of_whitened_factors_is_the_discarded_variance(weight, x, rank):
    spectrum = spectrum_of(weight, energy_of(x).gram)
    pair = made(weight, x, rank, "whiten")
    outputs = x @ weight.T
    error = float((outputs - x @ pair.a.double().T @ pair.b.double().T).square().mean())
    assert error == pytest.approx(float(spectrum.variances[rank:].sum()) / WIDTH, rel=1e-5, abs=1e-9)
    assert lost_share(spectrum.variances, rank) == pytest.approx(
        error / float(outputs.square().mean()), rel=1e-5, abs=1e-9
    )
    assert mean_square_error(weight, pair, energy_of(x).gram) == pytest.approx(error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_no_other_start_is_better_and_no_change_improves_it(weight, x, rank):
    gram = energy_of(x).gram
    errors = {
        init: mean_square_error(weight, made(weight, x, rank, init), gram)
        for init in ("whiten", "asvd", "svd", "random")
    }
    assert errors["whiten"] < errors["asvd"] < errors["random"]
    assert errors["whiten"] < errors["svd"] < errors["random"]
    pair = made(weight, x, rank, "whiten")
    for number in range(20):
        change = torch.randn(pair.a.shape, generator=seeded(number)) * 1e-3 * pair.a.abs().mean()
        assert mean_square_error(weight, Pair(pair.a + change, pair.b), gram) > errors["whiten"]


def test_at_full_rank_the_weight_comes_back(weight, x):
    for init in ("whiten", "asvd", "svd"):
        np.testing.assert_allclose(product(made(weight, x, WIDTH, init)), weight.numpy(), atol=2e-6)


def test_inputs_that_span_few_channels_have_an_optimum_too(weight, x):
    flat = x.clone()
    flat[:, 5:] = flat[:, :1] * torch.arange(1.0, HIDDEN - 4)  # rank 5 of 12 channels: no Cholesky root
    gram = energy_of(flat).gram
    assert torch.linalg.matrix_rank(gram) == 5
    for rank in (3, 5, WIDTH):
        pair = made(weight, flat, rank, "whiten")
        assert torch.isfinite(pair.a).all()
        assert torch.isfinite(pair.b).all()
        outputs = flat @ weight.T
        expected = torch.linalg.svdvals(outputs)[rank:].square().sum() / outputs.numel()
        assert mean_square_error(weight, pair, gram) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    # Directions that the calibration never saw are given back nevertheless.
    np.testing.assert_allclose(product(pair), weight.numpy(), atol=2e-6)


def test_a_weight_of_zeros_has_factors_that_are_finite(x):
    zeros = torch.zeros(WIDTH, HIDDEN, dtype=torch.float64)
    pair = made(zeros, x, 3, "whiten")
    assert not product(pair).any()
    spectrum = spectrum_of(zeros, energy_of(x).gram)
    assert spectrum.lost_shares() == [0.0] * WIDTH


@pytest.mark.parametrize("rank", [1, 4, WIDTH])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_asvd_is_the_published_formula(weight, x, rank, alpha):
    w, magnitude = weight.numpy().T, np.abs(x.numpy()).mean(axis=0)  # [h, h_kv], as published
    s = (magnitude + 1e-6) ** alpha
    u, singular, vt = np.linalg.svd(np.diag(s) @ w, full_matrices=False)
    a = np.diag(1 / s) @ u[:, :rank] @ np.diag(np.sqrt(singular[:rank]))
    b = np.diag(np.sqrt(singular[:rank])) @ vt[:rank]
    pair = made(weight, x, rank, "asvd", alpha)
    np.testing.assert_allclose(product(pair), (a @ b).T, rtol=1e-4, atol=1e-5)
    signs = np.sign((pair.b.double().numpy() * b.T).sum(axis=0))
    np.testing.assert_allclose(pair.a.double().numpy().T * signs, a, rtol=1e-4, atol=1e-5)


def test_without_an_exponent_asvd_is_svd(weight, x):
    asvd, svd = made(weight, x, 3, "asvd", alpha=0.0), made(weight, x, 3, "svd")
    assert torch.equal(asvd.a, svd.a)
    assert torch.equal(asvd.b, svd.b)
    best = torch.linalg.svdvals(weight)[3:].square().sum()
    assert float((weight - torch.from_numpy(product(svd))).square().sum()) == pytest.approx(
        float(best), rel=1e-5
    )


def test_a_constant_in_the_scale_cancels(weight, x):
    scale = asvd_scale(energy_of(x).magnitude, 0.5)
    np.testing.assert_allclose(
        product(scaled(weight, scale, 4)), product(scaled(weight, 37.5 * scale, 4)), rtol=1e-5, atol=1e-6
    )


def test_random_factors_start_as_linear_layers_do(weight):
    pair = random_pair(weight, 4, seeded(5))
    assert pair.a.shape == (4, HIDDEN)
    assert pair.b.shape == (WIDTH, 4)
    assert 0.8 / HIDDEN**0.5 < float(pair.a.abs().max()) <= 1 / HIDDEN**0.5
    assert 0.8 / 4**0.5 < float(pair.b.abs().max()) <= 1 / 4**0.5
    assert float(pair.a.min()) < 0 < float(pair.a.max())
    assert torch.equal(pair.a, random_pair(weight, 4, seeded(5)).a)
    assert not torch.equal(pair.a, random_pair(weight, 4, seeded(6)).a)


def test_lost_shares_by_hand():
    variances = torch.tensor([6.0, 3.0, 1.0, 0.0])
    assert [lost_share(variances, rank) for rank in range(1, 5)] == pytest.approx([0.4, 0.1, 0.0, 0.0])


def test_only_known_layers_have_a_weight():
    linear = nn.Linear(4, 3)
    assert torch.equal(weight_of(linear, "x"), linear.weight.double())
    with pytest.raises(StageError, match="x: a Conv2d has no weight that can be factorised"):
        weight_of(nn.Conv2d(1, 1, 1), "x")
