"""Recorded calls come back as they were, and constants are stored once."""

import pytest
import torch
from compress.evaluation.call_store import CallReader, CallWriter, take, to_device


def _call(step, text):
    return {
        "hidden_states": torch.full((2, 1, 4, 4), float(step)),
        "timestep": torch.tensor([step, step]),
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"resolution": torch.ones(2, 2), "aspect_ratio": None},
        "sizes": [3, "x", True],
    }


def test_calls_come_back(tmp_path):
    text = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    writer = CallWriter(tmp_path / "calls")
    for step in (9, 5, 1):
        writer.add(_call(step, text), torch.full((2, 1, 4, 4), -float(step)))
    reader = CallReader(tmp_path / "calls")
    assert len(reader) == 3
    for step, (kwargs, output) in zip((9, 5, 1), reader, strict=True):
        expected = _call(step, text)
        assert set(kwargs) == set(expected)
        assert torch.equal(kwargs["hidden_states"], expected["hidden_states"])
        assert torch.equal(kwargs["encoder_hidden_states"], text)
        assert kwargs["encoder_hidden_states"].dtype == torch.bfloat16
        assert kwargs["added_cond_kwargs"]["aspect_ratio"] is None
        assert torch.equal(kwargs["added_cond_kwargs"]["resolution"], torch.ones(2, 2))
        assert kwargs["sizes"] == [3, "x", True]
        assert torch.equal(output, torch.full((2, 1, 4, 4), -float(step)))


def test_a_constant_tensor_is_stored_once(tmp_path):
    text = torch.randn(2, 300, 64)
    writer = CallWriter(tmp_path)
    for step in range(5):
        writer.add(_call(step, text), torch.zeros(1))
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert sizes[0] > text.numel() * 4
    assert all(size < text.numel() for size in sizes[1:])


def test_what_cannot_be_recorded_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"kwargs\.callback"):
        CallWriter(tmp_path).add({"callback": print}, torch.zeros(1))


def test_take_cuts_the_batch_only():
    kwargs = {"a": torch.arange(4), "b": {"c": torch.arange(8).view(4, 2)}, "d": torch.arange(3), "e": None}
    cut = take(kwargs, 4, torch.tensor([0, 2]))
    assert cut["a"].tolist() == [0, 2]
    assert cut["b"]["c"].tolist() == [[0, 1], [4, 5]]
    assert cut["d"].tolist() == [0, 1, 2]
    assert to_device(cut, torch.device("cpu"))["e"] is None
