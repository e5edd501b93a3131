"""NaN and Inf in every floating-point type, and in the last element of the last chunk."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from compress.errors import SourceError
from compress.models.headers import read_header
from compress.models.scan import CHUNK_BYTES, count_not_finite, scan_finite
from compress.runtime.hashes import file_sha256
from safetensors.torch import save_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_agrees_with_torch_on_every_pattern(name):
    dtype = DTYPES[name]
    if dtype.itemsize <= 2:
        patterns = np.arange(2 ** (8 * dtype.itemsize), dtype=np.uint8 if dtype.itemsize == 1 else np.uint16)
        values = torch.from_numpy(patterns).view(dtype)
    else:
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(-(2**31), 2**31, (9000,), generator=generator).to(torch.int32).view(dtype)
    expected = int((~values.to(torch.float64).isfinite()).sum())
    assert count_not_finite(raw(values), name) == expected
    limits = torch.finfo(dtype)
    finite = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny], dtype=torch.float64).to(dtype)
    assert count_not_finite(raw(finite), name) == 0


def test_integers_hold_neither():
    assert count_not_finite(b"\xff" * 16, "I8") == 0
    assert count_not_finite(b"", "F32") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, -1])
def test_names_file_and_tensor(tmp_path, dtype, value, position):
    path = tmp_path / "w.safetensors"
    bad = torch.ones(CHUNK_BYTES // dtype.itemsize + 3, dtype=dtype)
    bad[position] = value
    save_file({"fine": torch.ones(5, dtype=dtype), "layer.weight": bad}, path)
    with pytest.raises(SourceError) as caught:
        scan_finite(read_header(path))
    assert str(path) in caught.value.message
    assert "'layer.weight'" in caught.value.message
    assert "1 NaN or Inf" in caught.value.message


def test_finite_weights_pass_and_are_counted(tmp_path):
    path, read = tmp_path / "w.safetensors", []
    save_file({"a": torch.ones(7, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.ones(0)}, path)
    scan_finite(read_header(path), read.append)
    assert sum(read) == 84 + 10


def test_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
