"""Headers of safetensors files: what is well formed, and every way to lie in them."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from compress.errors import SourceError
from compress.models.headers import merge_headers, read_header
from safetensors.numpy import save_file


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        "a.weight": np.ones((3, 4), np.float32),
        "b": np.zeros((0, 7), np.float16),
        "c": np.int8([1, 2, 3]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    headers = read_header(tmp_path / "x.safetensors")
    assert {name: (header.dtype, header.shape) for name, header in headers.items()} == {
        "a.weight": ("F32", (3, 4)),
        "b": ("F16", (0, 7)),
        "c": ("I8", (3,)),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    header = headers["a.weight"]
    assert np.array_equal(np.frombuffer(data[header.start : header.end], np.float32), np.ones(12))
    assert header.bytes == 48


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": entry()}, b"\0" * 4, None, "tensor 'a': truncated"),
        ({"a": entry()}, b"\0" * 8, 2**62, "claims 4611686018427387904 bytes"),
        ({"a": entry()}, b"\0" * 8, 10**6, "truncated: the header claims 1000000 bytes"),
        ({"a": entry(shape=(2**60,), end=2**62)}, b"\0" * 8, None, "is not a list of sizes"),
        ({"a": entry(shape=(2**47, 2**47), end=8)}, b"\0" * 8, None, "takes"),
        ({"a": entry(shape=(2,), end=2**40)}, b"\0" * 8, None, "truncated"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, None, "is not a list of sizes"),
        ({"a": entry(shape=(True, 2))}, b"\0" * 8, None, "is not a list of sizes"),
        ({"a": entry(begin=8, end=0)}, b"\0" * 8, None, "truncated"),
        ({"a": entry(begin=-8, end=0)}, b"\0" * 8, None, "not two positions"),
        ({"a": entry(dtype="F33")}, b"\0" * 8, None, "dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 8, None, "dtype"),
        ({"a": entry(shape=(3,))}, b"\0" * 8, None, "takes 12 bytes, its data_offsets hold 8"),
        ({"a": entry(), "b": entry()}, b"\0" * 8, None, "'b' overlaps the tensor before it"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, b"\0" * 20, None, "'b' leaves a gap"),
        ({"a": entry()}, b"\0" * 9, None, "1 bytes after the last tensor"),
        ({"a": 3}, b"", None, "lacks dtype"),
        ([1], b"", None, "not a JSON object"),
        (b"{", b"", None, "not JSON"),
        (b"\xff\xfe", b"", None, "not JSON"),
        (b"[" * 100_000, b"", None, "not JSON"),
        (b'{"a": 1, "a": 2}', b"", None, "'a' stands twice"),
    ],
)
def test_lies_are_refused(tmp_path, header, data, length, message):
    path = write(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(SourceError) as caught:
        read_header(path)
    assert message in caught.value.message
    assert "bad.safetensors" in caught.value.message


@pytest.mark.parametrize("size", [0, 5])
def test_files_too_short_for_a_header(tmp_path, size):
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\0" * size)
    with pytest.raises(SourceError, match="truncated"):
        read_header(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_a_tensor_in_two_shards(tmp_path):
    for name in ("one", "two"):
        save_file(
            {"a": np.ones(2, np.float32), name: np.ones(1, np.float32)}, tmp_path / f"{name}.safetensors"
        )
    with pytest.raises(SourceError, match=r"two\.safetensors: tensor 'a' is also in one\.safetensors"):
        merge_headers([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(3, np.float32), "b": np.ones(2, np.int8)}, path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(SourceError):
            read_header(path)
