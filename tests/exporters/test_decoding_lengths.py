"""What is decoded to verify a compressed cache meets all of it: its history, its groups, its blocks."""

from __future__ import annotations

import pytest
import torch
from compress.exporters.decoding import decoding_of, lengths
from compress.runtime.kv.scheme import factor_tensors

from ..tiny_cache import TINY_LLAMA, scheme_of

CONFIG = {"_class_name": "LlamaForCausalLM", "model_type": "llama", **TINY_LLAMA}


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("window", [1, 5, 32, 300])
@pytest.mark.parametrize("group", [1, 8, 32])
def test_the_window_is_left_and_a_group_is_completed(mode, window, group):
    scheme = scheme_of(CONFIG, window=window, mode=mode, key_group=group)
    prompt, steps = lengths(scheme, 8192)
    period = window if mode == "block" else group
    assert prompt > window + group and steps == 8
    assert (prompt + steps) // period > prompt // period
    assert prompt + steps < window + group + 8 + period + 8


@pytest.mark.parametrize("longest", [2, 7, 64])
def test_a_short_context_is_not_exceeded(longest):
    prompt, steps = lengths(scheme_of(CONFIG, window=100), longest)
    assert prompt >= 1 and steps >= 1 and prompt + steps == longest


def test_ids_are_of_the_vocabulary_and_come_again():
    scheme = scheme_of(CONFIG)
    first, second = (decoding_of(scheme, CONFIG, 2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and first.ids.shape == (2, first.prompt + 8)
    assert int(first.ids.min()) >= 0 and 60 < int(first.ids.max()) < 96
    assert first.factors == tuple(sorted(factor_tensors(scheme)))
    assert decoding_of(None, CONFIG, 2, torch.Generator()) is None
