"""Where images with masks may lie, and what is refused."""

from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path

import pytest
from compress.calibration import fingerprints
from compress.calibration.scene_files import choice_count, equal_scenes, find_scenes, held_out_counts
from compress.errors import SourceError

from ..tiny_scenes import write_parts, write_scenes, write_tar


def test_a_folder_of_images_with_masks_beside_some(tmp_path):
    write_scenes(tmp_path / "a", 2)
    write_scenes(tmp_path / "a" / "deep" / "er", 2, masks=False, suffix=".PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    write_scenes(tmp_path / "a" / ".hidden", 1)
    found = find_scenes(tmp_path / "a")
    assert found.held_out is None and found.path == tmp_path / "a"
    names = [part.name for part in found.train.images]
    assert names == ["deep/er/sa_0.PNG", "deep/er/sa_1.PNG", "sa_0.jpg", "sa_1.jpg"]
    assert found.train.masked == (False, False, True, True) and len(found.train) == 4
    assert [part and part.name for part in found.train.masks] == [None, None, "sa_0.json", "sa_1.json"]


def test_an_archive_is_as_good_as_its_folder(tmp_path):
    write_scenes(tmp_path / "s" / "a", 2)  # a slash comes behind a hyphen in one order, before in another
    write_scenes(tmp_path / "s" / "a-b", 1)
    write_tar(tmp_path / "s", tmp_path / "s.tar")
    folder, archive = find_scenes(tmp_path / "s"), find_scenes(tmp_path / "s.tar")
    assert folder.fingerprint() == archive.fingerprint()
    assert [part.name for part in folder.train.images] == [part.name for part in archive.train.images]
    assert archive.train.masked == (True, True, True)
    assert equal_scenes(folder.train)[0] == equal_scenes(archive.train)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("other", ["validation", "val", "test"])
def test_parts(tmp_path, other, packed):
    write_parts(tmp_path / "x", 3, 2)
    (tmp_path / "x" / "validation").rename(tmp_path / "x" / other)
    root = tmp_path / "x"
    if packed:
        for name in ("train", other):
            write_tar(tmp_path / "x" / name, tmp_path / "packed" / f"{name}.tar")
        root = tmp_path / "packed"
    found = find_scenes(root)
    assert found.held_out is not None and (len(found.train), len(found.held_out)) == (3, 2)


def test_a_part_that_is_there_twice_or_without_training_images(tmp_path):
    write_parts(tmp_path / "x", 2, 2)
    write_tar(tmp_path / "x" / "train", tmp_path / "x" / "train.tar")
    with pytest.raises(SourceError, match=r"has both train and train\.tar"):
        find_scenes(tmp_path / "x")
    write_scenes(tmp_path / "y" / "val", 2)
    with pytest.raises(SourceError, match="has a part 'val' and no 'train'"):
        find_scenes(tmp_path / "y")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such folder or archive"),
        ("empty", "holds no images"),
        ("text.txt", "neither a folder nor a .tar"),
        ("empty.tar", "holds no images"),
        ("digits.safetensors", "neither a folder nor a .tar"),
    ],
)
def test_places_that_are_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.json").write_text("{}")
    write_tar(tmp_path / "empty", tmp_path / "empty.tar")
    for file in ("text.txt", "digits.safetensors"):
        (tmp_path / file).write_text("x")
    with pytest.raises(SourceError, match=message) as found:
        find_scenes(tmp_path / name)
    assert "name a folder of images" in str(found.value.hint)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_a_compressed_archive_by_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"1"))
    with pytest.raises(SourceError, match=r"is compressed \(gzip\)"):
        find_scenes(tmp_path / name)


def test_a_folder_of_archives_says_to_name_one(tmp_path):
    write_tar(write_scenes(tmp_path / "s", 1), tmp_path / "x" / "sa_000020.tar")
    with pytest.raises(SourceError, match="holds no images") as found:
        find_scenes(tmp_path / "x")
    assert "sa_000020.tar" in str(found.value.hint)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """As a user who may not list it meets it; whoever runs the tests perhaps may read everything."""
    write_scenes(tmp_path / "s" / "locked", 1)
    listed = Path.iterdir

    def refusing(path):
        if path.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    for place in (tmp_path / "s", tmp_path / "s" / "locked"):
        with pytest.raises(SourceError, match="locked: cannot be read: Permission denied"):
            find_scenes(place)


def test_the_fingerprint_is_of_images_and_masks(tmp_path):
    one = find_scenes(write_scenes(tmp_path / "one", 2)).fingerprint()
    two = write_scenes(tmp_path / "two", 2)
    assert find_scenes(two).fingerprint() == one and len(one) == 64
    text = (two / "sa_1.json").read_text()
    (two / "sa_1.json").write_text(text + " ")
    assert find_scenes(two).fingerprint() != one
    (two / "sa_1.json").write_text(text)
    assert find_scenes(two).fingerprint() == one
    (two / "sa_0.jpg").write_bytes(b"other")
    assert find_scenes(two).fingerprint() != one


def test_very_many_bytes_count_by_sizes_and_times(tmp_path, monkeypatch):
    """What is equal is found all the same: by size, then by ends, then by all of it."""
    monkeypatch.setattr(fingerprints, "HASHED_BYTES", 10)
    folder = write_scenes(tmp_path / "s", 3)
    (folder / "copy.jpg").write_bytes((folder / "sa_1.jpg").read_bytes())
    found = find_scenes(folder)
    assert found.train.hashes is None
    (contents,) = equal_scenes(found.train)
    by_name = dict(zip([part.name for part in found.train.images], contents, strict=True))
    assert by_name["copy.jpg"] == by_name["sa_1.jpg"] and len(set(contents)) == 3
    before = found.fingerprint()
    assert find_scenes(folder).fingerprint() == before
    os.utime(folder / "sa_0.json", ns=(1, 1))
    assert find_scenes(folder).fingerprint() != before
    archive = find_scenes(write_tar(folder, tmp_path / "s.tar")).train
    assert len(set(equal_scenes(archive)[0])) == 3 and archive.hashes is None


def test_what_cannot_be_read_is_equal_to_nothing(tmp_path):
    folder = write_scenes(tmp_path / "s", 1)
    for name in ("x.jpg", "y.jpg"):
        (folder / name).symlink_to(tmp_path / "nowhere")
    (contents,) = equal_scenes(find_scenes(folder).train)
    assert len(set(contents)) == 3


@pytest.mark.parametrize(
    ("masked", "others", "wanted"),
    [(0, 10, (0, 2)), (10, 0, (2, 0)), (10, 10, (2, 2)), (3, 4, (1, 0)), (1, 0, (1, 0)), (0, 3, (0, 1))],
)
def test_a_fifth_of_each_is_held_out(masked, others, wanted):
    assert held_out_counts(masked, others) == wanted


def test_at_most_a_fifth_chooses():
    assert [choice_count(images, 50) for images in (2, 4, 10, 250, 1000)] == [1, 1, 2, 50, 50]
