"""What routers did: against a count of every token by hand, in one batch or in many."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.pruning.experts.statistics import RoutingSums, observe
from compress.errors import StageError
from compress.models.mixtures import mixtures

from ....tiny_moe import CLASSES
from .opened_moe import QUIET, batches, hooks, opened, routed_plainly


def _sums(model, calls):
    found = mixtures(model.module)
    sums = RoutingSums(found[0].count, [mixture.layer for mixture in found])
    items = observe(model.module, calls, [sums.update], label="routing", progress=QUIET)
    return sums, items


@pytest.mark.parametrize("class_name", CLASSES)
def test_counts_and_weights_are_those_of_every_token_that_is_no_padding(class_name):
    model, calls = opened(class_name), batches()
    sums, items = _sums(model, calls)
    assert items == 8
    plain = routed_plainly(model, calls)
    assert plain.keys() == sums.counts.keys() == sums.weights.keys()
    for layer, (hidden, weights, indices) in plain.items():
        counts, weighed = [0] * len(sums.counts[layer]), [0.0] * len(sums.counts[layer])
        for row, chosen in zip(weights.tolist(), indices.tolist(), strict=True):
            for weight, expert in zip(row, chosen, strict=True):
                counts[expert] += 1
                weighed[expert] += weight
        assert sums.counts[layer].tolist() == counts
        assert sum(counts) == 2 * len(hidden) == 2 * int(calls[0]["attention_mask"].sum())
        assert sums.weights[layer].tolist() == pytest.approx(weighed, rel=1e-5)


def test_many_batches_are_as_one():
    model = opened("Qwen2MoeForCausalLM")
    (one, _), (many, items) = _sums(model, batches(size=8)), _sums(model, batches(size=3))
    assert items == 8
    for layer in one.counts:
        assert torch.equal(one.counts[layer], many.counts[layer])
        torch.testing.assert_close(one.weights[layer], many.weights[layer], rtol=1e-5, atol=0)


def test_without_a_mask_all_tokens_count():
    model = opened("MixtralForCausalLM")
    ids = batches()[0]["input_ids"]
    sums, _ = _sums(model, [{"input_ids": ids}])
    assert all(count.sum() == 2 * ids.numel() for count in sums.counts.values())


def test_items_are_numbered_over_all_batches():
    model, seen = opened("OlmoeForCausalLM"), []
    calls = batches(items=5, size=2)

    def see(mixture, routed):
        if mixture.layer == 0:
            seen.extend(routed.samples.tolist())
            part = routed.of(torch.tensor([0, 3]))
            assert part.samples.tolist() == [item for item in routed.samples.tolist() if item in (0, 3)]
            assert len(part.hidden) == len(part.logits) == len(part.weights) == len(part.samples)

    observe(model.module, iter(calls), [see], label="routing", progress=QUIET)
    lengths = torch.cat([call["attention_mask"].sum(dim=1) for call in calls]).tolist()
    assert seen == [item for item, length in enumerate(lengths) for _ in range(length)]


def test_no_hook_is_left_after_an_exception():
    model = opened("MixtralForCausalLM")
    before = hooks(model)

    def fail(mixture, routed):
        assert hooks(model) > before
        raise RuntimeError("of the observer")

    with pytest.raises(RuntimeError, match="of the observer"):
        observe(model.module, batches(), [fail], label="routing", progress=QUIET)
    assert hooks(model) == before


def test_no_batch_is_refused():
    with pytest.raises(StageError, match="routing: there is no batch"):
        observe(opened("MixtralForCausalLM").module, [], [], label="routing", progress=QUIET)


@pytest.mark.parametrize("shape", [(8, 1, 12, 12), (4, 12), (8, 11)])
def test_a_mask_that_is_not_of_tokens_is_refused(shape):
    call = {"input_ids": batches()[0]["input_ids"], "attention_mask": torch.ones(shape)}
    with pytest.raises(StageError, match=r"attention_mask \[.*does not say which of \[8, 12\] tokens"):
        observe(opened("MixtralForCausalLM").module, [call], [], label="routing", progress=QUIET)
