"""Image sets: chosen by seed, divided, read when asked for, without what cannot be read."""

from __future__ import annotations

import shutil

import pytest
import torch
from compress.calibration.images import pools_of, training_images
from compress.calibration.preprocessing import preprocessor_for
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file

from .image_folders import by_class, write_images

CLASSES = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}


@pytest.fixture
def model(make_vit):
    return open_model(ModelRef(id=str(make_vit(num_labels=3, **CLASSES))), progress=SilentProgress())


def _settings(path, **values):
    return CalibrationSettings(images=path, **values)


def test_a_folder_is_divided_by_the_seed(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red", "green", "blue"], 5)
    pools = pools_of(model, _settings(folder), 0)
    assert (len(pools.train.order), len(pools.held_out.order)) == (12, 3)
    assert not set(pools.train.order) & set(pools.held_out.order)
    assert pools_of(model, _settings(folder), 0).train.order == pools.train.order
    assert pools_of(model, _settings(folder), 1).train.order != pools.train.order


def test_parts_are_never_mixed(model, tmp_path):
    folder = by_class(tmp_path / "images" / "train", ["red", "blue"], 4).parent
    by_class(folder / "val", ["green"], 3, seed=1)
    pools = pools_of(model, _settings(folder), 0)
    assert set(pools.train.all().labels.tolist()) == {0, 2}
    assert pools.held_out.all().labels.tolist() == [1, 1, 1]
    assert len(training_images(model, folder, pools, 0)) == 8


def test_labels_belong_to_their_images(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red", "green", "blue"], 4)
    chosen = pools_of(model, _settings(folder), 3).train.first(6)
    assert chosen.labels.dtype == torch.int64
    names = [chosen.source.paths[row].parent.name for row in chosen.rows]
    assert [CLASSES["label2id"][name] for name in names] == chosen.labels.tolist()
    prepare = preprocessor_for(model)
    from compress.calibration.decoding import decode

    found = chosen.pixels([4, 1])
    assert torch.equal(found, prepare([decode(chosen.source.paths[chosen.rows[row]], 3) for row in (4, 1)]))
    assert torch.equal(chosen.first(2).pixels([1]), chosen.pixels([1])) and len(chosen.first(2)) == 2


def test_photographs_without_labels(model, shared_data):
    pools = pools_of(model, _settings(shared_data / "data" / "images"), 0)
    assert pools.train.labels is None
    images = pools.train.all()
    assert len(images) == 6 and len(pools.held_out.order) == 1 and images.labels is None
    assert images.pixels(range(6)).shape == (6, 3, 16, 16)


def test_broken_files_are_left_out_or_refused(model, tmp_path):
    folder = by_class(tmp_path / "images" / "train", ["red", "green"], 5).parent
    by_class(folder / "test", ["red"], 2, seed=1)
    for name in ("red/001.png", "green/003.png"):
        broken = folder / "train" / name
        broken.write_bytes(broken.read_bytes()[:200])
    pool = pools_of(model, _settings(folder), 0).train
    images = pool.all()
    assert len(images) == 8 and sorted(images.skipped) == ["green/003.png", "red/001.png"]
    assert images.pixels(range(8)).isfinite().all()
    with pytest.raises(SourceError, match="8 images may be calibrated on; 2 cannot be read; 9 are asked for"):
        pool.first(9)
    strict = pools_of(model, _settings(folder, strict=True), 0).train
    with pytest.raises(SourceError, match=r"(red/001|green/003)\.png: cannot be decoded") as found:
        strict.all()
    assert "calibration.strict" in str(found.value.hint)


def test_nothing_readable_is_refused(model, tmp_path):
    folder = tmp_path / "images"
    for part in ("train", "test"):
        write_images(folder / part, ["red/a.png"])
    (folder / "train" / "red" / "a.png").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="none of its 1 images can be read"):
        pools_of(model, _settings(folder), 0).train.all()


def test_an_image_that_breaks_later_is_named(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red"], 5)
    images = pools_of(model, _settings(folder), 0).train.all()
    for path in images.source.paths:
        path.write_bytes(b"gone")
    with pytest.raises(SourceError, match=r"red/00\d\.png"):
        images.pixels([0])


def test_tensors(make_vit, tmp_path):
    model = open_model(ModelRef(id=str(make_vit(num_channels=3))), progress=SilentProgress())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10, 16, 16), generator=generator, dtype=torch.uint8)
    path = tmp_path / "digits.safetensors"
    save_file({"pixels": pixels, "labels": torch.arange(10).byte()}, path)
    images = pools_of(model, _settings(path), 0).train.all()
    assert len(images) == 8 and images.labels.tolist() == list(images.rows), "a label is the row's number"
    found = images.pixels([2, 5])
    wanted = pixels[[images.rows[2], images.rows[5]]].float() / 127.5 - 1
    assert torch.allclose(found, wanted[:, None].expand(2, 3, 16, 16), atol=1e-6)
    for wrong in (10, -1):
        save_file({"pixels": pixels, "labels": torch.tensor([*range(9), wrong])}, path)
        with pytest.raises(SourceError, match=f"the label {wrong} is out of range; the model has 10 classes"):
            pools_of(model, _settings(path), 0)


def test_coloured_tensors_do_not_fit_a_grey_model(make_vit, tmp_path):
    model = open_model(ModelRef(id=str(make_vit(num_channels=1))), progress=SilentProgress())
    path = tmp_path / "x.safetensors"
    pixels = torch.arange(4)[:, None, None, None].expand(4, 16, 16, 3).byte().contiguous()
    save_file({"pixels": pixels}, path)
    with pytest.raises(SourceError, match="the images have 3 channels, the model takes 1"):
        pools_of(model, _settings(path), 0).train.all().pixels([0])


def test_images_that_come_with_the_model(model, tmp_path):
    with pytest.raises(SourceError, match="a classifier is calibrated on images") as found:
        pools_of(model, CalibrationSettings(), 0)
    assert "images: FOLDER" in str(found.value.hint)
    by_class(model.source.folder / "images" / "train", ["red"], 3)
    by_class(model.source.folder / "images" / "test", ["red"], 2, seed=1)
    assert len(pools_of(model, CalibrationSettings(), 0).train.all()) == 3


def test_one_image_cannot_be_divided(model, tmp_path):
    with pytest.raises(SourceError, match="one image"):
        pools_of(model, _settings(write_images(tmp_path / "images", ["a.png"])), 0)


def test_training_on_a_place_of_its_own(model, tmp_path):
    calibration = by_class(tmp_path / "images", ["red", "green"], 5)
    other = by_class(tmp_path / "more", ["blue"], 4)
    write_images(other, [f"blue/{number:03d}.png" for number in range(4)], seed=1)
    pools = pools_of(model, _settings(calibration), 0)
    assert len(training_images(model, other, pools, 0)) == 4, "nothing is measured on it"
    held_out = {pools.held_out.source.paths[row] for row in pools.held_out.order}
    for path in (calibration, calibration / ".." / "images"):
        images = training_images(model, path, pools, 0)
        assert len(images) == 8
        assert not held_out & {images.source.paths[row] for row in images.rows}


def test_keys_are_of_contents(model, tmp_path):
    one = by_class(tmp_path / "one", ["red", "green"], 5)
    two = tmp_path / "two"
    shutil.copytree(one, two)
    keys = [pools_of(model, _settings(folder), 0).train.first(4).key for folder in (one, two)]
    assert keys[0] == keys[1], "the place does not count"
    assert pools_of(model, _settings(one), 1).train.first(4).key != keys[0]
    assert pools_of(model, _settings(one), 0).train.first(5).key != keys[0]
    assert (
        pools_of(model, _settings(one), 0).held_out.first(1).key
        != pools_of(model, _settings(one), 0).train.first(1).key
    )
    write_images(two, ["red/000.png"], seed=9)
    assert pools_of(model, _settings(two), 0).train.first(4).key != keys[0]


def test_the_global_generator_is_left_alone(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red", "green"], 5)
    before = torch.get_rng_state()
    pools_of(model, _settings(folder), 0).train.all().pixels([0, 1])
    assert torch.equal(torch.get_rng_state(), before)
