"""Sizes from the tensors themselves."""

import copy
import json

import pytest
import torch
from compress.evaluation.evaluator import Evaluation
from compress.evaluation.size import linear_bytes, linear_inventory, size_metrics
from compress.evaluation.speed import forward_latency, interleaved_minima, measure_speed, recorded_speed
from compress.progress import SilentProgress
from compress.recipes.schema import SpeedSettings
from compress.runtime.cpu import processor
from compress.runtime.linear import QuantizedLinear
from compress.runtime.manifest import ActivationScheme, QuantizedModule


def _quantize(model, bits):
    """Put an empty quantized layer in place of the first feed-forward linear."""
    site = next(site for site in model.linears() if site.role == "ff.in")
    scheme = QuantizedModule(
        shape=site.shape,
        bits=bits,
        symmetric=True,
        activation=ActivationScheme(bits=8),
        bias=True,
        method="rtn",
    )
    model.module.set_submodule(site.name, QuantizedLinear(scheme, torch.float32))
    model.quantization[site.name] = scheme
    return site


def test_an_untouched_model(open_tiny):
    model = open_tiny()
    metrics = size_metrics(model)
    assert metrics["size_ratio"] == 1
    assert "linear_bytes_ratio" not in metrics
    stored = sum(t.numel() * 4 for n, t in model.module.state_dict().items() if n not in model.spec.shared)
    assert metrics["bytes"] == stored


def test_a_quantized_layer_counts_its_scales_and_its_bias(open_tiny):
    model = open_tiny()
    before = size_metrics(model)["bytes"]
    site = _quantize(model, bits=4)
    rows, columns = site.shape
    packed = rows * columns // 2 + 4 * rows + 4 * rows  # nibbles, float32 scale, float32 bias
    metrics = size_metrics(model)
    assert before - metrics["bytes"] == 4 * (rows * columns + rows) - packed
    assert linear_bytes(model) == (packed, 2 * (rows * columns + rows))
    assert metrics["linear_bytes_ratio"] == pytest.approx(packed / (2 * (rows * columns + rows)))
    row = next(row for row in linear_inventory(model) if row["name"] == site.name)
    assert (row["weight_bits"], row["activation_bits"], row["bytes"]) == (4, 8, packed)
    assert row["bytes_original"] == 4 * (rows * columns + rows)


def test_the_exported_bytes_win(open_tiny):
    model = open_tiny()
    metrics = size_metrics(model, stored_bytes=model.spec.size().bytes // 2)
    assert metrics["size_ratio"] == pytest.approx(0.5)
    assert metrics["bits_per_weight"] == pytest.approx(8 * metrics["bytes"] / metrics["parameters"])


def test_the_inventory_adds_up(open_tiny):
    model = open_tiny()
    rows = linear_inventory(model)
    assert [row["name"] for row in rows] == [site.name for site in model.linears()]
    assert all(row["bytes"] == row["bytes_original"] for row in rows)
    assert {row["weight_bits"] for row in rows} == {32}
    assert sum(row["bytes"] for row in rows) < size_metrics(model)["bytes"]


def _embedders(model, block):
    return [
        site.name for site in model.linears() if site.name.startswith(f"transformer_blocks.{block}.norm1.emb")
    ]


def test_copies_name_what_they_are_copies_of(open_tiny):
    model = open_tiny()
    shared = {
        f"{copy}.{leaf}": f"{first}.{leaf}"
        for copy, first in zip(_embedders(model, 1), _embedders(model, 0), strict=True)
        for leaf in ("weight", "bias")
    }
    model.shared = shared
    rows = {row["name"]: row for row in linear_inventory(model)}
    copies = {name: row["copy_of"] for name, row in rows.items() if row["copy_of"]}
    assert copies == dict(zip(_embedders(model, 1), _embedders(model, 0), strict=True))
    assert all(rows[name]["bytes"] < rows[first]["bytes"] for name, first in copies.items())
    assert all(row["bytes"] > 0 for row in rows.values() if row["copy_of"] is None)


def test_latencies_are_taken_in_turn():
    order = []
    minima = interleaved_minima([lambda: order.append("a"), lambda: order.append("b")], rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert all(0 <= value < 1 for value in minima)


def test_the_clock_is_the_caller_s():
    ticks = iter(range(100))
    calls = [lambda: None, lambda: next(ticks)]
    assert interleaved_minima(calls, rounds=3, warm_up=1, clock=lambda: float(next(ticks))) == [1.0, 2.0]


def test_latency_of_a_model_against_itself(open_tiny):
    model = open_tiny()
    figures = forward_latency(model, model.module, rounds=2)
    assert figures["speedup"] == pytest.approx(figures["original_seconds"] / figures["seconds"])


def test_speed_is_reported_with_where_it_was_measured(open_tiny):
    model, settings = open_tiny(), SpeedSettings(batch_size=2, rounds=2)
    found = json.loads(json.dumps(measure_speed(model, model.module, settings, 0, SilentProgress())))
    assert found["speedup"] == pytest.approx(found["original_seconds"] / found["seconds"], rel=0.01)
    assert (found["batch_size"], found["rounds"], found["on"]) == (2, 2, processor()[0])
    evaluation = Evaluation()
    evaluation.add_speed(found)
    assert evaluation.metrics == {"speedup": found["speedup"]}
    assert recorded_speed(evaluation.details) == found
    for damage in ({"speedup": "fast"}, {"on": 3}, {"seconds": -1.0}, {"more": 1}):
        assert recorded_speed({"speed": {**found, **damage}}) is None
    assert recorded_speed({}) is None and recorded_speed(None) is None


def test_fewer_blocks_take_less_time(open_tiny):
    model = open_tiny()
    fewer = copy.deepcopy(model.module)
    fewer.transformer_blocks = fewer.transformer_blocks[:1]
    found = measure_speed(model, fewer, SpeedSettings(rounds=20), 0, SilentProgress())
    assert found["speedup"] > 1
