"""Second moments of what attentions read: right, in portions, and of finite inputs alone."""

from __future__ import annotations

import pytest
import torch
from compress.compressors.kv_cache import energies
from compress.compressors.kv_cache.energies import Energies, measure, portions
from compress.errors import StageError
from compress.progress import SilentProgress


def all_energies(model, recorded):
    names = [name for name, _ in model.family.attentions(model.module)]
    sources = {name: f"{name}.k_proj" for name in names}
    return Energies(model, recorded, SilentProgress(), sources, dict.fromkeys(names, 48))


def seen(model, recorded, name):
    """Return all inputs of a linear, [tokens, h] float64, kept by a hook."""
    rows = []
    handle = model.module.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: rows.append(arguments[0].double().flatten(0, 1))
    )
    with torch.no_grad():
        for call in recorded.calls():
            model.module(**call)
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_those_of_the_inputs(opened, calibration, dtype, monkeypatch):
    monkeypatch.setattr(energies, "ROWS_AT_ONCE", 7)
    model = opened(dtype=dtype)
    recorded = calibration(model)
    for name, energy in all_energies(model, recorded).each():
        for linear in ("k_proj", "v_proj"):  # both read the same
            x = seen(model, recorded, f"{name}.{linear}")
            assert energy.tokens == len(x) == 120
            torch.testing.assert_close(energy.gram, x.T @ x / 120)
            torch.testing.assert_close(energy.magnitude, x.abs().mean(dim=0))


def test_portions_fit_the_budget():
    assert portions({"a": 4, "b": 4, "c": 4, "d": 9, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert portions({"a": 4, "b": 4}, 8) == [["a", "b"]]
    assert portions({}, 8) == []


@pytest.mark.parametrize(("budget", "replays"), [(2**30, 1), (8 * 48**2, 4)])
def test_what_fits_is_measured_once_and_no_more_than_fits_is_held(
    opened, calibration, monkeypatch, budget, replays
):
    monkeypatch.setattr(energies, "ENERGY_BUDGET_BYTES", budget)
    model = opened()
    found = all_energies(model, calibration(model))
    count, held = 0, []

    def counting(*arguments):
        nonlocal count
        count += 1
        held.append(len(found._kept))
        return measure(*arguments)

    monkeypatch.setattr(energies, "measure", counting)
    first = [(name, energy.gram.clone()) for name, energy in found.each()]
    second = [(name, energy.gram.clone()) for name, energy in found.each()]
    assert count == replays
    assert held == [0] * replays  # what was there is gone before more comes
    assert [name for name, _ in first] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for (name, one), (other_name, other) in zip(first, second, strict=True):
        assert name == other_name
        assert torch.equal(one, other)


def test_inputs_that_are_not_finite_are_refused(opened, calibration):
    model = opened()
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight[3, 4] = torch.inf
    with pytest.raises(StageError, match=r"model.layers.1.self_attn: its calibration inputs are not finite"):
        list(all_energies(model, calibration(model)).each())
