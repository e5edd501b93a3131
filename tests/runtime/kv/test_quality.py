"""Teacher-forced decoding of a language model that was really trained, through the real cache.

Factors are the closed-form optimum on the model's own text: with G = X^T X = L L^T, the SVD of L^T W.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import compress.models.builtin
import pytest
import torch
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.kv.attach import factors_of, new_cache, put_kv_cache
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache

from .tiny import scheme_for

FOLDER = Path(compress.models.builtin.__path__[0]) / "stories"


@pytest.fixture(scope="module")
def original():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress()).module.eval()


@pytest.fixture(scope="module")
def text():
    """Tokens [160, 160] of the stories that are long enough."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    lines = (FOLDER / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"][:160] for line in lines]
    return torch.tensor([row for row in rows if len(row) == 160])


@pytest.fixture(scope="module")
def moments(original, text):
    """X^T X of every attention's input, float64."""
    found = {}

    def add(name):
        def hook(_, __, keywords):
            x = keywords["hidden_states"].double().flatten(0, 1)
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    handles = [
        original.get_submodule(name).register_forward_pre_hook(add(name), with_kwargs=True)
        for name in scheme_for(original).layers
    ]
    with torch.no_grad():
        original(text)
    for handle in handles:
        handle.remove()
    return found


def _whitened(original, moments, rank_k, rank_v, **settings):
    module = copy.deepcopy(original)
    put_kv_cache(module, scheme_for(module, rank_k, rank_v, **settings))
    for name, factors in factors_of(module).items():
        root = torch.linalg.cholesky(moments[name] + 1e-9 * moments[name].trace() * torch.eye(64).double())
        for letter, rank in (("k", rank_k), ("v", rank_v)):
            weight = getattr(module.get_submodule(name), f"{letter}_proj").weight.T.double()
            u, s, v = torch.linalg.svd(root.T @ weight, full_matrices=False)
            down = torch.linalg.solve(root.T, u[:, :rank] * s[:rank].sqrt())
            getattr(factors, f"{letter}_a").weight.data.copy_(down.T)
            getattr(factors, f"{letter}_b").weight.data.copy_((s[:rank].sqrt()[:, None] * v[:rank]).T)
    return module


def _nll(module, text, cache=None):
    """Mean nats per token of what follows the first token, decoded one by one."""
    total, cache = 0.0, new_cache(module) if cache is None else cache
    with torch.no_grad():
        for index in range(text.shape[1] - 1):
            logits = module(text[:, index : index + 1], past_key_values=cache).logits[:, -1]
            total += float(F.cross_entropy(logits, text[:, index + 1]))
    return total / (text.shape[1] - 1)


def test_a_window_and_packed_integers_cost_little(original, moments, text):
    """Window 32 with 81 % removed: within 0.15 nat; 4 bits at rank 16: within 0.01 nat of floats."""
    text = text[:24, :100]
    base = _nll(original, text, DynamicCache())
    assert base < _nll(_whitened(original, moments, 6, 6, window=32), text) < base + 0.15
    floats = _nll(_whitened(original, moments, 16, 16, window=32), text)
    packed = _nll(_whitened(original, moments, 16, 16, window=32, bits=4, value_group=16), text)
    assert abs(packed - floats) < 0.01


@pytest.mark.slow
def test_likelihood_by_rank_and_by_window(original, moments, text):
    """No worse with a higher rank or a longer window; and keys bear compression better than values."""
    text = text[:48]
    ranks = [_nll(_whitened(original, moments, r, r, window=0), text) for r in (2, 6, 12, 16, 24, 32)]
    windows = [_nll(_whitened(original, moments, 6, 6, window=m), text) for m in (0, 2, 8, 32, 128)]
    splits = [_nll(_whitened(original, moments, k, 32 - k, window=0), text) for k in (12, 16, 24)]
    assert all(later <= earlier + 0.01 for earlier, later in zip(ranks, ranks[1:], strict=False))
    assert all(later <= earlier + 0.01 for earlier, later in zip(windows, windows[1:], strict=False))
    assert splits[0] < splits[1] < splits[2]
    # Measured by another implementation, on another text of the same model.
    assert ranks == pytest.approx([3.90, 2.79, 1.72, 1.45, 1.30, 1.26], abs=0.1)
    assert windows == pytest.approx([2.79, 1.62, 1.44, 1.34, 1.27], abs=0.1)
    assert splits == pytest.approx([1.393, 1.445, 2.137], abs=0.1)
