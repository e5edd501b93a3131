"""Calibration images: replayed, keyed by content, divided from what is measured on."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.classification import ClassificationCalibration, NoImages
from compress.calibration.recording import calls_of, record
from compress.errors import SourceError, StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef

from .image_folders import by_class


class _Told(SilentProgress):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def model(make_vit):
    return open_model(ModelRef(id=str(make_vit())), progress=SilentProgress())


@pytest.fixture
def folder(tmp_path):
    """Ten classes that the model does not name, in two parts."""
    names = [f"n{number:02d}" for number in range(10)]
    by_class(tmp_path / "images" / "train", names, 2)
    return by_class(tmp_path / "images" / "test", names, 1, seed=1).parent


def _record(model, folder, progress=None, seed=0, **values):
    settings = CalibrationSettings(images=folder, **{"samples": 7, "batch_size": 3, **values})
    return record(model, settings, seed=seed, cache=None, progress=progress or SilentProgress())


def test_calls_are_batches_of_the_chosen_images(model, folder):
    calibration = _record(model, folder)
    assert isinstance(calibration, ClassificationCalibration)
    calls = list(calibration.calls())
    assert [len(call["pixel_values"]) for call in calls] == [3, 3, 1] and calibration.count() == 3
    assert torch.equal(
        torch.cat([call["pixel_values"] for call in calls]), calibration.images.pixels(range(7))
    )
    assert calibration.samples == 7 and calibration.labels.shape == (7,)
    assert len(calibration.training()) == 20


def test_layers_are_observed_without_timesteps(model, folder):
    calibration, seen = _record(model, folder), []
    name = "vit.layers.1.mlp.fc1"
    calibration.observe(
        model, [name], lambda name, x, times: seen.append((name, x.shape, times)), SilentProgress()
    )
    assert [shape for _, shape, _ in seen] == [(3, 17, 64), (3, 17, 64), (1, 17, 64)]
    assert not any(times.any() for _, _, times in seen)
    with pytest.raises(StageError, match="vit.nothing: the model has no such layer"):
        calibration.observe(model, ["vit.nothing"], lambda *_: None, SilentProgress())


def test_some_calls_for_a_sensitivity(model, folder):
    calibration = _record(model, folder)
    calls = calls_of(calibration, steps=3, samples=2, start=5)
    found = [call["pixel_values"] for call in calls]
    assert [len(pixels) for pixels in found] == [1, 1]
    assert torch.equal(torch.cat(found), calibration.images.pixels([5, 6]))
    assert calls.key != calls_of(calibration, steps=3, samples=2).key and calls.seed == 0
    assert len(list(calls_of(calibration, steps=3, start=4))) == 3
    with pytest.raises(ValueError):
        calls_of(calibration, steps=3, samples=0)


def test_the_order_of_unknown_classes_is_told(model, folder):
    progress = _Told()
    _record(model, folder, progress)
    assert len(progress.notes) == 2 and "preprocessor_config.json" in progress.notes[0]
    assert "sorted order is taken" in progress.notes[1] and not progress.warnings


def test_broken_files_are_counted_in_one_warning(model, folder):
    for number in (1, 2):
        (folder / "train" / "n03" / f"00{number - 1}.png").write_bytes(b"no image")
    progress = _Told()
    calibration = _record(model, folder, progress, samples=18, seed=2)
    assert calibration.samples == 18 and not (calibration.labels == 3).any()
    (warning,) = progress.warnings
    assert "2 files cannot be read and are left out" in warning and "n03/00" in warning
    with pytest.raises(SourceError, match=r"n03.00\d\.png"):
        _record(model, folder, samples=18, seed=2, strict=True)


def test_the_key_is_of_all_that_the_images_depend_on(model, folder, make_vit):
    key = _record(model, folder).key
    assert _record(model, folder).key == key
    others = [
        _record(model, folder, seed=1).key,
        _record(model, folder, samples=8).key,
        _record(model, folder, batch_size=4).key,
        _record(open_model(ModelRef(id=str(make_vit(seed=1))), progress=SilentProgress()), folder).key,
    ]
    (folder / "train" / "n00" / "000.png").write_bytes((folder / "test" / "n00" / "000.png").read_bytes())
    others.append(_record(model, folder).key)
    assert len({key, *others}) == 6


def test_what_looks_at_no_images_needs_none(model):
    calibration = record(model, CalibrationSettings(), seed=4, cache=None, progress=SilentProgress())
    assert isinstance(calibration, NoImages) and (calibration.samples, calibration.seed) == (0, 4)
    with pytest.raises(StageError, match="no images to calibrate on"):
        calibration.observe(model, ["vit.layers.0"], lambda *_: None, SilentProgress())
    with pytest.raises(TypeError, match="NoImages holds no recorded calls"):
        calls_of(calibration, steps=1)
