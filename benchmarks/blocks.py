"""Speed of whole DiT-XL blocks, 2 x 256 tokens, in one run, all candidates taking turns.

Builds a DiT of XL width with random weights and times whole forwards: embedding, the blocks, the
output layer. Attention and feed-forward linears are quantized, the rest stays in bf16. Prints
milliseconds (minimum over the rounds), speed against fp32, bf16 and bf16 compiled, the bytes of the
module's tensors in memory as stored, and the signal-to-error ratio against fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import attempt, interleaved_minima, parser, say, sqnr_db, start, table
from _dit_xl import build, inputs
from _ours import quantize_blocks
from _peers import PEERS, prepare
from torch import Tensor, nn


@dataclass
class Candidate:
    """One row of the table."""

    label: str
    call: Callable[[], Tensor]
    size_bytes: int


def _is_quantized(name: str) -> bool:
    return ".attn1." in name or ".ff." in name


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of all tensors, looking into tensor subclasses."""
    total = 0
    for tensor in module.state_dict().values():
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        parts = [getattr(tensor, name) for name in inner] or [tensor]
        total += sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
    return total


def compiled(module: nn.Module, forward: Callable[[nn.Module], Tensor]) -> nn.Module:
    """Compile the whole model for this one shape; run it once before, so that lazy state is there."""
    result = copy.deepcopy(module)
    forward(result)
    result.compile(dynamic=False)
    forward(result)
    return result


def candidates(blocks: int, batch: int, seed: int, use_compile: bool) -> list[Candidate]:
    """Build every candidate; the first three are fp32, bf16 and (if asked for) bf16 compiled."""
    full = build(blocks, torch.float32, seed)
    half = copy.deepcopy(full).to(torch.bfloat16)
    arguments = {dtype: inputs(dtype, batch, seed) for dtype in (torch.float32, torch.bfloat16)}
    found: list[Candidate] = []

    def forward(module: nn.Module) -> Tensor:
        result: Tensor = module(**arguments[module.dtype])[0]
        return result

    def add(label: str, module: nn.Module, with_compile: bool = True) -> None:
        size = stored_bytes(module)
        found.append(Candidate(label, lambda: forward(module), size))
        if with_compile and use_compile:
            say(f"compiling {label} ...")
            fast = attempt(f"{label}, compiled", lambda: compiled(module, forward))
            if fast is not None:
                found.append(Candidate(f"{label}, compiled", lambda: forward(fast), size))

    add("fp32", full, with_compile=False)
    add("bf16", half)
    for bits in (8, 4):
        for transforms in (False, True):
            label = f"compress W{bits}A8" + (" + scale + rotation" if transforms else "")
            add(label, quantize_blocks(copy.deepcopy(half), bits, transforms=transforms, seed=seed))
    trials = [(peer.label, peer, half) for peer in PEERS]
    trials += [(f"{peer.label}, fp32 around it", peer, full) for peer in PEERS if peer.library == "torchao"]
    for label, peer, dense in trials:
        module = prepare(peer, dense, forward, _is_quantized)
        if module is not None:
            add(label, module, with_compile=peer.library == "torchao")
    return found


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=4, help="blocks of the model (default 4)")
    options.add_argument("--batch", type=int, default=2, help="items of 256 tokens (default 2)")
    options.add_argument("--rounds", type=int, default=15, help="timed forwards of each (default 15)")
    options.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    arguments = options.parse_args()
    blocks, rounds = (1, 5) if arguments.quick else (arguments.blocks, arguments.rounds)
    start(f"{blocks} DiT-XL blocks, {arguments.batch} x 256 tokens", arguments)
    # One code object serves all candidates: beyond its default of 8, dynamo silently stays eager.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    use_compile = not (arguments.no_compile or arguments.quick)
    found = candidates(blocks, arguments.batch, arguments.seed, use_compile)
    seconds = interleaved_minima([item.call for item in found], rounds=rounds, warm_up=2)
    reference = found[0].call().float()
    compiled_base = [
        time for item, time in zip(found, seconds, strict=True) if item.label == "bf16, compiled"
    ]
    bases = [seconds[0], seconds[1], *(compiled_base or [None])]
    rows = [
        [
            item.label,
            f"{1e3 * time:.1f}",
            *(f"{base / time:.2f}" if base else "" for base in bases),
            f"{item.size_bytes / 1e6:.1f}",
            "" if index == 0 else f"{sqnr_db(reference, item.call().float()):.1f}",
        ]
        for index, (item, time) in enumerate(zip(found, seconds, strict=True))
    ]
    say(f"minimum of {rounds} rounds")
    table(["model", "ms", "x fp32", "x bf16", "x bf16 compiled", "MB", "dB"], rows)


if __name__ == "__main__":
    main()
