"""Speed of one convolution at the shapes of SDXL's U-Net on a 512-pixel image, all candidates taking turns.

Prints, for every shape: milliseconds, then how many times faster than the fp32 and the bf16 nn.Conv2d whose
images have their channels first. "last" has the channels last in memory. The time is the minimum over
the rounds. dB is the signal-to-error ratio against the fp32 layer on Gaussian data, so that a wrong
layer shows. "windows" is what runs where oneDNN has no kernel, computed on this CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _common import interleaved_minima, parser, say, sqnr_db, start, table
from _ours import quantized_conv
from compress.runtime import prepacked_conv
from torch import Tensor, nn

SHAPES = [(320, 320, 3, 64), (640, 640, 3, 32), (1280, 1280, 3, 16), (2560, 1280, 3, 16), (960, 320, 1, 64)]
"""Channels in, channels out, side of the kernel, side of the image."""


@dataclass
class Candidate:
    """One row of the table at one shape; `kernel` allows oneDNN's."""

    label: str
    module: nn.Module
    inputs: Tensor
    kernel: bool = True

    def __call__(self) -> Tensor:
        """Run it once."""
        allowed = prepacked_conv.is_available
        if not self.kernel:
            prepacked_conv.is_available = lambda columns: False
        try:
            return self.module(self.inputs)
        finally:
            prepacked_conv.is_available = allowed


def candidates(shape: tuple[int, int, int, int], seed: int) -> list[Candidate]:
    """Build every candidate at one shape; the first two are fp32 and bf16 nn.Conv2d."""
    channels, outputs, size, side = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, side, side, generator=generator)
    dense = nn.Conv2d(channels, outputs, size, padding=size // 2)
    with torch.no_grad():
        fan_in = channels * size * size
        dense.weight.copy_(torch.randn(dense.weight.shape, generator=generator) * fan_in**-0.5)
        dense.bias.copy_(torch.randn(outputs, generator=generator) * 0.1)
    half = nn.Conv2d(channels, outputs, size, padding=size // 2).to(torch.bfloat16)
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in dense.state_dict().items()})
    last, x16 = x.contiguous(memory_format=torch.channels_last), x.bfloat16()
    last16 = last.bfloat16()
    w8, w4 = quantized_conv(dense, 8, activation_bits=8), quantized_conv(dense, 4, activation_bits=8)
    w8_16, weights = quantized_conv(half, 8, activation_bits=8), quantized_conv(dense, 4, activation_bits=16)
    return [
        Candidate("fp32 nn.Conv2d", dense, x),
        Candidate("bf16 nn.Conv2d", half, x16),
        Candidate("fp32 nn.Conv2d, last", dense, last),
        Candidate("bf16 nn.Conv2d, last", half, last16),
        Candidate("compress W8A8, fp32 io", w8, x),
        Candidate("compress W8A8, fp32 io, last", w8, last),
        Candidate("compress W4A8, fp32 io, last", w4, last),
        Candidate("compress W8A8, bf16 io", w8_16, x16),
        Candidate("compress W8A8, bf16 io, last", w8_16, last16),
        Candidate(
            "compress W8A8, fp32 io, windows", quantized_conv(dense, 8, activation_bits=8), x, kernel=False
        ),
        Candidate("compress W4A16, fp32 io", weights, x),
    ]


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=30, help="timed calls of each candidate (default 30)")
    arguments = options.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    start("Convolutions of SDXL: speed against fp32 / bf16", arguments)
    for shape in SHAPES[1:3] if arguments.quick else SHAPES:
        found = candidates(shape, arguments.seed)
        reference = found[0]()
        seconds = interleaved_minima(found, rounds=rounds, warm_up=2)
        rows = [
            [
                item.label,
                f"{1e3 * time:.2f}",
                f"{seconds[0] / time:.2f}",
                f"{seconds[1] / time:.2f}",
                "" if index == 0 else f"{sqnr_db(reference, item().float()):.1f}",
            ]
            for index, (item, time) in enumerate(zip(found, seconds, strict=True))
        ]
        channels, outputs, size, side = shape
        say(f"{channels} -> {outputs} channels, kernel {size}, image {side} x {side}; {rounds} rounds")
        table(["layer", "ms", "x fp32", "x bf16", "dB"], rows)


if __name__ == "__main__":
    main()
