"""Decoding token by token: against one pass, against wider factors, in spans, and of hidden numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compress.calibration.tokens import tokenizer_of
from compress.errors import SourceError
from compress.evaluation.by_task import evaluator_for
from compress.evaluation.decoding import NOT_CARRIED, Steps, compressed_share, decoded
from compress.evaluation.evaluator import Evaluation
from compress.evaluation.passkey import NOT_FOUND, add_passkey, find, passkeys
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.decoding import DecodingSettings, PasskeySettings
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, ModelRef
from compress.runtime.kv.attach import factors_of, new_cache, put_kv_cache
from compress.runtime.kv.scheme import KvCacheScheme, KvLayer
from transformers import DynamicCache

from ..runtime.kv.tiny import PUBLISHED

WIDTH = 32
CALIBRATION = CalibrationSettings(samples=3, length=64)


def settings(**decoding):
    return EvaluateSettings.model_validate(
        {"fidelity": {"samples": 5, "batch_size": 2}, "layers": False, "decoding": decoding}
    )


def compressed(rank, **scheme):
    """Return the built-in model with factors of a rank: truncated SVDs of its own projections."""
    model = open_model(ModelRef(id="builtin:stories"), progress=SilentProgress())
    names = [name for name, _ in model.family.attentions(model.module)]
    layer = KvLayer(hidden=64, width=WIDTH, rank_k=rank, rank_v=rank, value_group=8)
    put_kv_cache(model.module, KvCacheScheme(layers=dict.fromkeys(names, layer), **{**PUBLISHED, **scheme}))
    for name, factors in factors_of(model.module).items():
        attention = model.module.get_submodule(name)
        for letter in "kv":
            weight = getattr(attention, f"{letter}_proj").weight
            left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
            with torch.no_grad():
                getattr(factors, f"{letter}_a").weight.copy_(right[:rank])
                getattr(factors, f"{letter}_b").weight.copy_((left * values)[:, :rank])
    return model


@pytest.fixture(scope="module")
def original():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress())


@pytest.fixture(scope="module")
def measure(original, tmp_path_factory):
    """Return `measure(model, **decoding)` -> its evaluation against the original."""
    cache = tmp_path_factory.mktemp("references")

    def run(model, progress=None, **decoding):
        evaluator = evaluator_for(original, settings(**decoding), 0, CALIBRATION)
        return evaluator.compare(
            model, evaluator.reference(original, cache, SilentProgress()), progress or SilentProgress()
        )

    return run


def test_steps_by_hand():
    """Two steps of one sequence: a vocabulary of two, the original even, the other at 3 to 1."""
    steps = Steps.of(2)
    even, sure = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    steps.add(0, torch.tensor([0]), even, sure, even)
    steps.add(1, torch.tensor([1]), even, even, sure)
    metrics = steps.metrics()
    assert metrics["decode_perplexity_original"] == pytest.approx(2.0)
    assert metrics["decode_perplexity"] == pytest.approx(
        math.exp((math.log(4 / 3) + math.log(2)) / 2), abs=1e-5
    )
    assert metrics["decode_perplexity_one_pass"] == pytest.approx(
        math.exp((math.log(2) + math.log(4)) / 2), abs=1e-5
    )
    assert metrics["cache_perplexity_increase"] == pytest.approx(
        metrics["decode_perplexity"] / metrics["decode_perplexity_one_pass"] - 1, abs=1e-5
    )
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert metrics["decode_kl"] == pytest.approx(divergence / 2, abs=1e-6)
    first, second = steps.rows()
    assert (first["first"], first["last"], second["first"], second["last"]) == (2, 2, 3, 3)
    assert first["compressed"] == pytest.approx(math.log(4 / 3), abs=1e-5)
    assert second["divergence"] == 0.0 and second["tokens"] == 1


def test_long_texts_are_told_in_spans_that_leave_nothing_out():
    steps = Steps.of(35)
    for at in range(35):
        steps.add(at, torch.tensor([0, 1]), *(torch.zeros(2, 2) for _ in range(3)))
    rows = steps.rows()
    assert len(rows) == 12 and sum(row["tokens"] for row in rows) == 70
    assert rows[0]["first"] == 2 and rows[-1]["last"] == 36
    assert all(after["first"] == before["last"] + 1 for before, after in zip(rows, rows[1:], strict=False))


def test_the_stock_cache_decodes_what_one_pass_predicts(original):
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=original.module.config)
    with torch.no_grad():
        whole = original.module(input_ids=ids).logits
    places = []
    for place, logits in decoded(original.module, ids, 4, cache):
        places.append(place)
        assert torch.allclose(logits, whole[:, place - 1], atol=1e-4)
    assert places == list(range(5, 20)) and cache.get_seq_length() == 19


def test_full_rank_decodes_as_the_original(measure):
    found = measure(compressed(WIDTH), prompt=8)
    assert abs(found.metrics["decode_perplexity_increase"]) < 1e-4 and found.metrics["decode_kl"] < 1e-5
    told = found.details["decoding"]
    assert (told["samples"], told["prompt"], told["tokens"]) == (5, 8, 5 * (64 - 8 - 1))


def test_fewer_ranks_cost_more_and_one_pass_does_not_see_it(measure):
    losses = [measure(compressed(rank, window=0)).metrics for rank in (4, 12, 24)]
    increases = [metrics["decode_perplexity_increase"] for metrics in losses]
    assert increases[0] > increases[1] > increases[2] > 0.01
    assert [metrics["perplexity_increase"] for metrics in losses] == [0.0] * 3
    for metrics in losses:
        original = metrics["decode_perplexity_original"]
        assert metrics["decode_perplexity_one_pass"] == pytest.approx(original, rel=1e-5)
    assert losses[0]["decode_kl"] > losses[2]["decode_kl"] > 0


def test_a_note_says_that_one_pass_says_nothing_of_the_cache(measure, original):
    assert "say nothing of a compressed cache" in measure(compressed(4)).details["text"]["note"]
    assert "note" not in measure(original).details["text"]


def test_within_the_window_nothing_is_lost_and_behind_it_something_is(measure):
    rows = measure(compressed(4, window=32), prompt=8).details["decoding"]["by_distance"]
    near = [row for row in rows if row["last"] <= 32 - 8]
    far = [row for row in rows if row["first"] > 40]
    assert near and all(row["divergence"] < 1e-5 for row in near)
    assert far and all(row["divergence"] > 1e-3 for row in far)


def test_the_original_stays_the_recorded_one_whatever_is_decoded(measure):
    few = measure(compressed(8), samples=2, prompt=8)
    assert few.details["decoding"]["samples"] == 2 and few.details["decoding"]["tokens"] == 2 * 55
    again = measure(compressed(8), samples=2, prompt=8)
    assert few.metrics == again.metrics


def test_a_model_without_a_compressed_cache_claims_nothing(measure, original):
    found = measure(original)
    assert found.details["decoding"] == {"skipped": NOT_CARRIED}
    assert not any(name.startswith("decode") for name in found.metrics)


HIDDEN = PasskeySettings(samples=4, lengths=(240, 400))


def test_numbers_are_hidden_at_every_depth_and_texts_have_their_length(original):
    found = passkeys(original, HIDDEN, seed=3)
    tokenizer = tokenizer_of(original.source.folder)
    assert [item.length for item in found] == [240] * 4 + [400] * 4
    assert len({item.number for item in found}) == 8
    depths = []
    for item in found:
        assert item.length - 40 < len(item.text) + len(item.question) <= item.length
        text = tokenizer.decode(item.text)
        assert text.count(item.number) == 2 and item.number not in tokenizer.decode(item.question)
        depths.append(text.index(item.number) / len(text))
    assert depths[:4] == sorted(depths[:4]) and depths[3] - depths[0] > 0.3
    assert passkeys(original, HIDDEN, seed=3) == found
    assert passkeys(original, HIDDEN, seed=4) != found


class Reader(torch.nn.Module):
    """Stands for a model that answers with the number that it has read in texts up to a length."""

    def __init__(self, original, longest):
        super().__init__()
        self.config, self.longest = original.module.config, longest
        self.tokenizer = tokenizer_of(original.source.folder)
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.answers = iter(())

    def forward(self, input_ids, past_key_values, use_cache):
        assert use_cache and isinstance(past_key_values, DynamicCache)
        if input_ids.shape[1] > 100:
            said = self.tokenizer.decode(input_ids[0]).split("Once more: it is ")[1][:5]
            said = said if input_ids.shape[1] <= self.longest else "7" + said[1:]
            answer = self.tokenizer(f": {said}. And on it goes", add_special_tokens=False)["input_ids"]
            self.answers = iter(answer)
            wanted = 0
        else:
            wanted = next(self.answers)
        logits = torch.nn.functional.one_hot(torch.tensor(wanted), self.config.vocab_size).float()
        return SimpleNamespace(logits=logits.expand(1, input_ids.shape[1], -1))


def asked(original, before, after):
    """Return the evaluation of a reader of `after` tokens, held against one of `before` tokens."""
    models = [replace(original, module=Reader(original, longest)) for longest in (before, after)]
    rows = find(models[0], passkeys(original, HIDDEN, 0), SilentProgress())
    result = Evaluation(details={"decoding": {}})
    add_passkey(models[1], HIDDEN, rows, 0, result, SilentProgress())
    return result


def test_what_is_found_is_counted_by_length(original):
    result = asked(original, before=1000, after=260)
    assert result.metrics == {"passkey_original": 1.0, "passkey": 0.5, "passkey_drop": 0.5}
    told = result.details["decoding"]["passkey"]
    assert told["original"] == [{"length": length, "samples": 4, "found": 4} for length in (240, 400)]
    assert [row["found"] for row in told["compressed"]] == [4, 0]


def test_an_original_that_finds_nothing_says_nothing_of_the_result(original):
    result = asked(original, before=0, after=1000)
    assert result.metrics == {"passkey_original": 0.0}
    assert result.details["decoding"]["passkey"]["note"] == NOT_FOUND


def test_the_built_in_model_finds_none_and_nothing_is_claimed(measure):
    hidden = {"samples": 2, "lengths": [240]}
    found = measure(compressed(16), passkey=hidden)
    assert found.metrics["passkey_original"] == 0.0 and "passkey" not in found.metrics
    assert found.details["decoding"]["passkey"]["note"] == NOT_FOUND


def test_a_compressed_cache_is_what_the_question_goes_through(measure, monkeypatch):
    from compress.evaluation import passkey

    made = []
    monkeypatch.setattr(passkey, "new_cache", lambda module: made.append(new_cache(module)) or made[-1])
    model = compressed(16)
    hidden = passkeys(model, PasskeySettings(samples=1, lengths=(240,)), 0)
    find(model, hidden, SilentProgress())
    assert len(made) == 1 and made[0].get_seq_length() >= len(hidden[0].text) + len(hidden[0].question)


def test_a_length_without_room_is_refused(original):
    with pytest.raises(SourceError, match="64 tokens have no room") as caught:
        passkeys(original, PasskeySettings(samples=1, lengths=(64,)), 0)
    assert caught.value.hint == "raise the length"


def test_the_prompt_of_short_sequences(measure):
    assert measure(compressed(16)).details["decoding"]["prompt"] == 32
    assert DecodingSettings().prompt_tokens(20) == 10


@pytest.mark.parametrize(
    ("scheme", "share"),
    [
        ({"window": 4}, (0 + 1 + 2) / (4 + 5 + 6)),
        ({"window": 0}, 1.0),
        ({"window": 7}, 0.0),
        ({"window": 4, "mode": "block"}, 12 / 15),
        ({"window": 0, "bits": 4, "key_group": 3}, (3 + 3 + 6) / 15),
        ({"window": 1, "bits": 4, "key_group": 5}, (0 + 4 + 5) / 15),
    ],
)
def test_the_share_that_is_read_out_of_the_compressed_cache(scheme, share):
    """Three tokens are scored behind a prompt of 4: they read 4, 5 and 6 tokens."""
    layer = KvLayer(hidden=64, width=WIDTH, rank_k=8, rank_v=8, value_group=8)
    stored = KvCacheScheme(layers={"model.layers.0.self_attn": layer}, **{**PUBLISHED, **scheme})
    assert compressed_share(stored, 4, 3) == pytest.approx(share)


def test_texts_that_hardly_leave_the_window_are_warned_of(measure):
    warned = []

    class Listener(SilentProgress):
        def warn(self, message):
            warned.append(message)

    measure(compressed(8, window=8), prompt=8, progress=Listener())
    assert not warned
    found = measure(compressed(8, window=60), prompt=8, progress=Listener())
    assert len(warned) == 1 and "raise calibration.length" in warned[0]
    assert found.details["decoding"]["compressed_share"] < 0.01
