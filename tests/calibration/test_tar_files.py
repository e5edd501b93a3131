"""Archives are read in place: what is found in them, and archives that claim what is not so."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
from compress.calibration import tar_files
from compress.calibration.tar_files import tar_parts
from compress.errors import SourceError
from PIL import Image

from ..tiny_scenes import drawn, write_scenes, write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def _pack(path, members, kind=tarfile.PAX_FORMAT):
    """Write (name or header, bytes) pairs."""
    with tarfile.open(path, "w:", format=kind) as archive:
        for name, data in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def _special(name, kind, link=""):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_read_where_they_are(tmp_path, kind):
    long = "/".join(["a" * 60] * 3) + ".jpg"  # more than a plain header has room for
    contents = {"b/x.jpg": b"1" * 700, "a.json": b"{}", "empty.jpg": b""}
    if kind != tarfile.USTAR_FORMAT:
        contents[long] = b"long"
    path = _pack(tmp_path / "x.tar", contents.items(), kind)
    parts = tar_parts(path)
    assert [part.name for part in parts] == sorted(contents)
    for part in parts:
        assert part.read(1000) == contents[part.name] and part.size == len(contents[part.name])
        assert (part.read(10) is None) == (len(contents[part.name]) > 10)
    assert sorted(tmp_path.iterdir()) == [path], "nothing is unpacked"


@pytest.mark.parametrize(
    ("suffix", "options"), [(".png", {}), (".tif", {"compression": "tiff_lzw"}), (".jpg", {"quality": 90})]
)
def test_a_stretch_behaves_as_a_file_of_its_own(tmp_path, suffix, options):
    file = tmp_path / f"a{suffix}"
    Image.fromarray(drawn(1)[0][0]).save(file, **options)
    whole = file.read_bytes()
    part, other = tar_parts(_pack(tmp_path / "x.tar", [("z", b"0" * 99), (file.name, whole)]))
    with part.open() as stream:
        assert np.array_equal(np.asarray(Image.open(stream)), np.asarray(Image.open(file)))
    with part.open() as stream:
        assert stream.seek(-5, io.SEEK_END) == len(whole) - 5 and stream.read() == whole[-5:]
        assert stream.seek(3) == 3 and stream.read(4) == whole[3:7] and stream.read(0) == b""
    assert part.sha256() == hashlib.sha256(whole).hexdigest() and other.sha256() != part.sha256()


def test_what_is_no_plain_file_is_left_out(tmp_path):
    members = [
        (_special("folder", tarfile.DIRTYPE), b""),
        (_special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (_special("hard.jpg", tarfile.LNKTYPE, "a.jpg"), b""),
        (_special("pipe.jpg", tarfile.FIFOTYPE), b""),
        (_special("disk.jpg", tarfile.BLKTYPE), b""),
        ("./a.jpg", b"1"),
    ]
    assert [part.name for part in tar_parts(_pack(tmp_path / "x.tar", members))] == ["a.jpg"]


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "b/../../a.jpg", "b\\a.jpg", "b/.."])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(SourceError, match=r"x\.tar: the name .* leads out"):
        tar_parts(_pack(tmp_path / "x.tar", [(name, b"1")]))


def test_names_that_stand_twice_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"holds a\.jpg twice"):
        tar_parts(_pack(tmp_path / "x.tar", [("a.jpg", b"1"), ("./a.jpg", b"2")]))


def test_compressed_archives_are_refused_with_what_to_do(tmp_path):
    plain = write_tar(write_scenes(tmp_path / "s", 1), tmp_path / "x.tar")
    packed = tmp_path / "y.tar"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(SourceError, match=r"y\.tar: is compressed \(gzip\)") as found:
        tar_parts(packed)
    assert "decompress it" in str(found.value.hint)


@pytest.mark.parametrize("data", [b"", b"no archive", b"\0" * 100, b"x" * 2000])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(SourceError, match=r"x\.tar: cannot be read as a tar archive"):
        tar_parts(tmp_path / "x.tar")


def test_an_archive_that_was_cut_off_is_refused(tmp_path):
    path = write_tar(write_scenes(tmp_path / "s", 3), tmp_path / "x.tar")
    last = tar_parts(path)[-1]
    whole = path.read_bytes()
    between = last.start - 512  # where the entry before ends
    end = last.start + -(-last.size // 512) * 512
    for length in (end, last.start + 1, last.start - 100, between):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match="cannot be read as a tar archive"):
            tar_parts(path)


def test_a_member_that_claims_to_be_larger_than_the_archive_is_refused(tmp_path):
    header = tarfile.TarInfo("a.jpg")
    header.size = 2**40
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"1" * 5000)
    with pytest.raises(SourceError, match="cannot be read as a tar archive"):
        tar_parts(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_name_of_gigabytes_takes_no_memory(tmp_path, kind):
    """The file is sparse: it really has the bytes that its header claims."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 3 * 2**30
    path = tmp_path / "x.tar"
    with path.open("wb") as stream:
        stream.write(header.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(2**32)
    with pytest.raises(SourceError, match="an entry that is no file has more than"):
        tar_parts(path)


def test_endless_archives_are_refused(tmp_path, monkeypatch):
    path = _pack(tmp_path / "x.tar", [(f"{index}.jpg", b"1") for index in range(5)])
    monkeypatch.setattr(tar_files, "MAX_MEMBERS", 5)
    with pytest.raises(SourceError, match="more than 5 entries"):
        tar_parts(path)
    monkeypatch.setattr(tar_files, "MAX_MEMBERS", 6)
    assert len(tar_parts(path)) == 5


def test_many_entries_are_read(tmp_path):
    """Their headers together are more than one header may be; those of SA-1B have 22,000."""
    path = _pack(tmp_path / "x.tar", [(f"{index}.jpg", b"1") for index in range(2100)])
    assert len(tar_parts(path)) == 2100


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_archives_are_refused_or_read_and_nothing_else(tmp_path, kind):
    """Random changes of headers: parts within the file, or the one error; and it ends."""
    generator = np.random.default_rng(3)
    members = [(f"{'n' * index * 30}{index}.jpg", bytes([index]) * 600 * index) for index in range(5)]
    members = members[:3] if kind == tarfile.USTAR_FORMAT else members
    whole = _pack(tmp_path / "whole.tar", members, kind).read_bytes()
    headers = [part.start - 512 for part in tar_parts(tmp_path / "whole.tar")]
    path, refused = tmp_path / "x.tar", 0
    for _ in range(300):
        data = bytearray(whole)
        start = int(generator.choice(headers))
        for _ in range(generator.integers(1, 4)):
            data[start + int(generator.integers(0, 512))] = int(generator.integers(0, 256))
        if generator.random() < 0.7:  # with a sum that fits, so that the change is believed
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        path.write_bytes(data)
        try:
            parts = tar_parts(path)
        except SourceError:
            refused += 1
            continue
        for part in parts:
            assert part.start >= 0 and part.start + (part.length or 0) <= len(data)
            assert part.read(2**20) == data[part.start : part.start + (part.length or 0)]
    assert refused > 20
