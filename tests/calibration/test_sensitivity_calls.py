"""The calls that are measured on: the recorded ones, whole trajectories, both halves."""

from __future__ import annotations

import pickle

import pytest
import torch
from compress.calibration.diffusion import record
from compress.calibration.sensitivity_calls import RecordedCalls, evenly
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef

QUIET = SilentProgress()


@pytest.fixture
def calibration(tiny_dit):
    model = open_model(ModelRef(id=str(tiny_dit)), progress=QUIET)
    settings = CalibrationSettings(samples=5, steps=6, guidance_scale=3.0, batch_size=2)
    return record(model, settings, seed=1, cache=None, progress=QUIET)


def test_timesteps_are_at_even_distances():
    assert evenly(20, 4) == [2, 7, 12, 17]
    assert evenly(6, 3) == [1, 3, 5]
    assert evenly(3, 3) == evenly(3, 9) == [0, 1, 2]
    assert evenly(5, 1) == [2]


def test_calls_are_the_recorded_ones_of_the_first_samples(calibration):
    everything = list(calibration.calls())  # three files of six steps
    chosen = list(RecordedCalls(calibration, steps=2, samples=3))
    assert len(chosen) == 4
    for call, index in zip(chosen[:2], (1, 4), strict=True):
        assert all(torch.equal(call[name], everything[index][name]) for name in everything[index])
    for call, index in zip(chosen[2:], (7, 10), strict=True):  # one of the two samples, in both halves
        assert all(torch.equal(call[name], everything[index][name][[0, 2]]) for name in everything[index])
    assert len(list(RecordedCalls(calibration, steps=99))) == len(everything)


def test_others_than_the_first_samples_are_had_by_starting_later(calibration):
    everything = list(calibration.calls())  # samples 0 and 1, 2 and 3, 4; six steps each
    chosen = list(RecordedCalls(calibration, steps=1, samples=3, start=1))
    assert [len(call["hidden_states"]) for call in chosen] == [2, 4]  # sample 1, then 2 and 3, in both halves
    assert all(torch.equal(chosen[0][name], everything[3][name][[1, 3]]) for name in everything[3])
    assert all(torch.equal(chosen[1][name], everything[9][name]) for name in everything[9])
    (last,) = RecordedCalls(calibration, steps=1, start=4)
    assert all(torch.equal(last[name], everything[15][name]) for name in everything[15])
    keys = {RecordedCalls(calibration, 1, 2, start).key for start in range(3)}
    assert len(keys) == 3
    with pytest.raises(ValueError, match="start -1"):
        RecordedCalls(calibration, 1, start=-1)


def test_the_key_follows_the_recording_and_the_choice(calibration):
    keys = {RecordedCalls(calibration, *choice).key for choice in ((2,), (3,), (2, 3), (2, 4))}
    assert len(keys) == 4
    assert RecordedCalls(calibration, 2).key == RecordedCalls(calibration, 2).key
    assert RecordedCalls(calibration, 2).seed == 1
    for wrong in ((0,), (1, 0)):
        with pytest.raises(ValueError, match="not at least 1"):
            RecordedCalls(calibration, *wrong)


def test_another_process_can_read_them(calibration):
    calls = RecordedCalls(calibration, 2)
    assert calls.calibration.keeper is not None
    again = pickle.loads(pickle.dumps(calls))
    assert again.key == calls.key
    for one, other in zip(calls, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
