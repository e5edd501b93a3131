"""Speed of one linear layer at the shapes of DiT-XL, in one run, all candidates taking turns.

Prints, for every shape M x K -> N: milliseconds, then how many times faster than the fp32 and the
bf16 nn.Linear. "io" is the dtype of input and output. The time is the minimum over the rounds. dB is
the signal-to-error ratio against the fp32 layer on Gaussian data, so that a wrong layer shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import attempt, interleaved_minima, parser, say, sqnr_db, start, table
from _ours import quantized
from _peers import PEERS, prepare
from torch import Tensor, nn

SHAPES = [(m, k, n) for m in (256, 1024) for k, n in ((1152, 1152), (1152, 4608), (4608, 1152))]


@dataclass
class Candidate:
    """One row of the table at one shape."""

    label: str
    call: Callable[[], Tensor]


def compiled(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Compile for this one shape; run it once before, so that lazy state is there, and once after."""
    module(x)
    function = torch.compile(module, dynamic=False)
    function(x)
    return lambda: function(x)


def candidates(shape: tuple[int, int, int], seed: int, use_compile: bool) -> tuple[list[Candidate], Tensor]:
    """Build every candidate at one shape; the first two are fp32 and bf16 nn.Linear.

    Returns:
        The candidates and the fp32 layer's output.
    """
    m, k, n = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    dense = nn.Linear(k, n)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(n, k, generator=generator) * k**-0.5)
        dense.bias.copy_(torch.randn(n, generator=generator) * 0.1)
    half, x16 = nn.Linear(k, n).to(torch.bfloat16), x.bfloat16()
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in dense.state_dict().items()})
    found = [Candidate("fp32 nn.Linear", lambda: dense(x)), Candidate("bf16 nn.Linear", lambda: half(x16))]

    def add(label: str, module: nn.Module, inputs: Tensor, with_compile: bool = use_compile) -> None:
        found.append(Candidate(f"{label}, eager", lambda: module(inputs)))
        fast = attempt(f"{label}, compiled", lambda: compiled(module, inputs)) if with_compile else None
        if fast is not None:
            found.append(Candidate(f"{label}, compiled", fast))

    for bits in (8, 4):
        for transforms in (False, True):
            label = f"compress W{bits}A8" + (" + scale + rotation" if transforms else "")
            add(f"{label}, bf16 io", quantized(half, bits, transforms=transforms, seed=seed), x16)
            if not transforms:
                add(f"{label}, fp32 io", quantized(dense, bits, transforms=False, seed=seed), x)
    for peer in PEERS:
        module = prepare(peer, nn.Sequential(half), lambda peer_module: peer_module(x16), lambda name: True)
        if module is not None and peer.compiles_itself:
            found.append(Candidate(f"{peer.label}, bf16 io", lambda module=module: module(x16)))
        elif module is not None:
            add(f"{peer.label}, bf16 io", module, x16, use_compile and peer.library == "torchao")
    return found, dense(x)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=30, help="timed calls of each candidate (default 30)")
    options.add_argument("--shape", type=int, nargs=3, metavar=("M", "K", "N"), help="this shape only")
    options.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    arguments = options.parse_args()
    shapes = [SHAPES[0], SHAPES[2]] if arguments.quick else SHAPES
    shapes = [tuple(arguments.shape)] if arguments.shape else shapes
    rounds = 10 if arguments.quick else arguments.rounds
    start("Linear layers of DiT-XL: speed against fp32 / bf16", arguments)
    for shape in shapes:
        torch._dynamo.reset()
        found, reference = candidates(shape, arguments.seed, not (arguments.no_compile or arguments.quick))
        seconds = interleaved_minima([item.call for item in found], rounds=rounds, warm_up=3)
        rows = [
            [
                item.label,
                f"{1e3 * time:.2f}",
                f"{seconds[0] / time:.2f}",
                f"{seconds[1] / time:.2f}",
                "" if index == 0 else f"{sqnr_db(reference, item.call().float()):.1f}",
            ]
            for index, (item, time) in enumerate(zip(found, seconds, strict=True))
        ]
        say(f"M {shape[0]}, K {shape[1]}, N {shape[2]}; minimum of {rounds} rounds")
        table(["layer", "ms", "x fp32", "x bf16", "dB"], rows)


if __name__ == "__main__":
    main()
