"""Decoding of files that anyone may have written."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from compress.calibration import decoding
from compress.calibration.decoding import ImageHead, Unreadable, check_header, decode, decode_stream, head_of
from PIL import Image


def _gradient(width=8, height=5):
    red = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    return np.stack([red, 2 * red, 255 - red], axis=-1)


def test_colours_and_greys(tmp_path):
    pixels = _gradient()
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    assert np.array_equal(decode(path, 3), pixels.transpose(2, 0, 1))
    grey = decode(path, 1)
    assert grey.shape == (1, 5, 8) and grey.dtype == np.uint8
    assert np.array_equal(grey[0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_grey_files_and_files_with_alpha_become_colours(tmp_path):
    Image.fromarray(_gradient()[..., 0]).save(tmp_path / "grey.png")
    found = decode(tmp_path / "grey.png", 3)
    assert found.shape == (3, 5, 8) and np.array_equal(found[0], found[2])
    Image.fromarray(_gradient()).convert("RGBA").save(tmp_path / "alpha.png")
    assert np.array_equal(decode(tmp_path / "alpha.png", 3), _gradient().transpose(2, 0, 1))


def test_an_image_stands_upright_as_its_camera_says(tmp_path):
    image = Image.fromarray(_gradient())
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png", 3).shape == (3, 8, 5)


@pytest.mark.parametrize("orientation", range(10))
def test_a_head_says_what_will_be_decoded(tmp_path, orientation):
    """Orientations 5 to 8 lie on their side; 0 and 9 are none."""
    image = Image.fromarray(_gradient())
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    with path.open("rb") as stream:
        head = head_of(stream, "a")
        stream.seek(0)
        pixels = decode_stream(stream, "a")
    assert head.size == pixels.shape[:2] and head.stored == (5, 8)
    assert head.turned == (not np.array_equal(pixels, _gradient())) == (1 < orientation < 9)
    assert np.array_equal(pixels.transpose(2, 0, 1), decode(path, 3))


def test_streams_of_grey_and_damaged_images(tmp_path):
    Image.fromarray(_gradient()[..., 0]).save(tmp_path / "grey.png")
    data = (tmp_path / "grey.png").read_bytes()
    found = decode_stream(io.BytesIO(data), "grey")
    assert found.shape == (5, 8, 3) and np.array_equal(found[..., 0], found[..., 2])
    assert head_of(io.BytesIO(data), "grey") == ImageHead((5, 8), (5, 8), False)
    for read in (head_of, decode_stream):
        with pytest.raises(Unreadable, match="a thing: not an image"):
            read(io.BytesIO(b"no image"), "a thing")


def test_real_photographs(shared_data):
    for path in sorted((shared_data / "data" / "images").glob("*.[pj][np]g")):
        check_header(path)
        for channels in (1, 3):
            found = decode(path, channels)
            assert found.dtype == np.uint8 and len(found) == channels and found.std() > 10


@pytest.mark.parametrize("size", [0, 10, 400])
def test_damaged_files(tmp_path, size):
    path = tmp_path / "a.jpg"
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:size] if size else b"")
    with pytest.raises(Unreadable, match=r"a\.jpg"):
        decode(path, 3)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(Unreadable, match="cannot be read"):
        check_header(tmp_path / "a.png")


def _png_header(path, width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (60_000, 60_000, "cannot be read|at most"),
        (10_000, 9_000, "10000 x 9000 pixels; at most"),
        (3300, 100, "more than 32 times"),
    ],
)
def test_images_that_claim_too_much_are_refused_before_they_are_decoded(
    tmp_path, monkeypatch, width, height, message
):
    path = tmp_path / "bomb.png"
    _png_header(path, width, height)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("was decoded"))
    for look in (check_header, lambda path: decode(path, 3)):
        with pytest.raises(Unreadable, match=message):
            look(path)


def test_deep_images_are_not_clipped_in_silence(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(Unreadable, match="more than eight bits"):
        decode(tmp_path / "deep.png", 1)


def test_other_kinds_of_files_are_not_opened(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(Unreadable, match="not an image that is read"):
        decode(path, 3)
    assert "EPS" not in decoding.FORMATS
