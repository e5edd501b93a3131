"""Sets of images to segment: order, what is left out and why, masks, and what chooses between epochs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compress.calibration import decoding, scene_sets
from compress.calibration.scene_files import find_scenes
from compress.calibration.scene_sets import divide, split_for_choice
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef

from ..tiny_sam import save_tiny_sam
from ..tiny_scenes import drawn, write_parts, write_scenes, write_tar


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    folder = save_tiny_sam(tmp_path_factory.mktemp("sam") / "model")
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def _divide(sam, path, strict=False, seed=0):
    return divide(sam, find_scenes(path), strict, seed)


def _contents(scenes):
    return {part.sha256() for part in (scenes.files.images[row] for row in scenes.rows)}


def test_images_and_masks_come_as_they_were_written(sam, tmp_path):
    write_scenes(tmp_path / "s", 6, suffix=".png", objects=2)
    found = _divide(sam, tmp_path / "s").train.all()
    wanted = drawn(6, objects=2)
    assert len(found) == 5 and found.annotated and found.masks == (2,) * 5
    for index, name in enumerate(found.names):
        image, masks = wanted[int(Path(name).stem.removeprefix("sa_"))]
        assert np.array_equal(found.image(index), image) and found.scene(index).size == (48, 64)
        for annotation, mask in zip(found.annotations(index), masks, strict=True):
            x, y = annotation.point
            assert np.array_equal(annotation.mask, mask) and mask[int(y), int(x)]
    assert torch.equal(found.pixels([3, 0]), torch.stack([found.scene(3).pixels, found.scene(0).pixels]))


def test_an_archive_gives_what_its_folder_gives(sam, tmp_path):
    folder = write_scenes(tmp_path / "s", 10)
    one, other = (_divide(sam, path) for path in (folder, write_tar(folder, tmp_path / "s.tar")))
    assert one.train.order == other.train.order and one.train.key == other.train.key
    assert one.held_out.all().names == other.held_out.all().names
    assert torch.equal(one.train.all().pixels([1]), other.train.all().pixels([1]))


def test_a_fifth_is_held_out_by_seed_of_those_with_masks_and_of_the_others(sam, tmp_path):
    write_scenes(tmp_path / "s", 10)
    write_scenes(tmp_path / "s" / "more", 15, masks=False, seed=1)
    orders = []
    for seed in (0, 0, 1):
        pools = _divide(sam, tmp_path / "s", seed=seed)
        held_out = pools.held_out.all()
        assert len(held_out) == 5 and sum(map(bool, held_out.masks)) == 2
        assert not set(pools.train.order) & set(pools.held_out.order) and len(pools.train.order) == 20
        orders.append((pools.train.order, pools.train.key, held_out.key))
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0][2] != orders[2][2]


def test_equal_images_are_never_in_both_parts(sam, tmp_path):
    folder = write_scenes(tmp_path / "s", 8)
    for index in range(8):
        shutil.copy(folder / f"sa_{index}.jpg", folder / f"copy_{index}.jpg")
    for seed in range(4):
        pools = _divide(sam, folder, seed=seed)
        assert not _contents(pools.train.all()) & _contents(pools.held_out.all())
        assert len(pools.held_out.order) == 2
    parts = write_parts(tmp_path / "p", 5, 3)
    shutil.copy(parts / "validation" / "sa_1.jpg", parts / "train" / "other.jpg")
    pools = _divide(sam, parts)
    assert len(pools.train.order) == 5 and pools.train.copies == 1 and pools.train.all().copies == 1
    shutil.rmtree(parts / "train")
    shutil.copytree(parts / "validation", parts / "train")
    with pytest.raises(SourceError, match="all of its 3 images are also held out"):
        _divide(sam, parts)


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_different_images_cannot_be_divided(sam, tmp_path, count):
    folder = write_scenes(tmp_path / "s", 1)
    for index in range(1, count):
        shutil.copy(folder / "sa_0.jpg", folder / f"sa_{index}.jpg")
    with pytest.raises(SourceError, match="none different from another"):
        _divide(sam, folder)


def _break(folder):
    (folder / "sa_0.jpg").write_bytes((folder / "sa_0.jpg").read_bytes()[:200])
    (folder / "sa_1.json").write_text("{")
    (folder / "sa_2.json").write_text((folder / "sa_2.json").read_text().replace("[48, 64]", "[64, 48]"))
    (folder / "sa_3.json").write_text('{"annotations": []}')
    (folder / "sa_4.json").unlink()


def test_what_cannot_be_read_is_left_out_with_its_name(sam, tmp_path):
    parts = write_parts(tmp_path / "s", 8, 4)
    _break(parts / "train")
    pool = _divide(sam, parts).train
    found = pool.all()
    assert set(found.skipped) == {"sa_0.jpg", "sa_1.jpg", "sa_2.jpg"} and len(found) == 5
    assert dict(zip(found.names, found.masks, strict=True)) == {
        "sa_3.jpg": 0, "sa_4.jpg": 0, "sa_5.jpg": 1, "sa_6.jpg": 1, "sa_7.jpg": 1
    }  # fmt: skip
    assert not found.annotated and pool.first(3, annotated=True).annotated
    with pytest.raises(
        SourceError, match="3 images with masks may be calibrated on; 3 cannot be read; 4 are asked for"
    ):
        pool.first(4, annotated=True)
    with pytest.raises(SourceError, match="5 images may be calibrated on; 3 cannot be read; 6 are") as few:
        pool.first(6)
    assert "one is " in str(few.value) and "sa_0.jpg: " in str(few.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sa_0.jpg", r"sa_0\.jpg: cannot be"),
        ("sa_1.json", r"sa_1\.json: not JSON"),
        ("sa_2.json", r"sa_2\.json: annotations\[0\]: the mask has 64 x 48 pixels"),
    ],
)
def test_and_refused_where_all_are_asked_for(sam, tmp_path, name, message):
    parts = write_parts(tmp_path / "s", 5, 2)
    _break(write_scenes(tmp_path / "broken", 5))
    shutil.copy(tmp_path / "broken" / name, parts / "train" / name)
    with pytest.raises(SourceError, match=message) as found:
        _divide(sam, parts, strict=True).train.all()
    assert "calibration.strict" in str(found.value.hint)


def test_nothing_that_can_be_read(sam, tmp_path):
    parts = write_parts(tmp_path / "s", 2, 2)
    for index in range(2):
        (parts / "train" / f"sa_{index}.jpg").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"none of its 2 images can be read; one is .*sa_0\.jpg: not"):
        _divide(sam, parts).train.all()


def test_what_vanishes_later_is_an_error_that_names_it(sam, tmp_path):
    folder = write_scenes(tmp_path / "s", 5)
    found = _divide(sam, folder).train.all()
    for path in folder.iterdir():
        path.unlink()
    for read in (found.scene, found.image, found.annotations):
        with pytest.raises(SourceError, match=r"sa_\d\.jpg: cannot be read: No such file") as error:
            read(0)
        assert error.value.hint


def test_every_image_is_looked_at_once(sam, tmp_path, monkeypatch):
    pool = _divide(sam, write_scenes(tmp_path / "s", 10)).train
    seen = []
    look = scene_sets.look_at

    def looking(files, row, *, decode):
        seen.append(row)
        return look(files, row, decode=decode)

    monkeypatch.setattr(scene_sets, "look_at", looking)
    for read in (lambda: pool.first(3), pool.all, lambda: pool.first(5, annotated=True)):
        read()
    assert sorted(seen) == sorted(pool.order)


def test_of_very_many_images_the_headers_are_read(sam, tmp_path, monkeypatch):
    folder = write_scenes(tmp_path / "s", 6)
    decoded = []
    monkeypatch.setattr(decoding, "_pixels", lambda *values: decoded.append(values))
    monkeypatch.setattr(scene_sets, "_DECODED_AT_MOST", 4)
    assert len(_divide(sam, folder).train.all()) == 5 and not decoded
    monkeypatch.setattr(scene_sets, "_DECODED_AT_MOST", 5)
    assert len(_divide(sam, folder).train.all()) == 5 and len(decoded) == 5


def test_the_key_is_of_images_masks_order_and_preprocessing(sam, tmp_path):
    folder = write_scenes(tmp_path / "s", 6)
    keys = [_divide(sam, folder).train.all().key for _ in range(2)]
    assert keys[0] == keys[1]
    keys += [_divide(sam, folder).train.first(2).key, _divide(sam, folder).train.all().first(2).key]
    keys.append(_divide(sam, folder, seed=1).train.all().key)
    (folder / "sa_0.json").write_text((folder / "sa_0.json").read_text() + " ")
    keys.append(_divide(sam, folder).train.all().key)
    assert len(set(keys[1:])) == 5


def test_the_choice_has_no_equal_among_what_is_trained_on(sam, tmp_path):
    folder = write_scenes(tmp_path / "s", 30)
    for index in range(0, 30, 2):
        shutil.copy(folder / f"sa_{index}.jpg", folder / f"copy_{index}.jpg")
    scenes = _divide(sam, folder).train.all()
    for seed in range(3):
        train, choice = split_for_choice(scenes, 6, seed)
        assert not _contents(train) & _contents(choice)
        different = len(_contents(scenes))
        assert len(_contents(choice)) == len(choice) == different // 5 and choice.annotated
        assert len(_contents(train)) == different - len(choice)
    again = split_for_choice(scenes, 6, 2)
    assert (again[0].key, again[1].key) == (train.key, choice.key)
    assert split_for_choice(scenes, 6, 0)[1].rows != choice.rows


@pytest.mark.parametrize(("count", "wanted"), [(50, 4), (4, 4), (1, 1)])
def test_the_choice_is_a_fifth_at_most(sam, tmp_path, count, wanted):
    scenes = _divide(sam, write_parts(tmp_path / "s", 20, 2)).train.all()
    train, choice = split_for_choice(scenes, count, 0)
    assert (len(train), len(choice)) == (20 - wanted, wanted)


def test_the_choice_has_masks_where_there_are_enough(sam, tmp_path):
    parts = write_parts(tmp_path / "s", 20, 2, masks=False)
    write_scenes(parts / "train" / "more", 4, seed=5)
    scenes = _divide(sam, parts).train.all()
    assert split_for_choice(scenes, 4, 0)[1].masks == (1,) * 4
    shutil.rmtree(parts / "train" / "more")
    write_scenes(parts / "train" / "more", 3, seed=5)
    scenes = _divide(sam, parts).train.all()
    choice = split_for_choice(scenes, 4, 0)[1]
    assert len(choice) == 4 and not choice.annotated


def test_nothing_left_to_train_on(sam, tmp_path):
    parts = write_parts(tmp_path / "s", 1, 2)
    shutil.copy(parts / "train" / "sa_0.jpg", parts / "train" / "copy.jpg")
    with pytest.raises(SourceError, match="1 different image to train on"):
        split_for_choice(_divide(sam, parts).train.all(), 1, 0)
