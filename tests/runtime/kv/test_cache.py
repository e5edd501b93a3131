"""The bi-branch cache on the built-in language model: what must equal the original, and what is stored."""

from __future__ import annotations

import copy

import pytest
import torch
from compress.errors import UsageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.kv.attach import kv_scheme_of, new_cache, remove_kv_cache
from compress.runtime.kv.cache import Positions
from compress.runtime.kv.sizes import cache_bytes
from transformers import DynamicCache

from .tiny import compressed


@pytest.fixture(scope="module")
def original():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress()).module.eval()


@pytest.fixture
def prompt():
    return torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))


def _greedy(module, prompt, **keywords):
    with torch.no_grad():
        return module.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False, **keywords)


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("window", [8, 32])
def test_full_rank_writes_the_same_text(original, prompt, mode, window):
    module = compressed(copy.deepcopy(original), 0, 0, window=window, mode=mode)
    assert torch.equal(_greedy(module, prompt), _greedy(original, prompt))


def test_a_window_over_everything_writes_the_same_text_at_any_rank(original, prompt):
    module = compressed(copy.deepcopy(original), 1, 1, window=100)
    assert torch.equal(_greedy(module, prompt), _greedy(original, prompt))


def test_a_small_rank_and_window_write_another_text_and_a_stock_cache_does_not(original, prompt):
    module = compressed(copy.deepcopy(original), 2, 2, window=0)
    expected = _greedy(original, prompt)
    assert not torch.equal(_greedy(module, prompt), expected)
    assert torch.equal(_greedy(module, prompt, past_key_values=DynamicCache()), expected)
    assert torch.equal(_greedy(module, prompt, use_cache=False), expected)


def test_the_logits_of_a_prompt_are_the_originals(original, prompt):
    module = compressed(copy.deepcopy(original), 2, 2, window=4)
    with torch.no_grad():
        expected = original(prompt, past_key_values=DynamicCache()).logits
        assert torch.equal(module(prompt, past_key_values=new_cache(module)).logits, expected)
        assert torch.equal(module(prompt).logits, expected)


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("bits", [None, 4, 2])
def test_stored_bytes_are_the_formula(original, prompt, mode, bits):
    module = compressed(copy.deepcopy(original), 5, 7, window=16, key_group=16, mode=mode, bits=bits)
    cache = new_cache(module)
    with torch.no_grad():
        for tokens in (prompt, prompt[:, :1], prompt[:, :9]):
            module(tokens, past_key_values=cache)
            expected = cache_bytes(kv_scheme_of(module), cache.get_seq_length(), 2, 4)
            assert cache.stored_bytes() == expected
            assert sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors()) == expected


def test_positions_are_kept_once_and_their_angles_for_as_long_as_they_hold(original):
    """Two layers extend them by the same tokens; angles follow the tokens asked for, and rows that change."""
    rotary = original.model.rotary_emb
    positions, like = Positions(rotary), torch.zeros(1)
    for before, ids in ((0, [[3, 4, 5]]), (3, [[6], [9]])):
        for _layer in range(2):
            positions.extend(torch.tensor(ids), 2, before)
    assert positions.ids.tolist() == [[3, 4, 5, 6], [3, 4, 5, 9]]
    with pytest.raises(UsageError, match="positions of 4 tokens and a layer of 5"):
        positions.extend(torch.tensor([[1]]), 2, 5)
    for tokens in (2, 4):
        found = positions.angles(tokens, like)
        assert torch.equal(found[0], rotary(like, positions.ids[:, :tokens])[0])
    assert positions.angles(4, like)[0] is found[0], "worked out once for all layers"
    positions.change(lambda ids: ids[[1, 1]])
    assert torch.equal(positions.angles(4, like)[1], rotary(like, torch.tensor([[3, 4, 5, 9]] * 2))[1])


def test_removed_it_is_a_stock_model_again(original, prompt):
    module = compressed(copy.deepcopy(original), 2, 2, window=0)
    hooked = module.model.layers[0].self_attn
    assert len(hooked._forward_pre_hooks) == 1
    remove_kv_cache(module)
    assert not hooked._forward_pre_hooks
    assert not hooked._forward_pre_hooks_with_kwargs
    assert kv_scheme_of(module) is None
    assert module.state_dict().keys() == original.state_dict().keys()
    assert torch.equal(_greedy(module, prompt), _greedy(original, prompt))
