"""What a model with a compressed key-value cache says token by token, against its original.

A text that is read in one pass tells nothing of such a cache: exact keys and values are at hand then. So
the beginning of a sequence is read in one pass and the rest one token at a time, each of them the text's
own (teacher forcing), through the cache that the model generates with. The original's predictions are
those of its recorded pass over the whole sequence, which its own, exact cache changes by roundings alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.base import OpenModel
from ..progress import Progress, step
from ..recipes.decoding import DecodingSettings
from ..runtime.kv.attach import kv_scheme_of, new_cache
from ..runtime.kv.scheme import KvCacheScheme
from ..runtime.kv.sizes import compressed_tokens
from .evaluator import Evaluation
from .passkey import add_passkey
from .reference import Reference
from .watched import device_of

ONE_PASS = (
    "every text is read in one pass there, for which the cache keeps all keys and values exactly: such"
    " figures say nothing of a compressed cache"
)
"""What is to be said of figures of fidelity beside a compressed cache."""
NOT_CARRIED = "this form of the model has no compressed cache, so nothing was decoded through one"
TOO_SHORT = (
    "decoding says little of the compressed cache: of what the decoded tokens read, {share:.0%} came out of"
    " it, and the rest is kept exactly; raise calibration.length beyond the window, and beyond what bits"
    " round together"
)
_ENOUGH = 0.5
_BUCKETS = 16


@torch.no_grad()
def decoded(module: nn.Module, ids: Tensor, prompt: int, cache: Any) -> Iterator[tuple[int, Tensor]]:
    """Read sequences token by token and yield what the model expects to come next.

    Args:
        module: a causal language model of transformers.
        ids: [batch, length] int64, on the module's device.
        prompt: tokens that are read in one pass before; 1 or more.
        cache: an empty cache of transformers; it is filled.

    Yields:
        (place, logits): place of the token that is predicted, from `prompt + 1` to `length - 1`; its logits
        [batch, vocabulary].
    """
    length = ids.shape[1]
    module(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    for place in range(prompt + 1, length):
        given = module(input_ids=ids[:, place - 1 : place], past_key_values=cache, use_cache=True)
        yield place, given.logits[:, -1]


@dataclass
class Steps:
    """Running sums over scored tokens, by how many tokens behind the prompt they stand; in nats.

    Attributes:
        tokens: [steps] how many were scored.
        original, compressed: [steps] negative log-likelihood of the text.
        one_pass: [steps] that of the compressed model where it reads the text in one pass, without a cache:
            what other stages cost.
        divergence: [steps] of the compressed model's distribution from the original's.
    """

    tokens: Tensor
    original: Tensor
    compressed: Tensor
    one_pass: Tensor
    divergence: Tensor

    @classmethod
    def of(cls, count: int) -> Steps:
        """Return sums of nothing for `count` steps."""
        return cls(*(torch.zeros(count, dtype=torch.float64) for _ in range(5)))

    def add(self, at: int, target: Tensor, wanted: Tensor, given: Tensor, whole: Tensor) -> None:
        """Score one token of every sequence.

        Args:
            at: step, from 0.
            target: [batch] int64, what the text says.
            wanted: [batch, vocabulary] the original's logits.
            given: the compressed model's.
            whole: those of its pass over the whole text.
        """
        before, after, alone = (F.log_softmax(logits.float(), dim=-1) for logits in (wanted, given, whole))
        chosen = target[:, None]
        self.tokens[at] += len(target)
        self.original[at] -= float(before.gather(1, chosen).double().sum())
        self.compressed[at] -= float(after.gather(1, chosen).double().sum())
        self.one_pass[at] -= float(alone.gather(1, chosen).double().sum())
        self.divergence[at] += float((before.exp() * (before - after)).double().sum())

    def metrics(self) -> dict[str, float]:
        """Return decode_perplexity, those of the original and of one pass, the increase, and decode_kl."""
        count = float(self.tokens.sum())
        before, after, alone = (
            _exp(float(sums.sum()) / count) for sums in (self.original, self.compressed, self.one_pass)
        )
        return {
            "decode_perplexity_original": round(before, 5),
            "decode_perplexity": round(after, 5),
            "decode_perplexity_one_pass": round(alone, 5),
            "decode_perplexity_increase": round(after / before - 1.0, 6),
            "cache_perplexity_increase": round(after / alone - 1.0, 6),
            "decode_kl": round(max(float(self.divergence.sum()), 0.0) / count, 6),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return means over spans of steps, in nats per token.

        Returns:
            Rows with `first` and `last` (places behind the prompt, from 1), `tokens`, `original`,
            `compressed` and `divergence`.
        """
        found, size = [], -(-len(self.tokens) // _BUCKETS)
        for first in range(0, len(self.tokens), size):
            part = slice(first, first + size)
            count = float(self.tokens[part].sum())
            means = {
                name: round(float(sums[part].sum()) / count, 5)
                for name, sums in (
                    ("original", self.original), ("compressed", self.compressed),
                    ("divergence", self.divergence),
                )
            }  # fmt: skip
            last = min(first + size, len(self.tokens))
            # The token right behind the prompt is predicted by the pass over it: steps begin with the second.
            found.append({"first": first + 2, "last": last + 1, "tokens": int(count), **means})
        return found


def add_decoding(
    model: OpenModel,
    settings: DecodingSettings,
    reference: Reference,
    seed: int,
    result: Evaluation,
    progress: Progress,
) -> None:
    """Measure the model as it is now token by token, and add what comes out to the evaluation.

    Args:
        model: after the stages, in the form in which it is shipped.
        settings: how much is read, and how.
        reference: with the original's logits of every sequence, and what it found of hidden numbers.
        seed: of the run.
        result: gets metrics and the details `decoding`.
        progress: told about it.
    """
    scheme = kv_scheme_of(model.module)
    if scheme is None:
        result.details["decoding"] = {"skipped": NOT_CARRIED}
        progress.note(NOT_CARRIED)
        return
    steps, samples, prompt = _scored(model, settings, reference, progress)
    result.metrics |= steps.metrics()
    share = compressed_share(scheme, prompt, len(steps.tokens))
    if share < _ENOUGH:
        progress.warn(TOO_SHORT.format(share=share))
    result.details["decoding"] = {
        "samples": samples,
        "prompt": prompt,
        "tokens": int(steps.tokens.sum()),
        "compressed_share": round(share, 4),
        "original": "one pass",
        "by_distance": steps.rows(),
    }
    if settings.passkey is not None:
        add_passkey(model, settings.passkey, reference.index["passkey"], seed, result, progress)


def compressed_share(scheme: KvCacheScheme, prompt: int, steps: int) -> float:
    """Return the part of what decoded tokens read that comes out of the compressed cache, 0 to 1.

    Args:
        scheme: of the cache.
        prompt: tokens that are read in one pass before.
        steps: tokens that are scored.
    """
    cached = range(prompt, prompt + steps)
    return sum(compressed_tokens(scheme, tokens) for tokens in cached) / sum(cached)


def _scored(
    model: OpenModel, settings: DecodingSettings, reference: Reference, progress: Progress
) -> tuple[Steps, int, int]:
    """Return the sums, how many sequences were read, and how much of each in one pass."""
    calls, device = reference.calls(), device_of(model)
    length = calls[0][0]["input_ids"].shape[1]
    # What the tokenizer puts before a text is no text: none of it is predicted.
    prompt = min(max(settings.prompt_tokens(length), int(reference.index["prefix"])), length - 2)
    found, samples = Steps.of(length - prompt - 1), 0
    with step(progress, "decode the same text") as bar:
        for kwargs, wanted in calls:
            ids = kwargs["input_ids"][: None if settings.samples is None else settings.samples - samples]
            if not len(ids):
                break
            placed, before = ids.to(device), wanted[: len(ids)]
            whole = model.module(input_ids=placed, use_cache=False).logits
            for place, given in decoded(model.module, placed, prompt, new_cache(model.module)):
                # What the original's pass says at a place is about the next.
                said = (before[:, place - 1].to(device), given, whole[:, place - 1])
                found.add(place - prompt - 1, placed[:, place], *said)
                bar.advance()
            samples += len(ids)
    return found, samples, prompt


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < math.log(1e300) else math.inf
