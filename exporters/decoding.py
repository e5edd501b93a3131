"""What a model with a compressed cache decodes when it is verified: ids, and how many are the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.kv.scheme import KvCacheScheme, factor_tensors
from ..runtime.language_config import class_name_of
from ..runtime.transformers_config import complete_transformers_config, longest_sequence
from ..runtime.validate import CONFIG_NAME
from .verify_worker import decode

STEPS = 8
_LONGEST = 8192
"""Tokens at most, so that a verification ends; a longer window is not left behind then."""


@dataclass(frozen=True)
class Decoding:
    """A text that is fed as a prompt and then token by token.

    Attributes:
        ids: [batch, tokens] int64, on the CPU.
        prompt: how many of the tokens are fed at once.
        factors: names of the tensors that the compressed cache needs, sorted.
    """

    ids: Tensor
    prompt: int
    factors: tuple[str, ...]

    def run(self, module: nn.Module) -> Tensor:
        """Return the logits that a module with a compressed cache computes; see `verify_worker.decode`."""
        from ..runtime.kv.attach import new_cache

        ids = self.ids.to(next(module.parameters()).device)
        logits: Tensor = decode(module, new_cache(module), ids, self.prompt)
        return logits


def decoding_of(
    scheme: KvCacheScheme | None, config: Mapping[str, Any], batch: int, generator: torch.Generator
) -> Decoding | None:
    """Draw the ids that a compressed cache is verified with; None where the cache is not compressed.

    Args:
        scheme: of the cache.
        config: of the language model, with its class.
        batch: rows.
        generator: of the ids; drawn from only where the cache is compressed.
    """
    if scheme is None:
        return None
    name = str(class_name_of(config))
    positions = longest_sequence(complete_transformers_config(name, config, CONFIG_NAME))
    prompt, steps = lengths(scheme, min(positions, _LONGEST))
    ids = torch.randint(int(config["vocab_size"]), (batch, prompt + steps), generator=generator)
    return Decoding(ids, prompt, tuple(sorted(factor_tensors(scheme))))


def lengths(scheme: KvCacheScheme, longest: int) -> tuple[int, int]:
    """Return the tokens of the prompt and how many follow it, of a text that meets all of the cache.

    The prompt leaves the window behind by more than a group, and a group (or in mode `block` a block) is
    completed while tokens are decoded, as far as the model's longest sequence allows.

    Args:
        scheme: of the cache.
        longest: tokens that the model takes, at least 2.
    """
    steps = min(STEPS, longest - 1)
    period = scheme.window if scheme.mode == "block" else scheme.key_group
    behind = scheme.window + scheme.key_group
    end = -(-(behind + steps) // period) * period + steps // 2
    return min(end, longest) - steps, steps
