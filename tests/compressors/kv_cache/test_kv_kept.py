"""A training of factors that is broken off between its files goes on with its state, to equal bytes."""

from __future__ import annotations

import shutil

import pytest
from compress.compressors.kv_cache import training
from compress.compressors.kv_cache.training import LayerTraining, train
from compress.progress import SilentProgress
from safetensors import safe_open

from .test_kv_training import prepared, same

STATE = "training.safetensors"
STEPS = 8  # of 32 tokens: three replays of 120, in batches of 80 and 40


class Noting(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


class Counted:
    """Steps of all attentions, and an interruption before one of them."""

    def __init__(self, monkeypatch):
        self.steps, self.until, real = 0, None, LayerTraining._step

        def counting(this, x):
            if self.steps == self.until:
                raise KeyboardInterrupt
            self.steps += 1
            real(this, x)

        monkeypatch.setattr(LayerTraining, "_step", counting)
        monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(training, "_SAVED_AT_MOST", 1e9)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.fixture
def trained(opened, calibration):
    """Return `trained(folder, **keys)` -> what came out and the notes; always of the same model."""
    model = opened()
    recorded = calibration(model)

    def run(folder, **keys):
        found, scheme, start = prepared(model, steps=STEPS, **keys)
        folder.mkdir(exist_ok=True)
        progress = Noting()
        return train(model, start, scheme, found, recorded, folder, progress), progress.notes

    return run


def broken_off(trained, counted, folder, until, **keys):
    counted.steps, counted.until = 0, until
    with pytest.raises(KeyboardInterrupt):
        trained(folder, **keys)
    counted.steps, counted.until = 0, None


@pytest.mark.parametrize("budget", [0, 2**30], ids=["replayed", "inputs-kept"])
@pytest.mark.parametrize("keys", [{}, {"bits": 4, "window": 8, "key_group": 8}], ids=["exact", "rounded"])
def test_a_part_goes_on_with_its_state_and_ends_at_the_same_bytes(
    trained, counted, tmp_path, monkeypatch, budget, keys
):
    monkeypatch.setattr(training, "INPUT_BUDGET_BYTES", budget)
    whole, notes = trained(tmp_path / "whole", **keys)
    assert (notes, counted.steps) == ([], 2 * STEPS)
    for until in (5, 9, 15):  # of 16: in the first replay, a later one, after one attention's last step
        folder = tmp_path / f"killed-{until}"
        broken_off(trained, counted, folder, until, **keys)
        assert [path.name for path in folder.iterdir()] == [STATE]
        again, notes = trained(folder, **keys)
        finished = STEPS - counted.steps // 2
        assert 0 < finished <= until // 2
        assert notes == [f"the training of the factors goes on after step {finished} of {STEPS}"]
        assert again.kept == 0
        assert all(same(whole.factors[name], again.factors[name]) for name in whole.factors)
        assert not (folder / STATE).exists()


def test_a_part_that_was_half_kept_goes_on_with_the_rest(trained, counted, tmp_path):
    whole, _ = trained(tmp_path / "whole")
    folder = tmp_path / "killed"
    broken_off(trained, counted, folder, 12)
    first = "model.layers.0.self_attn.safetensors"
    shutil.copy(tmp_path / "whole" / first, folder / first)
    again, notes = trained(folder)
    assert again.kept == 1
    assert "goes on after step" in notes[0]
    assert 0 < counted.steps < STEPS
    assert all(same(whole.factors[name], again.factors[name]) for name in whole.factors)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_state_that_is_damaged_or_foreign_is_not_used(trained, counted, tmp_path, damage):
    whole, _ = trained(tmp_path / "whole")
    folder = tmp_path / "killed"
    broken_off(trained, counted, folder, 12, lr=0.02 if damage == "foreign" else 0.01)
    content = (folder / STATE).read_bytes()
    if damage == "flipped":
        content = content[:-1] + bytes([content[-1] ^ 1])
    elif damage != "foreign":
        content = content[: len(content) // 2] if damage == "cut" else b""
    (folder / STATE).write_bytes(content)
    again, notes = trained(folder)
    assert len(notes) == 1
    assert "damaged or of another training" in notes[0]
    assert counted.steps == 2 * STEPS
    assert all(same(whole.factors[name], again.factors[name]) for name in whole.factors)


def test_a_state_takes_the_disk_that_is_planned(trained, counted, opened, tmp_path):
    broken_off(trained, counted, tmp_path / "killed", 12)
    found, scheme, _ = prepared(opened(), steps=STEPS)
    planned = sum(training.kept_bytes(layer, found) for layer in scheme.layers.values())
    waiting = 4 * 48 * found.batch_tokens * len(scheme.layers)  # as many tokens as a step takes, or fewer
    with safe_open(tmp_path / "killed" / STATE, framework="pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)
    assert planned - waiting <= stored <= planned
