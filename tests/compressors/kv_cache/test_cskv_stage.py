"""The stage on tiny models of every kind: what it changes, what it reports, and that the plan was right."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.text import TextCalibration
from compress.compressors.base import Workspace
from compress.compressors.kv_cache import cskv, energies
from compress.compressors.kv_cache.cskv import Cskv
from compress.compressors.registry import get
from compress.errors import PlanError, StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.recipes.stages import STAGES
from compress.runtime.kv import sizes
from compress.runtime.kv.attach import factors_of, kv_scheme_of, new_cache
from compress.runtime.linear import QuantizedLinear
from compress.runtime.tensor_hashes import tensors_sha256
from transformers import DynamicCache

from ...tiny_moe import make_moe
from .conftest import settings

ATTENTIONS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def inputs_of(model, recorded, name):
    """Return what an attention reads over the calibration, [tokens, h] float64."""
    rows = []
    layer = model.module.get_submodule(f"{name}.k_proj")
    handle = layer.register_forward_pre_hook(lambda _, xs: rows.append(xs[0].double().flatten(0, 1)))
    with torch.no_grad():
        for call in recorded.calls():
            model.module(**call)
    handle.remove()
    return torch.cat(rows)


def factors_state(module):
    return {name: value for name, value in module.state_dict().items() if ".cskv." in name}


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
    ],
    ids=["llama", "llama-bias", "mistral", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("init", ["whiten", "asvd"])
def test_factors_stand_below_attentions_and_lose_what_is_told(
    opened, calibration, run, class_name, config, init
):
    model = opened(class_name, **config)
    recorded = calibration(model)
    plan = Cskv().plan(model.spec, settings(removed=0.5, init=init))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    details = run(model, recorded=recorded, removed=0.5, init=init)
    after = model.module.state_dict()
    assert tensors_sha256({name: after[name] for name in before}) == tensors_sha256(before)
    assert {name: tuple(value.shape) for name, value in after.items() if name not in model.shared} == {
        name: tensor.shape for name, tensor in plan.spec.tensors.items() if name not in model.shared
    }
    assert (model.size(), model.kv_cache) == (plan.after, plan.spec.kv_cache)
    assert kv_scheme_of(model.module) == model.kv_cache
    assert list(factors_of(model.module)) == ATTENTIONS
    for row in details["layers"]:
        x = inputs_of(model, recorded, row["name"])
        attention = model.module.get_submodule(row["name"])
        for side in "kv":
            linear = attention.get_submodule(f"{side}_proj")
            exact = x @ linear.weight.double().T  # a bias is added after the second factor
            a = attention.get_submodule(f"cskv.{side}_a").weight.double()
            b = attention.get_submodule(f"cskv.{side}_b").weight.double()
            error = (exact - x @ a.T @ b.T).square().mean()
            assert row[f"mse_{side}"] == pytest.approx(float(error), rel=1e-4)
            rest = torch.linalg.svdvals(exact)[row[f"rank_{side}"] :].square().sum() / exact.square().sum()
            assert row[f"discarded_{side}"] == pytest.approx(float(rest), rel=1e-6)
            if init == "whiten":
                assert float(error / exact.square().mean()) == pytest.approx(float(rest), rel=1e-4)


def test_the_report_counts_everything(opened, run):
    model = opened()
    details = run(model, removed={"k": 0.75, "v": 0.5}, bits=4, window=5)
    scheme = model.kv_cache
    assert (details["init"], details["window"], details["mode"]) == ("whiten", 5, "sliding")
    assert (details["bits"], details["key_group"]) == (4, 32)
    assert details["removed"] == {"k": 0.75, "v": 0.5}
    assert details["asked"] == {"removed": {"k": 0.75, "v": 0.5}, "ranks": "heads", "allocate": "uniform"}
    # 2 layers of 2 heads with 12 channels, float32: 6 + 12 channels stay.
    stored = 2 * (6 * 5 / 8 + 6 + 2 * 4)
    assert details["bytes_per_token"] == {
        "before": 2 * 2 * 24 * 4,
        "after": stored,
        "metadata": 2 * (0.75 + 8),
    }
    assert details["window_bytes"] == 5 * 2 * 2 * 24 * 4
    parameters = 2 * (48 + 24) * 18
    assert (details["factor_parameters"], details["factor_bytes"]) == (parameters, 4 * parameters)
    assert details["factor_bytes"] == sum(
        value.numel() * value.element_size() for value in factors_state(model.module).values()
    )
    assert details["break_even_tokens"] == -(-4 * parameters // (384 - stored))
    # A context of 32 tokens is one group of keys; 5 of its tokens are exact.
    whole = 32 * (stored + 4) + details["window_bytes"]
    assert details["at_context"] == {
        "tokens": 32,
        "before": 32 * 384,
        "after": whole,
        "with_factors": whole + 4 * parameters,
    }
    assert details["break_even_tokens_one"] == sizes.break_even_tokens_one(scheme, 4)
    assert details["rebuild_flops"] == {"tokens": 32, "per_token": 2 * 2 * 32 * 18 * 24}
    assert details["rebuild_flops"]["per_token"] == sizes.rebuild_flops(scheme, 32)
    assert details["calibration_tokens"] == 120
    assert (details["skipped"], details["training"], details["allocation"]) == ([], None, None)
    assert [row["mse_k_trained"] for row in details["layers"]] == [None, None]


def test_singular_values_are_those_of_the_cache(opened, calibration, run):
    model = opened(num_attention_heads=8, num_key_value_heads=8, head_dim=10)
    recorded = calibration(model)
    details = run(model, recorded=recorded, removed=0.5)
    for row in details["singular_values"]:
        x = inputs_of(model, recorded, row["name"])
        assert row["of"] == 80
        for side in "kv":
            weight = model.module.get_submodule(f"{row['name']}.{side}_proj").weight
            values = torch.linalg.svdvals(x @ weight.double().T)
            assert len(row[side]) == 64
            places = [round(index * 79 / 63) for index in range(64)]
            assert row[side] == pytest.approx((values[places] / values[0]).tolist(), rel=1e-3, abs=2e-6)
            assert (row[side][0], places[-1]) == (1.0, 79)


def test_what_is_left_alone_is_told(opened, run):
    model = opened(
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        num_hidden_layers=3,
    )
    details = run(model, removed=0.5)
    assert [row["name"] for row in details["layers"]] == ATTENTIONS[:1]
    assert [row["name"] for row in details["skipped"]] == [
        "model.layers.1.self_attn",
        "model.layers.2.self_attn",
    ]
    assert "last 8 tokens" in details["skipped"][0]["why"]
    assert len(factors_state(model.module)) == 4
    # The whole cache is that of real ones, plain layers and all.
    ids = torch.arange(32)[None]
    stock, mine = DynamicCache(config=model.module.config), new_cache(model.module)
    with torch.no_grad():
        for cache in (stock, mine):
            model.module(input_ids=ids, past_key_values=cache, use_cache=True)
    held = [tensor for layer in stock.layers for tensor in (layer.keys, layer.values)]
    told = details["at_context"]
    assert told["before"] == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert (told["tokens"], told["after"]) == (32, mine.stored_bytes())
    assert told["with_factors"] == mine.stored_bytes() + details["factor_bytes"]


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"])
def test_mixtures_of_experts(class_name, tmp_path, calibration, run):
    folder = make_moe(tmp_path / "moe", class_name)
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    plan = Cskv().plan(model.spec, settings(removed=0.5))
    details = run(model, removed=0.5)
    assert len(details["layers"]) == len(factors_of(model.module)) == model.config["num_hidden_layers"]
    assert model.size() == plan.after
    assert all(0 < row["discarded_v"] < 1 for row in details["layers"])


@pytest.mark.parametrize("method", ["rtn", "vidit_q"])
def test_quantized_projections_are_factored_as_they_compute(opened, calibration, run, tmp_path, method):
    model = opened()
    recorded = calibration(model)
    keys = {"weight_bits": 4, "activation_bits": 16}
    keys |= {"rotation": "block", "act_exponent": 0.5} if method == "vidit_q" else {}
    workspace = Workspace(tmp_path / method, tmp_path / "shared")
    quantizer = STAGES[method].model_validate(keys)
    get(method).apply(model, quantizer, recorded, workspace, SilentProgress())
    layer = model.module.get_submodule(f"{ATTENTIONS[0]}.k_proj")
    assert isinstance(layer, QuantizedLinear)
    assert (layer.scheme.rotation is not None) == (method == "vidit_q")
    run(model, recorded=recorded, removed=0, bits=4)
    factors = factors_of(model.module)[ATTENTIONS[0]]
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(factors.k_b(factors.k_a(x)), layer(x), rtol=1e-4, atol=1e-4)
    assert factors.k_a.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_are_of_the_models_type(opened, run, dtype):
    model = opened(dtype=dtype)
    details = run(model, removed=0.5)
    state = factors_state(model.module)
    assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}
    assert details["factor_bytes"] == 2 * details["factor_parameters"]
    assert all(torch.isfinite(value).all() and value.any() for value in state.values())


def test_two_runs_give_the_same_bytes_and_portions_change_nothing(
    opened, calibration, run, monkeypatch, tmp_path
):
    def hashed(folder, seed=3, **keys):
        model = opened()
        recorded = calibration(model)
        recorded = TextCalibration(seed, "tokens", recorded.file, recorded.samples, recorded.batch_size)
        run(model, folder=tmp_path / folder, recorded=recorded, removed=0.5, init="random", lr=0.01, **keys)
        return tensors_sha256(factors_state(model.module))

    keys = {"steps": 4, "batch_tokens": 40}
    first = hashed("first", **keys)
    assert hashed("second", **keys) == first
    monkeypatch.setattr(energies, "ENERGY_BUDGET_BYTES", 1)
    assert hashed("third", **keys) == first
    assert hashed("other seed", seed=4, **keys) != first
    assert hashed("other steps", steps=5, batch_tokens=40) != first


def test_training_is_told_and_lowers_the_error(opened, run, tmp_path):
    details = run(opened(), removed=0.5, init="asvd", steps=60, lr=0.01, batch_tokens=40)
    best = run(opened(name="best"), folder=tmp_path / "best", removed=0.5)
    told = details["training"]
    assert (told["steps"], told["lr"], told["batch_tokens"], told["qat"]) == (60, 0.01, 40, False)
    assert told["kept"] == 0
    for row, closed in zip(details["layers"], best["layers"], strict=True):
        for side in "kv":
            assert closed[f"mse_{side}"] * 0.99 < row[f"mse_{side}_trained"] < row[f"mse_{side}"]


def test_ranks_by_layer_lose_no_more_than_equal_ones(opened, run, tmp_path):
    keys = {"removed": 0.5, "ranks": "channels"}
    equal = run(opened(name="equal"), folder=tmp_path / "equal", **keys)
    dealt = run(opened(), allocate="energy", **keys)

    def lost(details):
        return sum(row["discarded_k"] + row["discarded_v"] for row in details["layers"])

    def total(details):
        return sum(row["rank_k"] + row["rank_v"] for row in details["layers"])

    assert total(dealt) == total(equal)
    assert lost(dealt) < lost(equal)
    told = dealt["allocation"]
    assert told["lost_shares"] == pytest.approx(lost(dealt))
    assert told["lost_shares_of_equal_ranks"] == pytest.approx(lost(equal))
    assert told["lower_bound"] == pytest.approx(told["lost_shares"])
    assert dealt["factor_parameters"] == equal["factor_parameters"]


def test_a_cache_of_the_result_takes_what_is_told(opened, run):
    model = opened()
    details = run(model, removed={"k": 0.75, "v": 0.5}, window=4)
    cache = new_cache(model.module)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        model.module(input_ids=ids, past_key_values=cache, use_cache=True)
    positions = 20 * sizes.POSITION_BYTES
    assert cache.stored_bytes() == sizes.cache_bytes(model.kv_cache, 20, 1, 4)
    assert (
        cache.stored_bytes() == 20 * details["bytes_per_token"]["after"] + details["window_bytes"] + positions
    )


def test_a_second_stage_is_refused_and_a_failed_one_leaves_the_model(opened, calibration, run, monkeypatch):
    model = opened()

    def broken(*_):
        raise StageError("no")

    with monkeypatch.context() as patched:
        patched.setattr(cskv, "train", broken)
        with pytest.raises(StageError, match="no"):
            run(model, removed=0.5, init="asvd", steps=3)
    assert model.kv_cache is None
    assert not factors_state(model.module)
    run(model, removed=0.5)
    with pytest.raises(PlanError, match="compressed already"):
        run(model, removed=0.5)
