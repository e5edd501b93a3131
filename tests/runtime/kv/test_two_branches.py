"""Decoding step by step against a masked pass over all tokens that knows nothing of a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.kv.attach import factors_of, kv_scheme_of, new_cache

from .tiny import compressed
from .two_branches import logits, reads_exact


@pytest.fixture(scope="module")
def original():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress()).module.eval()


def _ids(tokens):
    return torch.randint(3, 512, (1, tokens), generator=torch.Generator().manual_seed(1))


def _difference(original, chunks, **settings):
    """Largest difference between the logits of cached forwards and of the masked pass."""
    module = compressed(copy.deepcopy(original), 6, 9, **settings)
    ids, cache, found, begin = _ids(sum(chunks)), new_cache(module), [], 0
    with torch.no_grad():
        for chunk in chunks:
            found.append(module(ids[:, begin : begin + chunk], past_key_values=cache).logits)
            begin += chunk
        expected = logits(module, ids, factors_of(module), chunks, kv_scheme_of(module))
    exact = module(ids).logits
    assert (expected - exact).abs().max() > 0.1, "the compression shows"
    return (torch.cat(found, dim=1) - expected).abs().max()


@pytest.mark.parametrize(
    ("mode", "window"),
    [
        ("sliding", 0),
        ("sliding", 1),
        ("sliding", 16),
        ("sliding", 32),
        ("block", 1),
        ("block", 16),
        ("block", 32),
    ],
)
def test_decoding_is_the_masked_pass(original, mode, window):
    assert _difference(original, [21, *[1] * 43], mode=mode, window=window) < 1e-4


@pytest.mark.parametrize("mode", ["sliding", "block"])
def test_chunks_are_the_masked_pass(original, mode):
    assert _difference(original, [7, 16, 1, 1, 20, 3, 9, 1], mode=mode, window=8) < 1e-4


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    ("mode", "window", "key_group"),
    [("sliding", 0, 8), ("sliding", 5, 8), ("sliding", 16, 4), ("block", 8, 8)],
)
def test_a_quantized_cache_is_the_masked_pass(original, mode, window, key_group, bits):
    settings = {"mode": mode, "window": window, "key_group": key_group, "bits": bits}
    assert _difference(original, [19, *[1] * 14, 11, 1, 1], **settings) < 1e-4


def test_the_exact_span_of_blocks():
    """Right after a whole block nothing of it is exact; before that, all of it is."""
    spans = [int(reads_exact(torch.tensor([n]), n, 4, "block").sum()) for n in range(1, 10)]
    assert spans == [1, 2, 3, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(("mode", "spans"), [("block", [3, 0, 1, 2, 3, 0]), ("sliding", [4, 4, 4, 4, 4, 4])])
def test_the_exact_span_of_the_cache(original, mode, spans):
    module = compressed(copy.deepcopy(original), 6, 6, mode=mode, window=4)
    cache, found = new_cache(module), []
    with torch.no_grad():
        for tokens in (7, 1, 1, 1, 1, 1):
            module(_ids(tokens), past_key_values=cache)
            found.append(cache.layers[0].keys.shape[2])
    assert found == spans
