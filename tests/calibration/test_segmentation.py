"""Calibration on images of a model that segments: chosen, replayed, keyed."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.classification import NoImages
from compress.calibration.recording import record
from compress.calibration.scene_sets import ScenePools
from compress.calibration.segmentation import SegmentationCalibration, scene_pools_of
from compress.errors import SourceError, StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef

from ..tiny_sam import save_tiny_sam
from ..tiny_scenes import write_parts, write_scenes, write_tar


@pytest.fixture
def sam(tmp_path):
    return open_model(ModelRef(id=str(save_tiny_sam(tmp_path / "sam"))), progress=SilentProgress())


class _Told(SilentProgress):
    def __init__(self):
        self.warnings, self.notes = [], []

    def warn(self, message):
        self.warnings.append(message)

    def note(self, message):
        self.notes.append(message)


def _record(sam, progress=None, pools=None, seed=0, **settings):
    progress, wanted = progress or SilentProgress(), CalibrationSettings(**settings)
    return record(sam, wanted, seed=seed, cache=None, progress=progress, pools=pools)


def test_images_are_chosen_and_replayed_in_batches(sam, tmp_path):
    write_parts(tmp_path / "s", 9, 3)
    found = _record(sam, images=tmp_path / "s", samples=5, batch_size=2)
    assert isinstance(found, SegmentationCalibration)
    assert found.samples == 5 and found.count() == 3 and len(found.training()) == 9
    calls = list(found.calls())
    assert [tuple(call["pixel_values"].shape) for call in calls] == [(2, 3, 64, 64)] * 2 + [(1, 3, 64, 64)]
    assert calls[0]["input_points"].shape == (2, 1, 1, 2)
    assert calls[0]["input_points"][0].flatten().tolist() == [32.0, 24.0]
    assert torch.equal(torch.cat([call["pixel_values"] for call in calls]), found.scenes.pixels(range(5)))
    assert found.scenes.names == found.pools.train.all().names[:5]


def test_layers_of_encoder_and_decoder_are_observed(sam, tmp_path):
    found = _record(sam, images=write_scenes(tmp_path / "s", 10), samples=3, batch_size=2)
    names = ["vision_encoder.layers.0.attn.qkv", "mask_decoder.transformer.layers.0.mlp.lin1"]
    seen = {name: [] for name in names}

    def observer(name, x, timesteps):
        seen[name].append((x.shape, timesteps.tolist()))

    found.observe(sam, names, observer, SilentProgress())
    # 8 x 8 tokens in windows of 3 are filled up to 9 x 9.
    assert seen[names[0]] == [((2, 81, 48), [0.0, 0.0]), ((1, 81, 48), [0.0])]
    assert [shape[0] for shape, _ in seen[names[1]]] == [2, 1]
    with pytest.raises(StageError, match="no such layer"):
        found.observe(sam, ["nowhere"], lambda *_: None, SilentProgress())


def test_pools_that_are_known_are_used(sam, tmp_path):
    settings = CalibrationSettings(images=write_scenes(tmp_path / "s", 10), samples=3)
    pools = scene_pools_of(sam, settings, 0)
    assert isinstance(pools, ScenePools)
    found = _record(sam, images=settings.images, samples=3, pools=pools)
    assert found.pools is pools and found.key == _record(sam, images=settings.images, samples=3).key


def test_the_key_follows_images_seed_and_amounts(sam, tmp_path):
    folder = write_scenes(tmp_path / "s", 12)
    place = {"images": folder, "samples": 3}
    keys = [_record(sam, **place).key, _record(sam, **place).key]
    assert keys[0] == keys[1]
    assert _record(sam, images=write_tar(folder, tmp_path / "s.tar"), samples=3).key == keys[0]
    keys += [
        _record(sam, **place, batch_size=4).key, _record(sam, images=folder, samples=4).key,
        _record(sam, **place, seed=1).key,
    ]  # fmt: skip
    (folder / "sa_3.json").write_text((folder / "sa_3.json").read_text() + "\n")
    keys.append(_record(sam, **place).key)
    assert len(set(keys)) == 5


def test_own_images_beside_the_weights(sam, tmp_path):
    """As the built-in model brings them: an archive for each part."""
    for name, seed in (("train", 0), ("validation", 1)):
        write_tar(write_scenes(tmp_path / name, 6, seed=seed), sam.source.folder / "images" / f"{name}.tar")
    found = _record(sam, samples=6)
    assert found.samples == 6 and len(found.pools.held_out.all()) == 6


def test_without_images_nothing_is_calibrated(sam):
    found = _record(sam)
    assert isinstance(found, NoImages) and len(found.key) == 64
    with pytest.raises(SourceError, match="calibrated on images, and the recipe names none"):
        scene_pools_of(sam, CalibrationSettings(), 0)


def test_what_is_left_out_and_assumed_is_told(sam, tmp_path):
    write_parts(tmp_path / "s", 6, 3)
    first = _record(sam, images=tmp_path / "s", samples=2).scenes.names
    for name in first:
        (tmp_path / "s" / "train" / name).write_bytes(b"broken")
    (sam.source.folder / "preprocessor_config.json").unlink()
    told = _Told()
    found = _record(sam, told, images=tmp_path / "s", samples=4)
    assert found.samples == 4 and "preprocessor_config.json" in told.notes[0]
    assert f"2 files cannot be read and are left out, the first is {first[0]}" in told.warnings[0]
    with pytest.raises(SourceError, match="4 images may be calibrated on; 2 cannot be read; 5 are asked for"):
        _record(sam, images=tmp_path / "s", samples=5)
    with pytest.raises(SourceError, match="not an image that is read"):
        _record(sam, images=tmp_path / "s", samples=4, strict=True)
