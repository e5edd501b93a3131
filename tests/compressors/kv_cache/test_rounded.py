"""Errors of factors with rounded states: those that a real cache has, in parts, and of every set."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.kv_cache import rounded
from compress.compressors.kv_cache.cskv import Cskv
from compress.runtime.kv.attach import factors_of
from compress.runtime.kv.rounding import PackedStates

from .conftest import settings

NAMES = [f"model.layers.{index}.self_attn" for index in range(2)]


def inputs_of(model, recorded, name):
    """Return what an attention reads, [sequences, tokens, h], over the calibration."""
    rows = []
    layer = model.module.get_submodule(f"{name}.k_proj")
    handle = layer.register_forward_pre_hook(lambda _, xs: rows.append(xs[0]))
    with torch.no_grad():
        for call in recorded.calls():
            model.module(**call)
    handle.remove()
    return torch.cat(rows)


@torch.no_grad()
def cached_error(model, recorded, name, side, group):
    """Return the error of keys or values that are packed as a cache packs them, sequence by sequence."""
    attention, scheme = model.module.get_submodule(name), model.kv_cache
    factors = factors_of(model.module)[name]
    a, b = (getattr(factors, f"{side}_{end}").weight.double() for end in "ab")
    x = inputs_of(model, recorded, name)[:, : 20 // group * group].double()
    c = (x @ a.T).float()
    axis, size = ("tokens", group) if side == "k" else ("channels", scheme.layers[name].value_group)
    read = PackedStates.of(c, scheme.bits, axis, size).read(c.shape[1], torch.float32)
    exact = x @ attention.get_submodule(f"{side}_proj").weight.double().T
    return float((exact - read.double() @ b.T).square().mean())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("training", [{}, {"init": "asvd", "steps": 5, "lr": 0.01, "batch_tokens": 42}])
def test_they_are_those_of_packed_numbers(opened, calibration, run, bits, training):
    model = opened()
    recorded = calibration(model)
    details = run(model, recorded=recorded, removed=0.5, bits=bits, key_group=6, **training)
    for row in details["layers"]:
        for side in "kv":
            expected = cached_error(model, recorded, row["name"], side, 6)
            assert row[f"mse_{side}_rounded"] == pytest.approx(expected, rel=1e-3)
        assert ("mse_k_rounded_initial" in row) == bool(training)


def test_of_a_training_both_ends_are_told(opened, calibration, run, tmp_path):
    keys = {"removed": 0.5, "bits": 2, "key_group": 4, "init": "asvd"}
    model = opened()
    first = run(opened(name="first"), folder=tmp_path / "first", **keys)
    details = run(model, steps=80, lr=0.01, batch_tokens=40, **keys)
    for row, untrained in zip(details["layers"], first["layers"], strict=True):
        for side in "kv":
            assert row[f"mse_{side}_rounded_initial"] == untrained[f"mse_{side}_rounded"]
            assert row[f"mse_{side}_rounded"] < row[f"mse_{side}_rounded_initial"]


def test_parts_change_nothing(opened, run, monkeypatch, tmp_path):
    keys = {"removed": 0.5, "bits": 4, "key_group": 4}
    whole = run(opened(name="whole"), folder=tmp_path / "whole", **keys)["layers"]
    monkeypatch.setattr(rounded, "ROUNDED_BUDGET_BYTES", 1)
    monkeypatch.setattr(rounded, "ROWS_AT_ONCE", 9)  # two groups at a time
    assert [row["name"] for row in whole] == NAMES
    for row, other in zip(whole, run(opened(), **keys)["layers"], strict=True):
        for key in ("mse_k_rounded", "mse_v_rounded"):
            assert other[key] == pytest.approx(row[key], rel=1e-6)


def test_sequences_shorter_than_a_group_say_nothing(opened, run):
    rows = run(opened(), removed=0.5, bits=4, key_group=32)["layers"]
    assert [(row["mse_k_rounded"], row["mse_v_rounded"]) for row in rows] == [(None, None)] * 2


def test_without_rounding_nothing_is_measured_or_planned(opened, run, monkeypatch):
    model = opened()
    plain, packed = (Cskv().plan(model.spec, settings(removed=0.5, bits=bits)) for bits in (None, 4))
    assert plain.peak_memory_bytes < packed.peak_memory_bytes
    monkeypatch.setattr(rounded, "fake_quantize", None)
    assert "mse_k_rounded" not in run(model, removed=0.5)["layers"][0]
