"""What is measured on is not learned from, under whatever name it comes; links, pipes and empty folders."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess

import pytest
import torch
from compress.calibration import image_contents
from compress.calibration.classification import warn_of_left_out
from compress.calibration.image_contents import contents
from compress.calibration.image_files import find_images
from compress.calibration.images import pools_of, training_images
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import save_file

from .image_folders import by_class, write_images

CLASSES = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}


class _Told(SilentProgress):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def model(make_vit):
    return open_model(ModelRef(id=str(make_vit(num_labels=3, **CLASSES))), progress=SilentProgress())


def _pools(model, path, seed=0, **values):
    return pools_of(model, CalibrationSettings(images=path, **values), seed)


def _bytes(pool_or_set, rows):
    return {pool_or_set.source.paths[row].read_bytes() for row in rows}


def _as_copy(folder, other):
    shutil.copytree(folder, other)


def _as_links(folder, other):
    other.mkdir()
    for name in folder.iterdir():
        (other / name.name).symlink_to(name)


def _renamed(folder, other):
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, other / path.parent.name / f"renamed-{number}.png")


def _by_table(folder, other):
    _renamed(folder, other)
    rows = [f"{path.relative_to(other)},{path.parent.name}" for path in other.rglob("*.png")]
    (other / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))


@pytest.mark.parametrize("place", [_as_copy, _as_links, _renamed, _by_table])
def test_what_is_held_out_is_not_trained_on_from_another_place(model, tmp_path, place):
    folder = by_class(tmp_path / "images", ["red", "green"], 5)
    place(folder, tmp_path / "other")
    pools = _pools(model, folder)
    images = training_images(model, tmp_path / "other", pools, 0)
    assert (len(images), images.copies) == (8, 2)
    assert not _bytes(images, images.rows) & _bytes(pools.held_out, pools.held_out.order)
    told = _Told()
    warn_of_left_out(images, "other", told)
    assert told.warnings == ["other: 2 images are held out for measuring and left out here"]


@pytest.mark.parametrize("too_large", [False, True])
def test_the_parent_of_parts_brings_nothing_back(model, tmp_path, monkeypatch, too_large):
    """Also where the folders are too large to be read as a whole."""
    if too_large:
        monkeypatch.setattr("compress.calibration.fingerprints.HASHED_BYTES", 1)
    folder = by_class(tmp_path / "images" / "train", ["red", "green"], 4).parent
    by_class(folder / "val", ["red", "green"], 2, seed=1)
    pools = _pools(model, folder)
    everything = tmp_path / "all"
    for part in ("train", "val"):
        for path in (folder / part).rglob("*.png"):
            (everything / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, everything / path.parent.name / f"{part}-{path.name}")
    images = training_images(model, everything, pools, 0)
    assert (len(images), images.copies) == (8, 4)
    assert _bytes(images, images.rows) == _bytes(pools.train, pools.train.order)


def test_nothing_left_to_train_on_is_refused(model, tmp_path):
    folder = by_class(tmp_path / "images" / "train", ["red"], 4).parent
    by_class(folder / "val", ["green"], 3, seed=1)
    with pytest.raises(SourceError, match="all of its 3 images are also held out for measuring"):
        training_images(model, folder / "val", _pools(model, folder), 0)


def test_parts_that_share_images(model, tmp_path):
    folder = by_class(tmp_path / "images" / "train", ["red", "green"], 4).parent
    (folder / "val" / "red").mkdir(parents=True)
    shutil.copyfile(folder / "train" / "red" / "002.png", folder / "val" / "red" / "x.png")
    pools = _pools(model, folder)
    assert (len(pools.train.order), pools.train.copies, len(pools.held_out.order)) == (7, 1, 1)
    with pytest.raises(
        SourceError, match="7 images may be calibrated on; 1 are held out for measuring; 8 are"
    ):
        pools.train.first(8)
    (folder / "test").symlink_to("train")
    shutil.rmtree(folder / "val")
    with pytest.raises(SourceError, match="all of its 8 images are also held out"):
        _pools(model, folder)


def test_copies_are_on_one_side(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red", "green"], 10)
    for path in list((folder / "red").iterdir()):
        shutil.copyfile(path, path.with_name(f"copy-{path.name}"))
    for seed in range(5):
        pools = _pools(model, folder, seed)
        train, held_out = (_bytes(pool, pool.order) for pool in (pools.train, pools.held_out))
        assert train and held_out and not train & held_out
        assert len(pools.train.order) + len(pools.held_out.order) == 30
        assert len(pools.held_out.order) in (5, 6)


def test_equal_images_cannot_be_divided(model, tmp_path):
    folder = write_images(tmp_path / "images", ["red/0.png"])
    for number in range(1, 6):
        shutil.copyfile(folder / "red" / "0.png", folder / "red" / f"{number}.png")
    with pytest.raises(SourceError, match="its 6 images are all equal"):
        _pools(model, folder)
    write_images(folder, ["red/9.png"], seed=1)
    pools = _pools(model, folder)
    assert (len(pools.train.order), len(pools.held_out.order)) == (6, 1), "the smaller group is held out"


def test_rows_of_tensors(model, tmp_path):
    pixels = torch.arange(10)[:, None, None].expand(10, 4, 4).byte().contiguous()
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file({"pixels": pixels}, one)
    more = torch.cat([pixels.flip(0), 100 + pixels])[..., None].contiguous()
    save_file({"a": torch.zeros(3).byte(), "pixels": more}, other)
    pools = _pools(model, one)
    images = training_images(model, other, pools, 0)
    assert (len(images), images.copies) == (18, 2)
    held_out = {int(pixels[row, 0, 0]) for row in pools.held_out.order}
    assert not held_out & {int(more[row, 0, 0, 0]) for row in images.rows}
    save_file({"pixels": torch.cat([pixels, pixels])}, one)
    pools = _pools(model, one)
    assert {row % 10 for row in pools.train.order}.isdisjoint(row % 10 for row in pools.held_out.order)


def test_rows_of_another_form_are_other_images(tmp_path):
    found = []
    for name, shape in (("a", (6, 2, 8)), ("b", (6, 4, 4)), ("c", (6, 4, 4, 1))):
        save_file({"pixels": torch.zeros(shape).byte()}, tmp_path / f"{name}.safetensors")
        found.append(find_images(tmp_path / f"{name}.safetensors").train)
    flat, square, grey = contents(*found)
    assert set(square) == set(grey) != set(flat) and len({*flat, *square}) == 2


def test_what_cannot_be_compared_is_told(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red", "green"], 5)
    path = tmp_path / "rows.safetensors"
    save_file({"pixels": torch.arange(16)[:, None, None].expand(16, 4, 4).byte().contiguous()}, path)
    images = training_images(model, path, _pools(model, folder), 0)
    assert len(images) == 16 and "files cannot be compared with rows" in images.notes[-1]


def test_large_files_are_read_as_far_as_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.calibration.fingerprints.HASHED_BYTES", 1)
    ends = b"x" * 5000
    written = {
        "a": ends + b"0" + ends, "b": ends + b"1" + ends, "c": ends + b"0" + ends, "d": b"y" + ends * 2,
        "e": b"alone",
    }  # fmt: skip
    for name, data in written.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "f.png").symlink_to("nowhere")
    (tmp_path / "g.png").symlink_to("nowhere")
    whole = []
    monkeypatch.setattr(
        image_contents,
        "file_sha256",
        lambda path, read=image_contents.file_sha256: whole.append(path.name) or read(path),
    )
    (found,) = contents(find_images(tmp_path).train)
    a, b, c, *others = found
    assert a == c != b and len({a, b, *others}) == 6
    assert whole == ["a.png", "b.png", "c.png"]


def _pipe(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def _device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _socket, _device])
def test_what_is_no_file_is_counted_and_never_opened(model, tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    by_class(tmp_path / "x", ["red", "green"], 5)
    make((tmp_path / "x" / "red" / "pipe.png").relative_to(tmp_path))
    images = _pools(model, tmp_path / "x").train.all()
    skipped = {*images.skipped, *_pools(model, tmp_path / "x").held_out.all().skipped}
    assert skipped == {"red/pipe.png"}
    flat = write_images(tmp_path / "y", ["0.png", "1.png", "2.png"])
    make((flat / "pipe.png").relative_to(tmp_path))
    assert len(find_images(flat).train) == 4, "it is not passed over in silence"


@pytest.mark.parametrize("target", ["..", "../green", "../../images", "."])
def test_folders_that_come_twice(tmp_path, target):
    folder = by_class(tmp_path / "images", ["red", "green"], 2)
    (folder / "red" / "link").symlink_to(target)
    with pytest.raises(SourceError, match="is the same folder as") as found:
        find_images(folder)
    assert "remove the link" in str(found.value.hint)


def test_deep_folders(tmp_path):
    deep = tmp_path / "images" / "red"
    deep.mkdir(parents=True)
    parent = os.open(deep, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=parent)
        child = os.open("d", os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(parent)
    write_images(deep, ["0.png"])
    found = find_images(tmp_path / "images")
    subprocess.run(["rm", "-r", str(deep / "d")], check=True)  # Python's own way of removing it is recursive
    assert len(found.train) == 1


def test_an_empty_folder_of_a_class_is_told_or_refused(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red", "green"], 5)
    (folder / "blue").mkdir()
    assert any("no image is in the folder 'blue'" in note for note in _pools(model, folder).notes)
    with pytest.raises(SourceError, match="no image is in the folder 'blue'"):
        _pools(model, folder, strict=True)


def test_the_notes_on_a_place_of_its_own_are_kept(model, tmp_path):
    folder = by_class(tmp_path / "images", ["red", "green"], 5)
    other = by_class(tmp_path / "other", ["Red", "Green"], 5, seed=3)
    images = training_images(model, other, _pools(model, folder), 0)
    assert any("by similar names: 'Green' as 'green', 'Red' as 'red'" in note for note in images.notes)
