"""The safetensors writer: alignment, order, shards, prediction, a full disk."""

from __future__ import annotations

import errno
import hashlib
import json

import pytest
import torch
from compress.exporters import writer
from compress.exporters.writer import StoredTensor, file_bytes, write_tensors
from compress.runtime.atomic import atomic_folder
from compress.runtime.validate import read_header
from safetensors.torch import load_file


def tensors(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def stored(values):
    return [StoredTensor.of(name, value) for name, value in values.items()]


def test_the_stock_library_reads_it(tmp_path):
    values = tensors(b=(3, 5), a=(16,), c=()) | {
        "i": torch.arange(64, dtype=torch.int8),
        "h": torch.ones(7, dtype=torch.bfloat16),
        "u": torch.zeros(0, 4, dtype=torch.uint8),
    }
    [path] = write_tensors(tmp_path, stored(values), metadata={"format": "pt", "x": "y"})
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert read_header(path)[1] == {"format": "pt", "x": "y"}


def test_tensors_start_on_64_byte_boundaries(tmp_path):
    values = tensors(z=(16,), odd=(5,), m=(32, 4), a=(48,))
    [path] = write_tensors(tmp_path, stored(values))
    entries, _ = read_header(path)
    assert all(entry.start % 64 == 0 for entry in entries.values())
    assert list(entries) == ["a", "m", "z", "odd"]


def test_odd_tensors_are_aligned_to_their_elements(tmp_path):
    values = {
        "bytes": torch.zeros(3, dtype=torch.uint8),
        "halves": torch.zeros(3, dtype=torch.float16),
        "floats": torch.zeros(3),
    }
    [path] = write_tensors(tmp_path, stored(values))
    for name, entry in read_header(path)[0].items():
        assert entry.start % values[name].element_size() == 0


def test_the_hash_of_a_file_is_known_before_it_is_written(tmp_path):
    values = tensors(z=(16,), odd=(5,), m=(32, 4))
    expected = writer.file_sha256(stored(values), metadata={"format": "pt", "x": "y"})
    [path] = write_tensors(tmp_path, stored(values), metadata={"format": "pt", "x": "y"})
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected
    assert writer.file_sha256(stored(values)) != expected


def test_order_does_not_depend_on_the_caller(tmp_path):
    values = tensors(b=(3, 5), a=(16,), c=(64,))
    texts = []
    for order in (sorted(values), sorted(values, reverse=True)):
        folder = tmp_path / "-".join(order)
        folder.mkdir()
        [path] = write_tensors(folder, [StoredTensor.of(name, values[name]) for name in order])
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("limit", [10_000, 300, 1])
def test_shards_and_their_prediction(tmp_path, limit):
    values = tensors(a=(64,), b=(64,), c=(3,), d=(128,))
    paths = write_tensors(tmp_path, stored(values), max_shard_size=limit)
    assert sum(path.stat().st_size for path in paths) == file_bytes(stored(values), max_shard_size=limit)
    if limit == 10_000:
        assert [path.name for path in paths] == ["diffusion_pytorch_model.safetensors"]
        return
    count = len(paths) - 1
    names = [f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [path.name for path in paths] == [*names, "diffusion_pytorch_model.safetensors.index.json"]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    for name, value in values.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], value)


def test_tensors_are_read_one_at_a_time(tmp_path):
    alive = []

    def lazy(name):
        def read():
            alive.append(name)
            return torch.zeros(16)

        return StoredTensor(name, "F32", (16,), read)

    write_tensors(tmp_path, [lazy("b"), lazy("a")])
    assert alive == ["a", "b"]


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def fail(path, chunks):
        path.write_bytes(next(iter(chunks))[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write_synced", fail)
    target = tmp_path / "out"
    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(target) as folder:
        write_tensors(folder, stored(tensors(a=(4,))))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not as announced"):
        write_tensors(tmp_path, [StoredTensor("a", "F32", (4,), lambda: torch.zeros(5))])
    with pytest.raises(ValueError, match="has no data"):
        write_tensors(tmp_path, [StoredTensor("a", "F32", (4,))])
