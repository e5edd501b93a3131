"""Experts removed and mixed: against the stock classes, reloaded, and against the method's own formulas."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from compress.errors import PlanError
from compress.exporters import formats
from compress.models.expert_choice import checked_experts, fewer_experts, with_counts_of
from compress.models.experts import (
    fewer_experts_spec,
    keep_experts,
    keep_experts_of,
    mixed,
    use_fewer_experts,
)
from compress.models.mixtures import mixtures
from compress.models.open import open_model, read_spec
from compress.models.shapes import complete_config, expected_shapes
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.resuming import resume
from compress.runtime.load import load
from compress.runtime.moe_config import moe_shape
from safetensors.torch import load_file

from ..tiny_moe import CLASSES, make_moe, moe_config, moe_module

CHOICES = {  # of 6 experts, or of 8 in two groups of 4
    6: [(1, 2, 5), (0, 3, 4), (2, 4, 5), (0, 1, 2)],
    8: [(0, 2, 5, 7), (1, 3, 4, 6), (2, 3, 4, 5), (0, 1, 6, 7)],
}
RENORMALISED = {"Qwen2MoeForCausalLM": {"norm_topk_prob": True}, "OlmoeForCausalLM": {"norm_topk_prob": True}}
OPEN_GROUPS = {"topk_group": 2}  # every group can be chosen from


def _config(class_name, **changes):
    return complete_config(class_name, moe_config(class_name, **changes), "config.json")


def _open(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def _kept(config):
    shape = moe_shape(config)
    choices = CHOICES[shape.routing.experts]
    return {layer: choices[layer % len(choices)] for layer in shape.sparse}


def _logits(module, tokens=24, seed=7):
    ids = torch.randint(60, (2, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def _one_hot(experts, kept):
    return torch.nn.functional.one_hot(torch.tensor(kept), experts).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("class_name", CLASSES)
def test_the_identity_changes_no_logit(class_name, dtype):
    module, config = moe_module(class_name).to(dtype), _config(class_name)
    before, experts = _logits(module), moe_shape(config).routing.experts
    everything = dict.fromkeys(moe_shape(config).sparse, range(experts))
    identity = dict.fromkeys(moe_shape(config).sparse, torch.eye(experts))
    assert keep_experts(module, config, everything, mixing=identity) == {
        **config, **({"num_local_experts": experts} if class_name == "Qwen3MoeForCausalLM" else {})
    }  # fmt: skip
    assert torch.equal(_logits(module), before)


@pytest.mark.parametrize("class_name", CLASSES)
def test_what_is_left_is_what_stock_code_reloads(class_name, tmp_path):
    model = _open(make_moe(tmp_path / "m", class_name))
    spec = read_spec(ModelRef(id=str(tmp_path / "m")))
    kept = _kept(model.config)
    count = len(kept[min(kept)])
    originals = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    keep_experts_of(model, kept)
    for mixture in mixtures(model.module):
        assert (mixture.count, mixture.active) == (count, 2)
        for place, tensors in (
            (f"{mixture.name}.{mixture.router_name}", mixture.router_tensors()),
            (f"{mixture.name}.experts", mixture.expert_tensors()),
        ):
            for name, tensor in tensors.items():
                assert torch.equal(tensor, originals[f"{place}.{name}"][list(kept[mixture.layer])])
    planned = fewer_experts_spec(spec, count)
    assert planned.size() == model.size() and planned.tensors == model.dense().tensors
    assert formats.predict_bytes(planned, "compress") == _write(model, tmp_path / "out").bytes
    stock, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert torch.equal(_logits(stock.eval()), _logits(model.module))
    assert torch.equal(_logits(load(tmp_path / "out")), _logits(model.module))
    assert sum(p.numel() for p in stock.parameters()) == model.size().parameters
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(written[key] == count for key in _keys_of_count(class_name))
    model.module.save_pretrained(tmp_path / "saved")
    saved, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "out"))
    assert saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name]) for name in saved)


def _keys_of_count(class_name):
    if class_name == "Qwen3MoeForCausalLM":
        return "num_local_experts", "num_experts"
    if class_name.startswith("Deepseek"):
        return ("n_routed_experts",)
    return ("num_experts",) if class_name[:4] in ("Qwen", "Olmo") else ("num_local_experts",)


def _write(model, folder):
    folder.mkdir()
    return formats.write(model, folder, "compress")


def _weights_of_choice(mixture, config, hidden, kept, renormalise):
    """Weights and indices among `kept` after the method's equation: the full router first, then its rows."""
    router, active = mixture.router, mixture.active
    logits = torch.nn.functional.linear(hidden, router.weight, getattr(router, "bias", None))
    kind = config["model_type"]
    if kind == "gpt_oss":
        top = logits[:, kept].topk(active)
        return top.values.softmax(-1), top.indices
    if kind == "deepseek_v3":
        scores = logits.sigmoid()[:, kept]
        chosen = (scores + router.e_score_correction_bias[list(kept)]).topk(active).indices
        weights = scores.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor, chosen
    top = logits.softmax(-1)[:, kept].topk(active)
    values = top.values / top.values.sum(-1, keepdim=True) if renormalise else top.values
    return values * getattr(router, "routed_scaling_factor", 1.0), top.indices


def _searched(module, config, kept, renormalise):
    """Make a whole model compute as the method does while it searches: rows of the routing weights."""
    for mixture in mixtures(module):
        choice = kept[mixture.layer]
        experts = torch.tensor(choice)

        def route(hidden, mixture=mixture, choice=choice, experts=experts):
            flat = hidden.reshape(-1, hidden.shape[-1])
            weights, places = _weights_of_choice(mixture, config, flat, list(choice), renormalise)
            return None, weights, experts[places]

        mixture.router.forward = route


@pytest.mark.parametrize("class_name", [name for name in CLASSES if name != "PhimoeForCausalLM"])
def test_rows_of_routing_weights_and_removal_agree_where_the_weights_are_normalised(class_name):
    changes = {**RENORMALISED.get(class_name, {}), **(OPEN_GROUPS if "V3" in class_name else {})}
    config = _config(class_name, **changes)
    kept = _kept(config)
    searched, removed = moe_module(class_name, **changes), moe_module(class_name, **changes)
    _searched(searched, config, kept, renormalise=bool(config.get("norm_topk_prob", True)))
    keep_experts(removed, config, kept)
    difference = (_logits(searched) - _logits(removed)).abs().max()
    assert moe_shape(config).routing.ignores_absent == (class_name != "DeepseekV2ForCausalLM")
    if moe_shape(config).routing.ignores_absent:
        assert difference <= 1e-5
    else:
        assert difference > 1e-2


@pytest.mark.parametrize("class_name", ["Qwen2MoeForCausalLM", "OlmoeForCausalLM"])
def test_rows_of_routing_weights_and_removal_differ_where_they_are_not(class_name):
    config = _config(class_name)
    searched, removed = moe_module(class_name), moe_module(class_name)
    _searched(searched, config, _kept(config), renormalise=False)
    keep_experts(removed, config, _kept(config))
    assert not moe_shape(config).routing.ignores_absent
    assert (_logits(searched) - _logits(removed)).abs().max() > 1e-2


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_row_of_one_expert_gives_it_and_a_mean_gives_the_mean_in_hub_names(class_name, tmp_path):
    model = _open(make_moe(tmp_path / "m", class_name))
    kept, experts = _kept(model.config), moe_shape(model.config).routing.experts
    layer = max(kept)
    rows = _one_hot(experts, kept[layer])
    rows[1] = 0.0
    rows[1, 0] = rows[1, experts - 1] = 0.5
    keep_experts_of(model, kept, mixing={layer: rows})
    _write(model, tmp_path / "out")
    before = load_file(tmp_path / "m" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    checked = 0
    for name, tensor in after.items():
        if f"layers.{layer}." not in name or ".experts." not in name:
            continue
        old = _expert_slices(before, name, experts)
        new = _expert_slices(after, name, len(kept[layer]))
        for place, expert in enumerate(kept[layer]):
            if place != 1:
                assert torch.equal(new[place], old[expert]), name
        assert torch.equal(new[1], (old[0] + old[experts - 1]) / 2)
        assert new[1].dtype == tensor.dtype
        checked += 1
    assert checked == (4 if class_name == "GptOssForCausalLM" else 3 * len(kept[layer]))


def _expert_slices(tensors, name, count):
    head, _, tail = name.partition(".experts.")
    number, dot, rest = tail.partition(".")
    if not number.isdigit():
        return list(tensors[name])
    return [tensors[f"{head}.experts.{expert}{dot}{rest}"] for expert in range(count)]


def test_the_order_of_the_choice_does_not_matter():
    config = _config("MixtralForCausalLM")
    generator = torch.Generator().manual_seed(5)
    rows = {layer: torch.randn(3, 6, generator=generator) for layer in range(3)}
    one, other = moe_module("MixtralForCausalLM"), moe_module("MixtralForCausalLM")
    keep_experts(one, config, dict.fromkeys(range(3), (1, 2, 5)), mixing=rows)
    turned = {layer: tensor[[2, 0, 1]] for layer, tensor in rows.items()}
    keep_experts(other, config, dict.fromkeys(range(3), (5, 1, 2)), mixing=turned)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixing_sums_in_float32_and_rounds_once(dtype):
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(5, 7, 3, generator=generator).to(dtype)
    rows = torch.randn(4, 5, generator=generator)
    exact = torch.einsum("je,eab->jab", rows.double(), tensor.double())
    found = mixed(tensor, rows)
    assert found.dtype == dtype and found.shape == (4, 7, 3)
    step = 0.51 * torch.finfo(dtype).eps * exact.abs() + 2e-6  # one rounding, and those of the sum
    assert ((found.double() - exact).abs() <= step).all()
    assert torch.equal(mixed(tensor, torch.eye(5)[[3, 1]]), tensor[[3, 1]])
    assert torch.equal(mixed(tensor, torch.zeros(1, 5)), torch.zeros(1, 7, 3, dtype=dtype))
    # A single coefficient makes a copy only if it is 1.
    assert torch.equal(mixed(tensor, -0.5 * torch.eye(5)[[2]]), -0.5 * tensor[[2]])


@pytest.mark.parametrize("class_name", [name for name in CLASSES if name != "PhimoeForCausalLM"])
def test_fewer_active_experts_are_those_of_a_stock_model_of_that_config(class_name, tmp_path):
    model = _open(make_moe(tmp_path / "m", class_name))
    model.config = use_fewer_experts(model.module, model.config, 1)
    assert [mixture.active for mixture in mixtures(model.module)] == [1] * len(mixtures(model.module))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", num_experts_per_tok=1).eval()
    assert torch.equal(_logits(stock), _logits(model.module))
    _write(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.num_experts_per_tok == 1 and torch.equal(_logits(again), _logits(model.module))


@pytest.mark.parametrize("class_name", CLASSES)
def test_loss_terms_of_the_router_know_the_new_counts(class_name):
    module, config = moe_module(class_name), _config(class_name)
    changed = keep_experts(module, config, _kept(config))
    routing = moe_shape(changed).routing
    for owner in module.modules():
        for key, wanted in (("num_experts", routing.experts), ("top_k", 2), ("num_experts_per_tok", 2)):
            assert vars(owner).get(key, wanted) == wanted
    ids = torch.arange(24)[None]
    with torch.no_grad():
        found = module(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    assert torch.isfinite(found.loss)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_stage_that_was_finished_is_taken_up_again(class_name, tmp_path):
    model = _open(make_moe(tmp_path / "m", class_name))
    keep_experts_of(model, _kept(model.config))
    _write(model, tmp_path / "stage")
    other = _open(tmp_path / "m")
    resume(other, tmp_path / "stage")
    assert moe_shape(other.config) == moe_shape(model.config) and not other.surgery
    assert other.size() == model.size()
    assert torch.equal(_logits(other.module), _logits(model.module))


def test_only_other_counts_change_a_config():
    config = _config("Qwen3MoeForCausalLM")
    assert with_counts_of(config, config) == config
    fewer = fewer_experts(config, _kept(config))
    assert with_counts_of(config, fewer) == fewer
    dense = {"_class_name": "LlamaForCausalLM"}
    assert with_counts_of(dense, {"num_experts": 3}) == dense


def _refused(class_name, kept, message, *, active=None, **changes):
    with pytest.raises(PlanError, match=message):
        checked_experts(_config(class_name, **changes), kept, active)


def test_choices_that_no_stock_class_builds_are_refused():
    three = dict.fromkeys(range(3), (0, 1, 2))
    mixtral = "MixtralForCausalLM"
    assert checked_experts(_config(mixtral), dict.fromkeys(range(3), [4, 0])) == dict.fromkeys(
        range(3), (0, 4)
    )
    _refused(mixtral, {**three, 1: (0, 1)}, "layer 1 keeps 2 experts and layer 0 keeps 3; all must")
    _refused(mixtral, {0: (0, 1)}, "nothing is said of the experts of layer 1 and 1 more")
    _refused(mixtral, {**three, 3: (0, 1, 2)}, "layer 3 has no experts")
    _refused("Qwen2MoeForCausalLM", three, "layer 1 has no experts")
    _refused(mixtral, {**three, 2: (0, 1, 6)}, "beyond the experts, which are 0 to 5")
    _refused(mixtral, {**three, 2: (0, 1, -1)}, "beyond the experts")
    _refused(mixtral, {**three, 2: (0, 1, 1)}, "an expert is named twice")
    _refused(mixtral, {**three, 2: ()}, "layer 2 keeps no expert")
    _refused(mixtral, dict.fromkeys(range(3), (4,)), "2 experts per token, of 1 experts")
    _refused(mixtral, three, "3 experts per token; the model was trained with 2", active=3)
    _refused(mixtral, three, "0 experts per token", active=0)
    _refused("PhimoeForCausalLM", three, "this kind of router picks 2", active=1)
    _refused("PhimoeForCausalLM", dict.fromkeys(range(3), (4,)), "2 experts per token, of 1 experts")


def test_groups_of_experts_keep_equally_many():
    v3 = "DeepseekV3ForCausalLM"
    _refused(v3, dict.fromkeys((1, 2), (0, 1, 2, 4)), r"layer 1 keeps \[3, 1\] experts of its 2 groups")
    _refused(v3, dict.fromkeys((1, 2), (0, 1, 4)), "3 of 8 experts to stay, but the router has 2 groups")
    _refused(v3, dict.fromkeys((1, 2), (0, 4)), "1 expert in each of 2 groups; the router needs 2")
    v2 = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}
    _refused("DeepseekV2ForCausalLM", dict.fromkeys((1, 2), (0, 2, 4)), "of the 1 in the 1 groups", **v2)
    assert checked_experts(_config("DeepseekV2ForCausalLM"), dict.fromkeys((1, 2), (0, 1, 2)))


def test_coefficients_that_do_not_fit_are_refused():
    module, config = moe_module("DeepseekV2ForCausalLM"), _config("DeepseekV2ForCausalLM")
    kept = dict.fromkeys((1, 2), (0, 3))
    for mixing, message in (
        ({0: torch.eye(6)[:2]}, "layer 0, which has no experts"),
        ({1: torch.eye(6)}, r"coefficients \[6, 6\]; \[2, 6\] are needed"),
        ({2: torch.full((2, 6), float("nan"))}, "not finite"),
    ):
        with pytest.raises(PlanError, match=message):
            keep_experts(module, config, kept, mixing=mixing)
    assert {mixture.count for mixture in mixtures(module)} == {6}
    assert expected_shapes("DeepseekV2ForCausalLM", config)["model.layers.1.mlp.gate.weight"] == (6, 32)


def test_a_model_without_experts_is_refused():
    with pytest.raises(PlanError, match="LlamaForCausalLM is not a mixture of experts"):
        checked_experts({"_class_name": "LlamaForCausalLM"}, {0: (0,)})
    with pytest.raises(PlanError, match="none of the 3 layers of this Qwen2MoeForCausalLM has experts"):
        checked_experts(_config("Qwen2MoeForCausalLM", mlp_only_layers=[0, 1, 2]), {0: (0,)})
