"""Dynamic skipping: medians of ratios, and the model that leaves second experts out."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.pruning.experts.skipping import skipping, thresholds
from compress.models.mixtures import mixtures

from ....tiny_moe import CLASSES
from .opened_moe import QUIET, batches, hooks, opened, routed_plainly

RENORMALISE = {"MixtralForCausalLM", "GptOssForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"}


def _ratios(weights):
    return weights.float().amin(dim=1) / weights.float().amax(dim=1)


def _states(model, calls):
    with torch.no_grad():
        return [model.module(**call, use_cache=False).logits for call in calls]


@pytest.mark.parametrize("class_name", CLASSES)
def test_thresholds_are_the_medians_of_all_tokens(class_name):
    model = opened(class_name)
    found = thresholds(model, batches(size=3), progress=QUIET)
    assert found == thresholds(model, batches(size=8), progress=QUIET)
    for layer, (_, weights, _) in routed_plainly(model, batches()).items():
        median = float(_ratios(weights).median())
        assert median - 2**-16 <= found[layer] <= median + 1e-6


def test_models_with_another_number_of_active_experts_have_none():
    model = opened("MixtralForCausalLM", num_experts_per_tok=3)
    assert thresholds(model, batches(), progress=QUIET) is None


@pytest.mark.parametrize("class_name", CLASSES)
@torch.no_grad()
def test_a_layer_leaves_the_second_expert_out_below_its_threshold(class_name):
    model, calls = opened(class_name), batches()
    medians = thresholds(model, calls, progress=QUIET)
    plain = routed_plainly(model, calls)
    before = _states(model, calls)
    for mixture in mixtures(model.module):
        hidden, weights, indices = plain[mixture.layer]
        with skipping(model, medians):
            found = _routed_within(model, mixture, hidden)
        skip = _ratios(weights) < medians[mixture.layer]
        assert torch.equal(found[1], indices)
        assert torch.equal(found[0][~skip], weights[~skip])
        alone = found[0][skip]
        assert ((alone != 0).sum(dim=1) == 1).all()
        assert torch.equal(alone.argmax(dim=1), weights[skip].argmax(dim=1))
        wanted = weights[skip].sum(dim=1) if class_name in RENORMALISE else weights[skip].amax(dim=1)
        torch.testing.assert_close(alone.sum(dim=1), wanted)
    assert hooks(model) == 0
    assert all(torch.equal(one, other) for one, other in zip(before, _states(model, calls), strict=True))


def _routed_within(model, mixture, hidden):
    """Route some tokens as the hooks see them in a forward of the decoder."""
    decoder = model.module.get_submodule("model")
    ids = torch.zeros((1, len(hidden)), dtype=torch.int64)
    for hook in decoder._forward_pre_hooks.values():
        hook(decoder, (), {"input_ids": ids})
    _, weights, indices = mixture.router(hidden)
    return weights, indices


@torch.no_grad()
def test_what_remains_is_the_first_expert_alone():
    model, calls = opened("MixtralForCausalLM"), batches()
    with skipping(model, dict.fromkeys(range(3), 1.1)) as found:
        skipped = _states(model, calls)
    assert found.experts_per_token == 1.0
    for mixture in mixtures(model.module):
        mixture.router.top_k = 1  # renormalises: the first expert with a weight of 1
    one = _states(model, calls)
    real = calls[0]["attention_mask"].bool()
    torch.testing.assert_close(skipped[0][real], one[0][real])


def test_tokens_are_counted_without_padding_in_forwards_and_in_generation():
    model, calls = opened("MixtralForCausalLM"), batches()
    medians = thresholds(model, calls, progress=QUIET)
    tokens = int(calls[0]["attention_mask"].sum())
    with skipping(model, medians) as found:
        assert found.experts_per_token == 2.0
        _states(model, calls)
    assert found.tokens == 3 * tokens
    assert 1.4 < found.experts_per_token < 1.6  # medians: half of the tokens of every layer
    with skipping(model, medians) as found, torch.no_grad():
        model.module.generate(**calls[0], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert found.tokens == 3 * (tokens + 3 * 8)  # the last of the new tokens is not computed
    with skipping(model, dict.fromkeys(medians, 0.0)) as found:
        assert all(map(torch.equal, _states(model, calls), _states(model, calls)))
    assert found.experts_per_token == 2.0


def test_no_hook_is_left_after_an_exception():
    model, calls = opened("MixtralForCausalLM"), batches()
    medians = thresholds(model, calls, progress=QUIET)
    with pytest.raises(RuntimeError, match="within"), skipping(model, medians):
        assert hooks(model) == 4
        raise RuntimeError("within")
    assert hooks(model) == 0


@torch.no_grad()
def test_weights_that_a_sigmoid_leaves_as_they_are_stay_so():
    model, calls = opened("DeepseekV3ForCausalLM", norm_topk_prob=False), batches()
    plain = routed_plainly(model, calls)
    for mixture in mixtures(model.module):
        hidden, weights, _ = plain[mixture.layer]
        with skipping(model, dict.fromkeys(plain, 1.1)):
            alone, _ = _routed_within(model, mixture, hidden)
        torch.testing.assert_close(alone.sum(dim=1), weights.amax(dim=1))
