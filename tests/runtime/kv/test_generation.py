"""generate() of transformers with the compressed cache, in all its ways, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from compress.errors import PlanError, SourceError, UsageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.kv.attach import (
    Factor,
    factors_of,
    kv_scheme_of,
    new_cache,
    put_kv_cache,
    remove_kv_cache,
)
from compress.runtime.kv.cache import CskvCache
from pydantic import ValidationError
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from .tiny import compressed, fill, scheme_for

PAD = 0


@pytest.fixture(scope="module")
def original():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress()).module.eval()


@pytest.fixture
def lossless(original):
    """Full rank, and a window so small that everything is rebuilt."""
    return compressed(copy.deepcopy(original), 0, 0, window=2)


@pytest.fixture
def lossy(original):
    return compressed(copy.deepcopy(original), 4, 6, window=3)


def _ids(rows=2, tokens=30, seed=0):
    return torch.randint(3, 512, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _text(module, ids, **keywords):
    settings = {
        "max_new_tokens": 24,
        "min_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": PAD,
        **keywords,
    }
    with torch.no_grad():
        return module.generate(ids, **settings)


def _left_padded(rows):
    """Rows of several lengths, filled on the left, and their mask."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((longest - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prefill_chunk_size": 7},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_every_way_of_generating_is_the_originals_at_full_rank(original, lossless, keywords):
    texts = []
    for module in (original, lossless):
        torch.manual_seed(0)
        texts.append(_text(module, _ids(), **keywords))
    assert torch.equal(*texts)


def test_generate_returns_the_compressed_cache(lossy):
    found = _text(lossy, _ids(), return_dict_in_generate=True)
    assert isinstance(found.past_key_values, CskvCache)
    assert found.past_key_values.get_seq_length() == 30 + 23


def test_a_conversation_goes_on_where_it_stopped(original, lossless):
    caches = {id(original): DynamicCache(), id(lossless): new_cache(lossless)}
    texts = []
    for module in (original, lossless):
        cache = caches[id(module)]
        first = _text(module, _ids(), past_key_values=cache)
        longer = torch.cat([first, _ids(tokens=9, seed=3)], dim=1)
        texts.append(_text(module, longer, past_key_values=cache))
    assert torch.equal(*texts)


def test_a_left_padded_row_is_the_row_alone(lossy):
    rows = [_ids(1, tokens, seed=tokens)[0] for tokens in (30, 17, 24)]
    ids, mask = _left_padded(rows)
    together = _text(lossy, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        alone = _text(lossy, row[None])
        assert torch.equal(together[index, 30:], alone[0, len(row) :])


def test_beams_of_left_padded_rows_are_the_originals_at_full_rank(original, lossless):
    ids, mask = _left_padded([_ids(1, tokens, seed=tokens)[0] for tokens in (22, 9)])
    texts = [_text(module, ids, attention_mask=mask, num_beams=3) for module in (original, lossless)]
    assert torch.equal(*texts)


def test_positions_count_from_their_difference(lossy):
    """Shifting all positions changes nothing, because only the differences rotate."""
    ids, found = _ids(), []
    for shift in (0, 77):
        cache, logits = new_cache(lossy), []
        with torch.no_grad():
            for begin, end in ((0, 20), *((i, i + 1) for i in range(20, 30))):
                positions = torch.arange(begin, end)[None] + shift
                logits.append(lossy(ids[:, begin:end], position_ids=positions, past_key_values=cache).logits)
        found.append(torch.cat(logits, dim=1))
    assert (found[0] - found[1]).abs().max() < 1e-4


def _continued(module, cache, ids, mask):
    with torch.no_grad():
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
            found = module(
                ids[:, step : step + 1], past_key_values=cache, attention_mask=mask, position_ids=positions
            )
    return found.logits


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
    ids=["reorder", "repeat", "select"],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_rows_are_chosen_and_repeated_with_all_that_belongs_to_them(original, change, rows, bits):
    module = compressed(copy.deepcopy(original), 4, 6, window=3, key_group=8, bits=bits)
    prompts = [_ids(1, tokens, seed=tokens)[0] for tokens in (30, 17, 24)]
    found = []
    for kept in (range(3), rows):
        ids, mask = _left_padded([prompts[row] for row in range(3)])
        ids, mask, cache = ids[list(kept)], mask[list(kept)], new_cache(module)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            module(ids, past_key_values=cache, attention_mask=mask, position_ids=positions)
        if kept is not rows:
            change(cache)
            mask = mask[rows]
        found.append(_continued(module, cache, _ids(3, 3)[: len(rows)].repeat(2, 1)[: len(rows)], mask))
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert cache.batch_size in (-1, len(rows))


@pytest.mark.parametrize("bits", [None, 2])
def test_a_cache_starts_anew_after_reset(original, bits):
    lossy = compressed(copy.deepcopy(original), 4, 6, window=3, key_group=8, bits=bits)
    cache = new_cache(lossy)
    with torch.no_grad():
        first = lossy(_ids(), past_key_values=cache).logits
        lossy(_ids(tokens=3), past_key_values=cache)
        cache.reset()
        assert (cache.get_seq_length(), cache.stored_bytes()) == (0, 0)
        assert not list(_tensors_below(cache, set(), (torch.nn.Module,)))
        assert torch.equal(lossy(_ids(), past_key_values=cache).logits, first)


def test_a_copied_cache_goes_its_own_way(lossy):
    """As for many answers to one prompt; the model is not copied with it."""
    cache = new_cache(lossy)
    with torch.no_grad():
        lossy(_ids(), past_key_values=cache)
        copied = copy.deepcopy(cache)
        assert copied.layers[0].attention is cache.layers[0].attention
        once = lossy(_ids(tokens=4, seed=5), past_key_values=copied).logits
        lossy(_ids(tokens=2, seed=6), past_key_values=copied)
        assert cache.get_seq_length() == 30
        assert torch.equal(lossy(_ids(tokens=4, seed=5), past_key_values=cache).logits, once)


def _tensors_below(thing, seen, skipped):
    if id(thing) in seen or isinstance(thing, skipped):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    children = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    for child in (*children, *vars(thing).values()) if hasattr(thing, "__dict__") else children:
        yield from _tensors_below(child, seen, skipped)


def test_between_forwards_nothing_is_held_but_what_is_counted(lossy):
    """No rebuilt keys, no angles, no exact history in any attribute of the cache."""
    cache = new_cache(lossy)
    with torch.no_grad():
        for tokens in (30, 1, 5):
            lossy(_ids(tokens=tokens), past_key_values=cache)
            held = list(_tensors_below(cache, set(), (torch.nn.Module,)))
            storages = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held
            }
            assert sum(storages.values()) == cache.stored_bytes()


def test_copies_and_pickles_of_a_model_hold_their_own_cache(lossy):
    expected = _text(lossy, _ids())
    copied = copy.deepcopy(lossy)
    buffer = io.BytesIO()
    torch.save(lossy, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for module in (copied, loaded):
        assert kv_scheme_of(module) == kv_scheme_of(lossy)
        cache = _text(module, _ids(), return_dict_in_generate=True).past_key_values
        assert cache.layers[0].attention is module.model.layers[0].self_attn
        assert torch.equal(_text(module, _ids()), expected)
        for factors in factors_of(module).values():
            factors.v_b.weight.data.zero_()
    assert torch.equal(_text(lossy, _ids()), expected)
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(new_cache(lossy), io.BytesIO())


def test_a_model_with_a_cache_is_not_kept_alive(original):
    module = compressed(copy.deepcopy(original), 4, 6)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_save_pretrained_writes_the_factors_and_stock_code_reads_the_rest(lossy, original, tmp_path):
    lossy.save_pretrained(tmp_path)
    stock, told = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["unexpected_keys"]) == set(lossy.state_dict()) - set(original.state_dict())
    assert "model.layers.0.self_attn.cskv.k_a.weight" in told["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(stock(_ids()).logits, original(_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(original, dtype):
    """Converted after the factors are there; at full rank off by what the type's rounding costs."""
    module = compressed(copy.deepcopy(original), 0, 0, window=4).to(dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    cache, stock, found, expected = new_cache(module), DynamicCache(), [], []
    with torch.no_grad():
        for begin, end in ((0, 20), *((i, i + 1) for i in range(20, 30))):
            found.append(module(_ids()[:, begin:end], past_key_values=cache).logits)
            expected.append(module(_ids()[:, begin:end], past_key_values=stock).logits)
    found, expected = torch.cat(found, dim=1), torch.cat(expected, dim=1)
    assert found.dtype == dtype
    tolerance = 0.3 if dtype == torch.bfloat16 else 0.04
    assert 0 < (found - expected).abs().max() < tolerance
    stored = [tensor for tensor in cache.tensors() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in stored} == {dtype}


def test_factors_are_made_in_the_models_type(original):
    module = copy.deepcopy(original).to(torch.bfloat16)
    put_kv_cache(module, scheme_for(module))
    fill(module)
    assert {f.k_a.weight.dtype for f in factors_of(module).values()} == {torch.bfloat16}
    assert _text(module, _ids()).shape == (2, 54)


def test_a_factor_gives_the_same_bits_whether_it_is_trained_or_not():
    """torch takes other ways for the two where the input is strided, as rebuilt integers are."""
    factor = Factor((16, 4), torch.float32, torch.device("cpu"))
    assert not factor.weight.requires_grad
    factor.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    with torch.no_grad():
        expected = factor(x)
        factor.weight.requires_grad_()
        assert torch.equal(factor(x), expected)


def test_factors_are_made_where_the_model_is(original):
    with torch.device("meta"):
        module = LlamaForCausalLM(original.config)
    put_kv_cache(module, scheme_for(module))
    shapes = {name: factors.k_b.weight for name, factors in factors_of(module).items()}
    assert {(tuple(weight.shape), weight.device.type) for weight in shapes.values()} == {((32, 6), "meta")}


def test_what_takes_tokens_back_is_refused(lossy, original):
    ids = _ids(1)
    with pytest.raises(UsageError, match="assisted decoding") as caught:
        _text(lossy, ids, prompt_lookup_num_tokens=3)
    assert "DynamicCache()" in str(caught.value)
    with pytest.raises(UsageError, match="assisted decoding"):
        _text(lossy, ids, assistant_model=original)
    with pytest.raises(UsageError, match="assisted decoding"):
        _text(lossy, ids, assistant_model=original, past_key_values=new_cache(lossy))
    with pytest.raises(UsageError, match="assisted decoding"):
        _text(original, ids, assistant_model=lossy)
    stock = _text(lossy, ids, prompt_lookup_num_tokens=3, past_key_values=DynamicCache())
    assert torch.equal(stock, _text(original, ids))
    cache = new_cache(lossy)
    with torch.no_grad():
        lossy(ids, past_key_values=cache)
    for refused in (lambda: cache.crop(-1), lambda: cache.layers[0].crop(-1), cache.activate_past_recording):
        with pytest.raises(UsageError, match="cannot take tokens back"):
            refused()
    assert not cache.is_croppable
    assert not cache.is_compileable


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_caches_by_name_are_refused(lossy, kind):
    with pytest.raises(UsageError, match=f"cache_implementation='{kind}'") as caught:
        _text(lossy, _ids(1), cache_implementation=kind)
    assert "leave it out; or pass past_key_values=DynamicCache()" in str(caught.value)
    for refused in (new_cache(lossy).layers[0].offload, new_cache(lossy).layers[0].prefetch):
        with pytest.raises(UsageError, match="not offloaded"):
            refused()


def test_a_cache_of_another_model_is_refused(lossy, original):
    other = copy.deepcopy(lossy)
    for module, cache in ((other, new_cache(lossy)), (original, new_cache(lossy))):
        with pytest.raises(UsageError, match="another model") as caught, torch.no_grad():
            module(_ids(), past_key_values=cache)
        assert "new_cache(model)" in caught.value.hint
    with pytest.raises(UsageError, match="no compressed cache"):
        new_cache(original)


def test_a_forward_that_was_broken_off_is_noticed(lossy):
    cache = new_cache(lossy)
    with torch.no_grad():
        lossy(_ids(), past_key_values=cache)
        norm = lossy.model.layers[2].input_layernorm

        def fail(*_):
            raise MemoryError

        handle = norm.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            lossy(_ids(tokens=1), past_key_values=cache)
        handle.remove()
        with pytest.raises(UsageError, match="broken off"):
            lossy(_ids(tokens=1), past_key_values=cache)
        cache.reset()
        lossy(_ids(), past_key_values=cache)


def test_a_scheme_that_does_not_fit_is_refused(original):
    module = copy.deepcopy(original)
    scheme = scheme_for(module)
    name, layer = next(iter(scheme.layers.items()))

    def changed(**sizes):
        return scheme.model_copy(update={"layers": {name: layer.model_copy(update=sizes)}})

    with pytest.raises(SourceError, match=f"{name} has hidden 63 and width 32.*k_proj has 64 and 32"):
        put_kv_cache(module, changed(hidden=63))
    with pytest.raises(SourceError, match=f"{name} has hidden 64 and width 64"):
        put_kv_cache(module, changed(width=64))
    with pytest.raises(SourceError, match=r"no module model\.layers\.9\.self_attn"):
        put_kv_cache(module, scheme.model_copy(update={"layers": {"model.layers.9.self_attn": layer}}))
    with pytest.raises(SourceError, match=r"model\.layers\.0\.mlp is a LlamaMLP without q_proj"):
        put_kv_cache(module, scheme.model_copy(update={"layers": {"model.layers.0.mlp": layer}}))
    assert kv_scheme_of(module) is None
    assert module.state_dict().keys() == original.state_dict().keys(), "nothing is left of what was refused"
    put_kv_cache(module, scheme)
    with pytest.raises(PlanError, match="already"):
        put_kv_cache(module, scheme)
    remove_kv_cache(module)
    remove_kv_cache(module)


@pytest.mark.parametrize("sizes", [{"rank_k": 0}, {"rank_v": 33}, {"rank_k": 33}, {"rank_v": 0}])
def test_ranks_outside_the_width_are_refused(original, sizes):
    name, layer = next(iter(scheme_for(original).layers.items()))
    with pytest.raises(ValidationError, match="rank_"):
        type(layer).model_validate({**layer.model_dump(), **sizes})


def test_blocks_are_rounded_as_a_whole(original):
    with pytest.raises(ValidationError, match="key_group is 8, not 16"):
        scheme_for(original, mode="block", window=16, key_group=8, bits=4)
    assert scheme_for(original, mode="block", window=16, key_group=8).key_group == 8, "it plays no part"
    with pytest.raises(ValidationError, match="at least one token"):
        scheme_for(original, mode="block", window=0)


def test_keys_and_values_of_a_prompt_pass_as_they_are(lossy):
    cache, k, v = new_cache(lossy), torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
    cache.stage(lossy.model.layers[0].self_attn, torch.randn(1, 5, 64), torch.arange(5)[None])
    keys, values = cache.update(k, v, 0)
    assert keys is k
    assert values is v


def test_an_attention_of_a_derived_class_rotates_as_the_stock_one(lossy):
    class Mine(LlamaAttention):
        pass

    expected = _text(lossy, _ids())
    for layer in lossy.model.layers:
        layer.self_attn.__class__ = Mine
    assert torch.equal(_text(lossy, _ids()), expected)


def test_an_attention_that_is_called_with_its_input_by_place(lossy):
    cache, attention = new_cache(lossy), lossy.model.layers[0].self_attn
    x, ids = torch.randn(1, 5, 64), torch.arange(5)[None]
    with torch.no_grad():
        angles = lossy.model.rotary_emb(x, ids)
        attention(x, angles, None, cache, position_ids=ids)
        attention(hidden_states=x, position_embeddings=angles, past_key_values=cache, position_ids=ids)
    assert cache.layers[0].get_seq_length() == 10


def test_a_class_of_ones_own_counts_as_the_stock_class(original):
    class Mine(LlamaForCausalLM):
        pass

    module = Mine(original.config)
    put_kv_cache(module, scheme_for(original))
    assert isinstance(new_cache(module), CskvCache)


def test_a_negative_window_is_refused(original):
    with pytest.raises(ValidationError, match="window"):
        scheme_for(original, window=-1)
