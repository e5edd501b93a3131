"""Layers with choices and tables of sensitivities made by hand: no model is needed to decide."""

import numpy as np
import pytest
from compress.calibration.sensitivity_table import Row, Table
from compress.compressors.quantization.mixed.candidates import LayerChoices
from compress.models.base import LinearSite
from compress.recipes.allocation import AllocationSettings


def entry(name, weights=1024, bits=(2, 4, 8), **options):
    """Return a layer of `weights` weights whose rows of 64 carry a float32 scale; "w16" is two bytes each."""
    scales = 4 * (weights // 64)
    costs = {f"w{b}": weights * b // 8 + (0 if b == 16 else scales) for b in bits}
    site = LinearSite(name, options.pop("role", "ff.in"), 0, (weights // 64, 64))
    plain = {"inputs": 0, "metric_group": "all", "activations": (8,), "decided_by": "", "members": ()}
    return LayerChoices(site=site, schemes={}, costs=costs, weights=weights, **{**plain, **options})


def weight_row(layer, bits, loss, metric="sqnr_db"):
    value = 1 - loss if metric == "ssim" else -10 * np.log10(loss)
    return Row("weight", layer, f"w{bits}", bits, metric, float(value), float(loss), 0.0, 0)


def activation_row(layer, bits, loss):
    return Row("activation", layer, f"a{bits}", bits, "sqnr_db", float(-10 * np.log10(loss)), loss, 0.0, 0)


def network(count=12, seed=0, bits=(2, 4, 8), groups=("all",), metrics=None):
    """Return layers of several sizes with heavy-tailed sensitivities, and their table."""
    generator = np.random.default_rng(seed)
    layers, rows = [], []
    for index in range(count):
        group = groups[index % len(groups)]
        layer = entry(
            f"blocks.{index}", 64 * int(generator.integers(16, 200)), bits, metric_group=group, inputs=256
        )
        scale = float(np.exp(generator.normal(-2, 1.5)))
        layers.append(layer)
        rows += [
            weight_row(layer.site.name, b, min(0.9, scale * 4.0**-b), (metrics or {}).get(group, "sqnr_db"))
            for b in bits
            if b != 16
        ]
    return layers, Table("0" * 64, {}, tuple(rows))


def settings(budget, **options):
    return AllocationSettings.model_validate({"budget": budget, "bits": (2, 4, 8), **options})


@pytest.fixture
def made():
    """Return what makes layers, rows and settings: entry, weight_row, activation_row, network, settings."""
    from types import SimpleNamespace

    return SimpleNamespace(
        entry=entry, weight_row=weight_row, activation_row=activation_row, network=network, settings=settings
    )
