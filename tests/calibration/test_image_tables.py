"""metadata.csv and metadata.jsonl: what is refused, and with which line."""

from __future__ import annotations

import json
import os

import pytest
from compress.calibration.image_files import find_images
from compress.errors import SourceError

from .image_folders import write_images


def _refused(folder, name, text, message):
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(data)
    with pytest.raises(SourceError, match=message) as found:
        find_images(folder)
    return found.value


@pytest.mark.parametrize("again", ["0.png", "./0.png", "x/./../x/0.png", "link.png", "folder/0.png"])
def test_a_file_named_twice(tmp_path, again):
    write_images(tmp_path, ["0.png", "1.png"])
    (tmp_path / "link.png").symlink_to("0.png")
    (tmp_path / "folder").symlink_to(".")
    message = (
        "leads out" if ".." in again else rf"metadata\.csv: line 4 names '{again}', which line 2 has as '0"
    )
    _refused(tmp_path, "metadata.csv", f"file_name,label\n0.png,cat\n1.png,dog\n{again},dog\n", message)


def test_missing_files_are_named_once_as_well(tmp_path):
    rows = [{"file_name": name, "label": "cat"} for name in ("a.png", "b.png", "./a.png")]
    text = "\n".join(map(json.dumps, rows))
    _refused(tmp_path, "metadata.jsonl", text, r"metadata\.jsonl: line 3 names '\./a\.png', which line 1 has")


def test_links_into_a_store_of_contents_are_files_of_their_own(tmp_path):
    """So a download keeps files: equal ones are one blob, outside the folder."""
    write_images(tmp_path / "blobs", ["0.png", "1.png"])
    root = tmp_path / "snapshot"
    root.mkdir()
    for name, blob in (("a.png", "0.png"), ("b.png", "0.png"), ("c.png", "1.png")):
        (root / name).symlink_to(f"../blobs/{blob}")
    (root / "metadata.csv").write_text("file_name,label\na.png,cat\nb.png,cat\nc.png,dog\n")
    assert len(find_images(root).train) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name;label\na.png;cat\n", "line 1 names the columns 'file_name;label'"),
        ("file_name\tlabel\na.png\tcat\n", "line 1 names the columns 'file_name"),
        ("file_name,label,label\na.png,cat,dog\n", "one of them twice"),
        ("file_name,label\na.png,cat\n\nb.png,tench, Tinca tinca\n", "line 4 has 3 cells for 2 columns"),
        ('file_name,label\n"a\n.png",cat\nb.png\n', "line 4 has 1 cell for 2 columns"),
        ("file_name,label\na.png\nb.png\n", "line 2 has 1 cell for 2 columns"),
        ("file_name,label\na.png,\nb.png,cat\n", "line 2 has no label"),
        ('file_name,label\na.png,cat\n"b.png,dog\n', "line 3: unexpected end of data"),
        ("file_name,label\n,cat\n", "line 2 has no file_name"),
        ("file_name,label\na.png,c\0t\n", "line 2 has a NUL byte"),
        (b"file_name,label\na.png,cat\n\xff.png,cat\n", "line 3 is no UTF-8 text"),
        ("file_name,label\na.png,cat\n" + "x" * 140_000 + ",cat\n", "line 3: field larger than"),
        ("file_name\n.\n", "line 2: '.' is no name of a file"),
    ],
)
def test_what_a_csv_may_not_hold(tmp_path, text, message):
    _refused(tmp_path, "metadata.csv", text, rf"metadata\.csv: .*{message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"file_name": "a.png", "label": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"file_name": "a\\u0000.png"}', "is no name of a file"),
        ('{"file_name": "a\\ud800.png"}', "is no name of a file"),
        ('{"file": "a.png"}', r"has no file_name \('file'\)"),
        ('{"file_name": "\0"}', "has a NUL byte"),
    ],
)
def test_what_a_line_of_json_may_not_hold(tmp_path, line, message):
    _refused(tmp_path, "metadata.jsonl", f'{{"file_name": "0.png"}}\n{line}\n', rf"jsonl: line 2.*{message}")


@pytest.mark.parametrize(
    ("name", "text", "lack"),
    [
        (
            "metadata.csv", "text,file_name\na red cat,a.png\n",
            "metadata.csv: its header names the columns 'file_name', 'text', and no 'label'",
        ),
        (
            "metadata.jsonl", '{"file_name": "b.png"}\n{"file_name": "a.png", "class": 1}\n',
            "metadata.jsonl: its lines have the keys 'file_name', 'class', and no 'label'",
        ),
        ("metadata.csv", "file_name\na.png\n", ""),
        ("metadata.jsonl", '{"file_name": "a.png", "label": null, "text": "cat"}\n', ""),
        ("metadata.csv", "file_name,text,label\na.png,a red cat,cat\n", ""),
    ],
)  # fmt: skip
def test_other_columns_are_no_labels_and_are_named(tmp_path, name, text, lack):
    (tmp_path / name).write_text(text)
    found = find_images(tmp_path).train
    assert found.lack == lack
    assert found.labels == (("cat",) if "label\n" in text else None)


def test_columns_beside_the_label_are_left_alone(tmp_path):
    (tmp_path / "metadata.csv").write_text("width,label,file_name\n8,cat,a.png\n")
    assert find_images(tmp_path).train.labels == ("cat",)


@pytest.mark.parametrize("name", ["metadata.csv", "train.safetensors"])
def test_a_pipe_is_no_table(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match="no regular file|neither a folder nor"):
        find_images(tmp_path)
