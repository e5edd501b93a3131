"""Routers whose weights are mapped after the softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress.errors import PlanError
from compress.models.mapped_experts import map_routers
from compress.models.mixtures import mixtures
from compress.runtime.mapped_router import LEAST_SHARE, MappedRouter, divisor, mapped
from compress.runtime.mapped_routing import MAPPABLE, mapping_problem
from torch import nn

from ..tiny_moe import CLASSES, moe_config, moe_module

_NORMALISED = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM")
_MIXED = {"OlmoeForCausalLM": {"norm_topk_prob": True}, "Qwen2MoeForCausalLM": {"norm_topk_prob": True}}


def _router(class_name: str, **changes: Any) -> nn.Module:
    return mixtures(moe_module(class_name, **changes))[0].router


def _states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def _by_hand(logits: list[float], mapping: list[list[float]], **attributes: Any) -> MappedRouter:
    """Return a router over one channel whose input 1.0 gives these logits."""
    router = nn.Module()
    router.weight = nn.Parameter(torch.tensor(logits)[:, None])
    for name, value in {"top_k": 1, **attributes}.items():
        setattr(router, name, value)
    return mapped(router, torch.tensor(mapping), "MixtralForCausalLM")


@pytest.mark.parametrize("class_name", MAPPABLE)
def test_the_identity_changes_nothing(class_name: str) -> None:
    router, states = _router(class_name), _states()
    expected = router(states)
    found = mapped(router, torch.eye(6), class_name)(states)
    torch.testing.assert_close(found[0].softmax(-1), expected[0].softmax(-1))
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("class_name", MAPPABLE)
def test_it_answers_in_the_types_of_the_stock_router(class_name: str) -> None:
    router = _router(class_name).to(torch.bfloat16)
    expected = router(_states(torch.bfloat16))
    found = mapped(router, torch.eye(6)[:4], class_name)(_states(torch.bfloat16))
    assert [part.dtype for part in found] == [part.dtype for part in expected]
    assert [tuple(part.shape) for part in found] == [(40, 4), (40, 2), (40, 2)]


@pytest.mark.parametrize("class_name", [*_NORMALISED, *_MIXED])
def test_one_hot_rows_are_picked_rows_where_weights_are_normalised(class_name: str) -> None:
    router, states = _router(class_name, **_MIXED.get(class_name, {})), _states()
    kept = [0, 2, 3, 5]
    found = mapped(router, torch.eye(6)[kept], class_name)(states)
    for name, tensor in router.named_parameters():
        setattr(router, name, nn.Parameter(tensor[kept], requires_grad=False))
    _, weights, indices = router(states)
    assert torch.equal(found[2], indices)
    torch.testing.assert_close(found[1], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("class_name", ["OlmoeForCausalLM", "DeepseekV2ForCausalLM"])
def test_weights_that_are_not_normalised_keep_their_size(class_name: str) -> None:
    changes = {"routed_scaling_factor": 2.5} if class_name.startswith("Deepseek") else {}
    router, states = _router(class_name, **changes), _states()
    softmax = torch.softmax(states @ router.get_parameter("weight").T, dim=-1)
    mapping = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    _, weights, indices = mapped(router, mapping, class_name)(states)
    wanted = softmax @ mapping.T
    torch.testing.assert_close(weights, wanted.gather(1, indices) * changes.get("routed_scaling_factor", 1.0))
    assert torch.equal(indices.sort().values, wanted.topk(2).indices.sort().values)


@pytest.mark.parametrize(("first", "chosen"), [(0.4, 0), (0.3, 1)])
def test_the_mapping_comes_after_the_softmax(first: float, chosen: int) -> None:
    # Softmax of 3, 2, 2, 2: 0.475 and three times 0.175; of it 0.4 are 0.190, and 0.3 are 0.143.
    logits, mapping = [3.0, 2.0, 2.0, 2.0], [[first, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    before = (torch.tensor(mapping) @ torch.tensor(logits)).argmax()
    assert before == 1, "mapped logits, 1.2 or 0.9 and 2, always choose the second"
    assert _by_hand(logits, mapping)(torch.ones(1, 1))[2].item() == chosen


def test_negative_entries_are_allowed() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().tolist()
    router = _by_hand(logits, [[1.0, -1.0, 0.0], [0.0, 0.0, -1.0], [0.0, -1.0, -2.0]], top_k=2)
    _, weights, indices = router(torch.ones(1, 1))
    # 0.2, -0.2, -0.7: two are chosen, and their sum is zero but for rounding.
    assert indices.tolist() == [[0, 1]]
    assert torch.isfinite(weights).all()
    least = 0.4 * LEAST_SHARE
    torch.testing.assert_close(weights.abs(), torch.tensor([[0.2 / least, 0.2 / least]]), rtol=1e-4, atol=0)


def test_divisors_keep_their_sign_and_a_distance_from_zero() -> None:
    weights = torch.tensor([[0.3, 0.1], [-0.3, -0.1], [0.5, -0.5], [0.0, 0.0], [1e-30, 2e-30]])
    found = divisor(weights)
    torch.testing.assert_close(found[:2, 0], torch.tensor([0.4, -0.4]))
    assert found[2, 0] == LEAST_SHARE
    assert torch.equal((weights / found)[3], torch.zeros(2))
    torch.testing.assert_close((weights / found)[4], torch.tensor([1 / 3, 2 / 3]))


def test_a_cast_of_the_model_leaves_it_running() -> None:
    router = mapped(_router("MixtralForCausalLM"), torch.eye(6)[:3], "MixtralForCausalLM").to(torch.bfloat16)
    assert router(_states(torch.bfloat16))[1].dtype == torch.float32


@pytest.mark.parametrize("class_name", sorted(set(CLASSES) - set(MAPPABLE)))
def test_other_routers_are_refused_with_the_reason(class_name: str) -> None:
    reason = "picks twice" if class_name.startswith("Phi") else "sigmoid"
    with pytest.raises(PlanError, match=reason):
        mapped(_router(class_name), torch.eye(6), class_name)
    config = {**moe_config(class_name), "_class_name": class_name}
    assert reason in str(mapping_problem(config))


def test_groups_of_experts_are_refused() -> None:
    changes = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    name = "DeepseekV2ForCausalLM"
    with pytest.raises(PlanError, match="group_limited_greedy"):
        mapped(_router(name, **changes), torch.eye(6), name)
    assert mapping_problem({**moe_config(name, **changes), "_class_name": name})
    assert mapping_problem({**moe_config(name), "_class_name": name}) is None


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (torch.eye(5), "column for each of the 6"),
        (torch.full((4, 6), float("nan")), "not finite"),
        (torch.eye(6)[:1], "2 experts per token, of 1"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(mapping: torch.Tensor, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        mapped(_router("MixtralForCausalLM"), mapping, "MixtralForCausalLM")


def test_a_router_is_mapped_once_and_shares_its_parameters() -> None:
    router = _router("GptOssForCausalLM")
    found = mapped(router, torch.eye(6)[:4], "GptOssForCausalLM", active=1)
    for name in ("weight", "bias"):
        assert found.get_parameter(name).data_ptr() == router.get_parameter(name).data_ptr()
    assert (found.top_k, router.top_k) == (1, 2)
    with pytest.raises(PlanError, match="mapped already"):
        mapped(found, torch.eye(6)[:4], "GptOssForCausalLM")


@pytest.mark.parametrize("class_name", MAPPABLE)
def test_stock_models_record_its_logarithms_and_take_a_loss_of_them(class_name: str) -> None:
    module = moe_module(class_name)
    config = {**moe_config(class_name), "_class_name": class_name}
    rows = {mixture.layer: torch.eye(6)[:4] - 0.01 for mixture in mixtures(module)}
    map_routers(module, config, rows, rows)
    tokens = torch.arange(20).reshape(2, 10)
    found = module(input_ids=tokens, output_router_logits=True)
    assert len(found.router_logits) == len(mixtures(module))
    for mixture, logits in zip(mixtures(module), found.router_logits, strict=True):
        assert isinstance(mixture.router, MappedRouter)
        assert logits.shape == (20, 4) and bool(torch.isfinite(logits).all())


def test_a_model_of_ours_is_not_saved_as_a_stock_one(tmp_path):
    from compress.runtime.mapped_routing import with_mapped_routers
    from compress.runtime.transformers_config import complete_transformers_config
    from compress.runtime.transformers_model import build_transformers_model

    raw = moe_config("MixtralForCausalLM", num_local_experts=4)
    config = complete_transformers_config("MixtralForCausalLM", raw, "here")
    module = build_transformers_model(with_mapped_routers(config, 6))
    with pytest.raises(TypeError, match="trust_remote_code=True"):
        module.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert callable(build_transformers_model(config).save_pretrained)
