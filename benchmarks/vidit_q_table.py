"""Output error of one linear under the parts of ViDiT-Q, on synthetic inputs with known outliers.

A 1152 x 1152 Gaussian weight whose columns have log-normal scale (sigma 0.4). Inputs of 10 steps: 12
channels are always 40 times larger, 6 channels are 1 + 15 t times larger at step t, and tokens have
log-normal scale (sigma 0.7). How large the weights of the outlier channels happen to be moves whole rows
of the table by some dB, so the draw is fixed by a seed. Weights asymmetric per row, activations
symmetric per token. Prints the signal-to-quantization-noise ratio of the output in dB:

    python benchmarks/vidit_q_table.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compress.compressors.quantization import balance, grid
from compress.runtime.integer import fake_quantize_tokens
from compress.runtime.rotation import random_signs
from torch import Tensor

CHANNELS, TOKENS, STEPS = 1152, 1024, 10
SETTINGS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
EXPONENTS = tuple(index / 10 for index in range(1, 7))


@dataclass(frozen=True)
class Layer:
    """The synthetic layer: weight [out, in], inputs [rows, in] of all steps, exact outputs."""

    weight: Tensor
    rows: Tensor
    exact: Tensor


def make_layer(seed: int = 1) -> Layer:
    """Draw the layer and its inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(CHANNELS, CHANNELS) / CHANNELS**0.5
    weight = weight * torch.exp(0.4 * normal(CHANNELS))
    places = torch.randperm(CHANNELS, generator=generator)
    factor = torch.ones(STEPS, 1, CHANNELS)
    factor[..., places[:12]] = 40.0
    factor[..., places[12:18]] = 1.0 + 15.0 * torch.arange(STEPS).view(STEPS, 1, 1)
    rows = normal(STEPS, TOKENS, CHANNELS) * factor * torch.exp(0.7 * normal(STEPS, TOKENS, 1))
    rows = rows.reshape(-1, CHANNELS)
    return Layer(weight, rows, rows @ weight.T)


def _per_tensor(x: Tensor, bits: int) -> Tensor:
    top = (1 << (bits - 1)) - 1
    scale = x.abs().max() / top
    return torch.round(x / scale) * scale


def sqnr_db(
    layer: Layer, transform: balance.Transform, bits: tuple[int, int], *, per_token: bool = True
) -> float:
    """Return the output SQNR in dB of the layer under a transform and (weight, activation) bits."""
    kind = grid.Grid(bits[0], symmetric=False, clip="minmax")
    weight = grid.dequantize(grid.quantize(transform.on_weight(layer.weight), kind))
    rows = transform.on_inputs(layer.rows)
    rows = fake_quantize_tokens(rows, bits[1], True) if per_token else _per_tensor(rows, bits[1])
    error = (rows @ weight.T - layer.exact).double().square().sum()
    return float(10 * torch.log10(layer.exact.double().square().sum() / error))


def transforms(layer: Layer, *, scaled: bool, block: int | None, seed: int = 0) -> list[balance.Transform]:
    """Return the candidates of one row of the table: one per exponent where scales are on."""
    sign = random_signs(CHANNELS, torch.Generator().manual_seed(seed)) if block else None
    maximum, columns = layer.rows.abs().amax(dim=0), layer.weight.abs().amax(dim=0)
    if not scaled:
        return [balance.Transform(None, None, sign, block)]
    return [
        balance.Transform(exponent, balance.channel_scale(maximum, columns, exponent), sign, block)
        for exponent in EXPONENTS
    ]


ROWS = {
    "static per-tensor acts": {"scaled": False, "block": None},
    "per-token dynamic": {"scaled": False, "block": None},
    "+ scaling": {"scaled": True, "block": None},
    "+ rotation only (full)": {"scaled": False, "block": CHANNELS},
    "+ rotation only (block-128)": {"scaled": False, "block": 128},
    "+ scaling then rotation (full)": {"scaled": True, "block": CHANNELS},
    "+ scaling then rotation (block-128)": {"scaled": True, "block": 128},
}


def table(layer: Layer) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Return row -> setting -> (best SQNR in dB, its exponent)."""
    result: dict[str, dict[str, tuple[float, float | None]]] = {}
    for name, options in ROWS.items():
        candidates = transforms(layer, **options)
        per_token = not name.startswith("static")
        result[name] = {
            setting: max(
                (sqnr_db(layer, item, bits, per_token=per_token), item.exponent) for item in candidates
            )
            for setting, bits in SETTINGS.items()
        }
    return result


def main() -> None:
    """Print the table."""
    print("| | " + " | ".join(SETTINGS) + " |\n|---|" + "---|" * len(SETTINGS))
    for name, cells in table(make_layer()).items():
        shown = [
            f"{value:.1f}" + (f" ({best})" if best is not None else "") for value, best in cells.values()
        ]
        print(f"| {name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
