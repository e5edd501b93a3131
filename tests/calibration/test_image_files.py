"""Where images may lie, what their labels are called, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from compress.calibration.image_files import FileList, TensorFile, find_images, held_out_count
from compress.errors import SourceError
from PIL import Image
from safetensors.torch import save_file


def _image(path, grey=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (grey, grey, grey)).save(path)
    return path


def _tensors(path, count=5, labels=True, shape=(4, 4), dtype=torch.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"pixels": torch.zeros(count, *shape).to(dtype)}
    save_file(tensors | ({"labels": torch.arange(count)} if labels else {}), path)
    return path


def test_a_folder_per_class(tmp_path):
    for name in ("cat/b.png", "cat/deep/a.JPG", "dog/c.png"):
        _image(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "bird").mkdir()
    (tmp_path / ".hidden").mkdir()
    found = find_images(tmp_path)
    assert found.held_out is None and isinstance(found.train, FileList)
    assert [path.name for path in found.train.paths] == ["b.png", "a.JPG", "c.png"]
    assert found.train.labels == ("cat", "cat", "dog") and found.train.labelled
    assert found.train.classes == ("bird", "cat", "dog"), "an empty folder is a class, too"


@pytest.mark.parametrize("other", ["validation", "val", "test"])
def test_parts_of_a_folder(tmp_path, other):
    _image(tmp_path / "train" / "cat" / "a.png")
    _image(tmp_path / other / "dog" / "b.png")
    found = find_images(tmp_path)
    assert found.train.labels == ("cat",) and found.held_out is not None
    assert found.held_out.labels == ("dog",)
    _image(tmp_path / "test" / "dog" / "c.png")
    held_out = find_images(tmp_path).held_out
    assert held_out is not None and held_out.root == tmp_path / other, "validation goes before test"


def test_a_part_without_training_images_is_no_whole(tmp_path):
    _image(tmp_path / "val" / "cat" / "a.png")
    with pytest.raises(SourceError, match="has a part 'val' and no 'train'"):
        find_images(tmp_path)


def test_images_without_labels(tmp_path):
    _image(tmp_path / "b.png")
    _image(tmp_path / "a.webp")
    found = find_images(tmp_path)
    assert [path.name for path in found.train.paths] == ["a.webp", "b.png"]
    assert not found.train.labelled


def test_an_image_beside_folders_of_classes_is_refused(tmp_path):
    _image(tmp_path / "cat" / "a.png")
    _image(tmp_path / "lost.png")
    with pytest.raises(SourceError, match=r"lost\.png lies beside folders"):
        find_images(tmp_path)


def test_a_table_of_labels(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,label\nx/a.png,"tench, Tinca tinca"\nb.png,cock\n')
    found = find_images(tmp_path)
    assert found.train.labels == ("tench, Tinca tinca", "cock")
    assert found.train.paths == (tmp_path / "x" / "a.png", tmp_path / "b.png")
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_name": "a.png", "label": 3}, {"file_name": "b.png", "label": 0}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert find_images(tmp_path).train.labels == ("3", "0")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    assert not find_images(tmp_path).train.labelled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\n", "has no rows"),
        ("name,label\na.png,cat\n", "line 1 names the columns 'name', 'label', and no 'file_name'"),
        ("file_name,label\na.png,cat\nb.png\n", "line 3 has 1 cell for 2 columns"),
        ("file_name,label\n../a.png,cat\n", "leads out of the folder"),
        ("file_name,label\n/etc/a.png,cat\n", "leads out of the folder"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, message):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        find_images(tmp_path)


@pytest.mark.parametrize("text", ["{broken", "[1]\n", '{"file_name": "a.png", "label": true}\n'])
def test_lines_that_are_refused(tmp_path, text):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(SourceError, match=r"metadata\.jsonl"):
        find_images(tmp_path)


def test_tensors_of_images(tmp_path):
    path = _tensors(tmp_path / "digits.safetensors", shape=(4, 6, 3))
    found = find_images(path)
    assert found.train == TensorFile(path, 5, (4, 6), 3, True) and len(found.train) == 5
    _tensors(tmp_path / "parts" / "train.safetensors")
    _tensors(tmp_path / "parts" / "test.safetensors", count=2, labels=False)
    found = find_images(tmp_path / "parts")
    assert len(found.train) == 5 and found.held_out is not None and len(found.held_out) == 2
    assert found.train.labelled and not found.held_out.labelled
    (tmp_path / "parts" / "train").mkdir()
    with pytest.raises(SourceError, match=r"both train and train\.safetensors"):
        find_images(tmp_path / "parts")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, r"pixels is F32 \[5, 4, 4\]"),
        ({"shape": (4,)}, r"pixels is U8 \[5, 4\]"),
        ({"shape": (4, 4, 2)}, r"pixels is U8 \[5, 4, 4, 2\]"),
    ],
)
def test_tensors_that_are_refused(tmp_path, change, message):
    with pytest.raises(SourceError, match=message):
        find_images(_tensors(tmp_path / "x.safetensors", **change))


def test_tensors_with_other_labels_or_none_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"pixels": torch.zeros(3, 4, 4).byte(), "labels": torch.zeros(2).long()}, path)
    with pytest.raises(SourceError, match=r"labels is I64 \[2\], needed: U8 or I64 \[3\]"):
        find_images(path)
    save_file({"images": torch.zeros(3, 4, 4).byte()}, path)
    with pytest.raises(SourceError, match="has no tensor 'pixels'"):
        find_images(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SourceError):
        find_images(path)


def test_what_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no such folder or file of images"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no images"):
        find_images(tmp_path)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(SourceError, match="neither a folder nor a safetensors file"):
        find_images(tmp_path / "x.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o000)
    try:
        with pytest.raises(SourceError, match="cannot be read: Permission denied"):
            find_images(folder)
    finally:
        folder.chmod(0o700)


def test_a_fingerprint_is_of_contents_and_labels(tmp_path):
    for name in ("one", "two"):
        _image(tmp_path / name / "cat" / "a.png", grey=7)
    one, two = (find_images(tmp_path / name).fingerprint() for name in ("one", "two"))
    assert one == two and len(one) == 64
    _image(tmp_path / "two" / "cat" / "a.png", grey=8)
    assert find_images(tmp_path / "two").fingerprint() != one
    (tmp_path / "one" / "cat").rename(tmp_path / "one" / "dog")
    assert find_images(tmp_path / "one").fingerprint() != one


def test_a_missing_file_of_a_table_counts_as_itself(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,cat\n")
    missing = find_images(tmp_path).fingerprint()
    _image(tmp_path / "a.png")
    assert find_images(tmp_path).fingerprint() != missing


def test_large_folders_count_by_sizes_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.calibration.fingerprints.HASHED_BYTES", 1)
    path = _image(tmp_path / "cat" / "a.png")
    before = find_images(tmp_path).fingerprint()
    assert find_images(tmp_path).fingerprint() == before
    os.utime(path, (1, 1))
    assert find_images(tmp_path).fingerprint() != before


@pytest.mark.parametrize(("images", "held_out"), [(2, 1), (9, 1), (10, 2), (1000, 200)])
def test_a_fifth_is_held_out(images, held_out):
    assert held_out_count(images) == held_out


def test_looking_needs_no_torch():
    modules = "compress.calibration.image_files, compress.fitting_images"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
