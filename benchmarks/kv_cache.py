"""Ways to keep keys and values while text is generated: bytes, time of a token, and what it costs.

    python benchmarks/kv_cache.py              # both models
    python benchmarks/kv_cache.py --figures    # the built-in model's loss by rank, window, split and bits too
    python benchmarks/kv_cache.py --quick      # shorter texts, the built-in model alone

A prompt is read in one pass, then tokens one by one, the candidates in turn on copies of one model: the
cache of transformers (DynamicCache), its quantized one (QuantizedCache; 4 bits, its own defaults: the last
128 tokens exact), and CSKV with 80 % of the channels gone and a window of 32 tokens, in floating point and at
4 bits. "values absorbed" never rebuilds values: probabilities average what is stored, and the second factor
is applied to the average. Time is that of the processor, of the shortest round of 32 tokens; what a cache
packs more seldom may not be in it. Bytes are those of all tensors of the cache right behind the prompt, of
one sequence. The loss is that of tokens decoded behind 64 others; the model with random weights shows sizes
and times alone.

It fails where a cache of ours has other bytes than the formula, where absorbed values change a logit, or
where the loss does not fall with rank and window.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _common import ABSENT, attempt, interleaved_minima, parser, say, start, table, version
from _kv import (
    Candidate,
    absorbing,
    absorbing_cache,
    compressed,
    factor_bytes,
    moments_of,
    plain_cache,
    quantized_cache,
    random_llama,
    sites_of,
)
from compress.calibration.tokens import sequences_of
from compress.evaluation.decoding import Steps, decoded
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from compress.runtime.kv.absorb import AbsorbedOutput, attended_values
from compress.runtime.kv.attach import kv_scheme_of, new_cache
from compress.runtime.kv.cache import CskvLayer
from compress.runtime.kv.rebuild import rebuilt_keys, rebuilt_values
from compress.runtime.kv.sizes import cache_bytes
from torch import Tensor, nn
from torch.nn import functional as F

STORIES = "builtin:stories"
WINDOW = 32
LENGTH = 256
BACKENDS = {"quanto": "optimum-quanto", "hqq": "hqq"}
"""What transformers' quantized cache can compute with -> the package that it needs."""
RANKS = (2, 6, 12, 16, 24, 32)
WINDOWS = (0, 2, 8, 16, 32, 64, 128)
SPLITS = ((8, 24), (12, 20), (16, 16), (24, 8), (28, 4))
_ABSORBED = ", values absorbed"
MOST_WORSE = 0.01  # nats by which a loss may rise where it should fall
MOST_DIFFERENCE = 1e-3  # of a logit

Moments = Mapping[str, Tensor] | None


def candidates(module: nn.Module, moments: Moments, rank: int) -> list[Candidate]:
    """Return all ways, each with its own copy of the module.

    Args:
        module: that decodes.
        moments: for the factors; see `_kv.compressed`.
        rank: of keys and of values.
    """

    def ours(**scheme: Any) -> Any:
        return compressed(copy.deepcopy(module), (rank, rank), moments, window=WINDOW, **scheme)

    plain, packed, absorbed = ours(), ours(bits=4), absorbing(ours())
    found = [Candidate("DynamicCache", module, plain_cache)]
    for backend, package in BACKENDS.items():
        if version(package) == ABSENT:
            say(f"QuantizedCache ({backend}): left out, {package} is not installed")
        else:
            name = f"QuantizedCache, 4 bits ({backend})"
            found.append(Candidate(name, copy.deepcopy(module), quantized_cache(backend)))
    name = f"CSKV, rank {rank} + {rank}"
    return [
        *found,
        Candidate(name, plain, new_cache, factor_bytes(plain)),
        Candidate(f"{name}{_ABSORBED}", absorbed, absorbing_cache, factor_bytes(absorbed)),
        Candidate(f"{name}, 4 bits", packed, new_cache, factor_bytes(packed)),
    ]


def speeds(
    found: list[Candidate], ids: Tensor, prompt: int, rounds: int
) -> tuple[list[Candidate], list[int], list[float]]:
    """Return the candidates that work, their bytes behind the prompt, and seconds of a token.

    Args:
        found: all of them.
        ids: [1, tokens]; those behind the prompt are decoded, a part of them in every round.
        prompt: tokens.
        rounds: timed ones.
    """
    working = [one for one in found if attempt(one.name, lambda one=one: (one.read(ids[:, :prompt]), 1)[1])]
    stored = [one.stored_bytes for one in working]
    count = (ids.shape[1] - prompt) // (rounds + 1)

    def turns(one: Candidate) -> Callable[[], None]:
        parts = iter(ids[:, prompt:].split(count, dim=1))
        return lambda: one.decode(next(parts))

    best = interleaved_minima(
        [turns(one) for one in working], rounds=rounds, warm_up=1, clock=time.process_time
    )
    return working, stored, [seconds / count for seconds in best]


@torch.no_grad()
def loss(module: nn.Module, ids: Tensor, new: Callable[[nn.Module], Any], prompt: int = 1) -> float:
    """Return the mean loss of sequences [batch, length] that are decoded token by token, in nats."""
    steps = Steps.of(ids.shape[1] - prompt - 1)
    for place, logits in decoded(module, ids, prompt, new(module)):
        steps.add(place - prompt - 1, ids[:, place], logits, logits)
    return float(steps.compressed.sum() / steps.tokens.sum())


def compare(
    title: str, module: nn.Module, moments: Moments, rank: int, ids: Tensor, prompt: int, rounds: int,
    held_out: Tensor | None,
) -> list[str]:  # fmt: skip
    """Print the table of one model; return what is wrong."""
    working, stored, seconds = speeds(candidates(module, moments, rank), ids, prompt, rounds)
    lines = []
    for one, size, taken in zip(working, stored, seconds, strict=True):
        quality = "" if held_out is None else _told_loss(one, held_out)
        lines.append(
            [one.name, f"{size:,}", f"{size / stored[0]:.3f}", f"{one.factor_bytes:,}", f"{1000 * taken:.2f}",
             f"{taken / seconds[0]:.2f}", quality]
        )  # fmt: skip
    say(f"{title}: behind a prompt of {prompt:,} tokens, one sequence, float32\n")
    header = ["cache", "bytes", "share", "factors", "ms a token", "times", "loss, nats"]
    cut = None if held_out is not None else -1
    table(header[:cut], [line[:cut] for line in lines])
    wrong = [
        message for one, size in zip(working, stored, strict=True) for message in unequal(one, size, prompt)
    ]
    return wrong + different(working, ids, prompt)


def _told_loss(one: Candidate, held_out: Tensor) -> str:
    found = attempt(one.name, lambda: loss(one.module, held_out, one.new, prompt=64))
    return "" if found is None else f"{found:.4f}"


def unequal(one: Candidate, stored: int, tokens: int) -> list[str]:
    """Say where a compressed cache has other bytes than the formula."""
    scheme = kv_scheme_of(one.module)
    if scheme is None:
        return []
    formula = cache_bytes(scheme, tokens, 1, 4)
    return [] if stored == formula else [f"{one.name}: {stored:,} bytes, by the formula {formula:,}"]


@torch.no_grad()
def different(working: list[Candidate], ids: Tensor, prompt: int) -> list[str]:
    """Say by how much absorbing changed the logits of a token, where that is more than rounding."""
    named = {one.name: one for one in working}
    pair = next(
        (one, named[name.removesuffix(_ABSORBED)]) for name, one in named.items() if _ABSORBED in name
    )
    outputs = []
    for one in pair:
        one.read(ids[:, :prompt])
        given = {"input_ids": ids[:, prompt : prompt + 1], "past_key_values": one.cache, "use_cache": True}
        outputs.append(one.module(**given).logits)
    apart = float((outputs[0] - outputs[1]).abs().max())
    say(f"largest difference of a logit with values absorbed: {apart:.1e}\n")
    return [f"values absorbed: a logit differs by {apart}"] if apart > MOST_DIFFERENCE else []


@torch.no_grad()
def absorption(module: nn.Module, moments: Moments, rank: int, ids: Tensor, rounds: int) -> None:
    """Print what one layer's rebuilding takes, and what absorbing the values saves of it."""
    compressed(module, (rank, rank), moments, window=WINDOW)
    cache = new_cache(module)
    module(input_ids=ids, past_key_values=cache, use_cache=True)
    layer = next(layer for layer in cache.layers if isinstance(layer, CskvLayer))
    attention: Any = layer.attention
    history = layer.get_seq_length() - WINDOW
    c_k, c_v = (part.contiguous() for part in layer.latents.read(history))
    angles = cache.positions.angles(history, c_k)
    heads, groups = attention.config.num_attention_heads, attention.num_key_value_groups
    probabilities = torch.rand(1, heads, 1, history, generator=torch.Generator().manual_seed(0)).softmax(-1)
    one_matrix = AbsorbedOutput.of(attention)

    def out(read: Tensor) -> Tensor:
        return F.linear(read.transpose(1, 2).flatten(2), attention.o_proj.weight)

    def values() -> Tensor:
        return out(probabilities @ rebuilt_values(attention, c_v).repeat_interleave(groups, dim=1))

    calls = {
        "keys rebuilt and rotated": lambda: rebuilt_keys(attention, c_k, angles),
        "values rebuilt, read, o_proj": values,
        "values read, second factor, o_proj": lambda: out(attended_values(attention, probabilities, c_v)),
        "values read, o_proj after the second factor as one matrix": lambda: one_matrix.read(
            probabilities, c_v
        ),
    }
    seconds = interleaved_minima(list(calls.values()), rounds=5 * rounds, clock=time.process_time)
    wanted = values()
    lines = []
    for (name, call), taken in zip(calls.items(), seconds, strict=True):
        apart = "" if call().shape != wanted.shape else f"{float((call() - wanted).abs().max()):.1e}"
        lines.append([name, f"{1000 * taken:.3f}", f"{taken / (seconds[0] + seconds[1]):.1%}", apart])
    say(f"one layer, {history:,} compressed tokens, rank {rank} + {rank}\n")
    table(["for every decoded token", "ms", "of rebuilding both", "difference"], lines)
    saved = (seconds[1] - min(seconds[2:])) / (seconds[0] + seconds[1])
    say(f"absorbing the values saves {saved:.1%} of what rebuilding and reading take\n")


def figures(module: nn.Module, moments: Moments, held_out: Tensor) -> list[str]:
    """Print the built-in model's loss by rank, window, split and bits; return what is not as it should be."""

    def of(ranks: tuple[int, int], **scheme: Any) -> float:
        return loss(compressed(module, ranks, moments, **scheme), held_out, new_cache)

    base = loss(module, held_out, plain_cache)
    say(f"loss of decoded tokens, nats; DynamicCache: {base:.4f}\n")
    by_rank = [of((rank, rank), window=0) for rank in RANKS]
    table(["rank, of 32 (no window)", *map(str, RANKS)], [["loss", *(f"{value:.4f}" for value in by_rank)]])
    by_window = [of((6, 6), window=window) for window in WINDOWS]
    table(["window (rank 6 + 6)", *map(str, WINDOWS)], [["loss", *(f"{value:.4f}" for value in by_window)]])
    header = ["channels of keys / values", *(f"{k} / {v}" for k, v in SPLITS)]
    split = {window: [of(ranks, window=window) for ranks in SPLITS] for window in (0, WINDOW)}
    rows = [[f"window {window}", *(f"{value:.4f}" for value in line)] for window, line in split.items()]
    table(header, rows)
    bits = {bits: of((16, 16), window=WINDOW, bits=bits) for bits in (None, 4, 2)}
    table(
        ["rank 16 + 16, window 32", "floating point", "4 bits", "2 bits"],
        [["loss", *(f"{value:.4f}" for value in bits.values())]],
    )
    return shortcomings(base, by_rank, by_window, split[0], bits[4] - bits[None])


def shortcomings(
    base: float, by_rank: Sequence[float], by_window: Sequence[float], split: Sequence[float], packed: float
) -> list[str]:
    """Say what is not as it should be.

    Args:
        base: loss of the original.
        by_rank, by_window: losses, smallest first.
        split: of `SPLITS`, without a window.
        packed: what 4 bits add.
    """
    found = []
    for name, losses in (("rank", by_rank), ("window", by_window)):
        if any(after > before + MOST_WORSE for before, after in zip(losses, losses[1:], strict=False)):
            found.append(f"the loss rises with the {name}: {', '.join(f'{value:.4f}' for value in losses)}")
    if abs(by_rank[-1] - base) > MOST_WORSE:
        found.append(f"at full rank the loss is {by_rank[-1]:.4f}, of the original {base:.4f}")
    if split[1] != min(split):
        found.append("12 channels of keys and 20 of values are not the best of the splits")
    if packed > MOST_WORSE:
        found.append(f"4 bits cost {packed:.4f} nats")
    return found


def options() -> argparse.ArgumentParser:
    """Return the command line."""
    found = parser(__doc__)
    found.add_argument(
        "--figures", action="store_true", help="the built-in model's loss by rank and window too"
    )
    found.add_argument("--tokens", type=int, default=2048, help="prompt of the random model (default 2048)")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises:
        SystemExit: a cache is not what it should be.
    """
    arguments = options().parse_args(argv)
    quick, seed = arguments.quick, arguments.seed
    rounds = 3 if quick else 7
    start("Key-value caches: bytes, milliseconds of a token, loss", arguments)
    model = open_model(ModelRef(id=STORIES), progress=SilentProgress())
    moments = moments_of(model, 64, LENGTH, seed)
    texts = sequences_of(model, CalibrationSettings(length=LENGTH), seed)
    held_out = texts.last(8 if quick else 24, apart_from=64)
    count = 32 * (rounds + 1)
    prompt = 512 - count
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (1, prompt + count), generator=draws)
    wrong = compare(STORIES, model.module, moments, 6, ids, prompt, rounds, held_out)
    if not quick:
        tokens = arguments.tokens
        random = random_llama(seed, tokens + count)
        ids = torch.randint(0, 1024, (1, tokens + count), generator=draws)
        rank = sites_of(random)[0].width // 5
        name = "random Llama, 8 layers of 512 channels, 256 of keys and of values"
        wrong += compare(name, random, None, rank, ids, tokens, rounds, None)
        absorption(random, None, rank, ids[:, :tokens], rounds)
    if arguments.figures:
        wrong += figures(model.module, moments, held_out)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
