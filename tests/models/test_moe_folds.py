"""What a mixture of experts can absorb: folding alone changes no output and sends no token elsewhere."""

from __future__ import annotations

import pytest
import torch
from compress.models.mixtures import mixtures
from compress.models.registry import family_for
from compress.runtime.linear_experts import split_experts

from ..quantized_moe import logits
from ..tiny_moe import CLASSES, moe_module

FULL_VALUES = {"num_key_value_heads": 4}
VARIANTS = [
    *((name, {}) for name in CLASSES),
    ("MixtralForCausalLM", FULL_VALUES),
    ("Qwen2MoeForCausalLM", FULL_VALUES),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": 12}),
    ("DeepseekV3ForCausalLM", {"q_lora_rank": None}),
]


def _factor(count, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def _routed(module):
    found = []
    hooks = [
        mixture.router.register_forward_hook(lambda *hook: found.append(hook[2][2]))
        for mixture in mixtures(module)
        if not isinstance(mixture.router, torch.nn.Linear)
    ]
    expected = logits(module)
    for hook in hooks:
        hook.remove()
    return expected, found


@pytest.mark.parametrize(("class_name", "changes"), VARIANTS)
def test_folding_alone_changes_no_output(class_name, changes):
    module = moe_module(class_name, **changes).double()
    module.set_experts_implementation("eager")
    family = family_for(class_name)
    split_experts(module)
    expected, routed = _routed(module)
    for index, group in enumerate(family.folds(module)):
        targets = [module.get_submodule(name) for name in group.targets]
        before = {name: value.clone() for name, value in module.state_dict().items()}
        factor = _factor(targets[0].in_features, index)
        group.absorb(module, factor)
        changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
        assert {name.rpartition(".")[0] for name in changed} == set(group.producers)
        with torch.no_grad():
            for target in targets:
                target.weight.div_(factor)
        found, again = _routed(module)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), group.targets
        assert all(torch.equal(one, other) for one, other in zip(routed, again, strict=True))


@pytest.mark.parametrize(("class_name", "changes"), VARIANTS)
def test_every_linear_of_a_block_reads_what_can_be_scaled(class_name, changes):
    module = moe_module(class_name, **changes)
    family = family_for(class_name)
    split_experts(module)
    targets = [name for group in family.folds(module) for name in group.targets]
    assert len(set(targets)) == len(targets)
    left = {
        site.name.rpartition(".")[2]
        for site in family.linears(module)
        if site.name not in targets and site.role not in ("router", "head")
    }
    shared_values = class_name.startswith("Deepseek") or changes != FULL_VALUES
    assert left == ({"o_proj"} if shared_values else set())


def test_what_fused_experts_read_is_not_scaled():
    module = moe_module("Qwen2MoeForCausalLM")
    norms = {name for group in family_for("Qwen2MoeForCausalLM").folds(module) for name in group.producers}
    assert "model.layers.1.post_attention_layernorm" in norms  # of a dense layer
    assert "model.layers.0.post_attention_layernorm" not in norms
    split_experts(module)
    groups = family_for("Qwen2MoeForCausalLM").folds(module)
    (group,) = [g for g in groups if "model.layers.0.post_attention_layernorm" in g.producers]
    assert len(group.targets) == 2 * (6 + 1)  # the shared expert is among them
    assert set(group.producers[1:]) == {"model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"}
