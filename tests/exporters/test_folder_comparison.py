"""Two folders run in fresh processes: a copy gives the same bits, another checkpoint is found out."""

from __future__ import annotations

import shutil

import pytest
from compress.exporters import folder_comparison
from compress.exporters.folder_comparison import compare_folders
from compress.exporters.fresh_process import Answer
from compress.progress import SilentProgress
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_a_copy_is_equal_and_a_changed_bias_is_not(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    same = compare_folders(exported, copy, progress=SilentProgress())
    assert same.failure is None
    assert same.ways == {"registered": 0.0, "compress": 0.0}
    tensors = load_file(copy / WEIGHTS)
    tensors["proj_out_2.bias"] += 1
    save_file(tensors, copy / WEIGHTS)
    other = compare_folders(exported, copy, progress=SilentProgress())
    assert "loaded the 'compress' way, its outputs differ from the local folder's by up to 1" in other.failure
    assert "'registered' way" in other.failure


def test_a_format_without_its_package_is_not_run_and_says_so(exported, monkeypatch):
    monkeypatch.setattr(
        folder_comparison, "ask_fresh_process", lambda request, inputs: Answer({}, {}, ["sdnq"])
    )
    comparison = compare_folders(exported, exported, progress=SilentProgress())
    assert comparison.failure is None
    assert comparison.notes == ("its hashes match; it was not run: sdnq is not installed",)


def test_a_copy_that_does_not_load_is_named(exported, monkeypatch):
    import torch

    outputs = dict.fromkeys(["registered", "compress"], torch.ones(2))
    answers = [
        Answer(outputs, {}, []),
        Answer({"compress": torch.ones(3)}, {"registered": "OSError: no"}, []),
    ]
    monkeypatch.setattr(folder_comparison, "ask_fresh_process", lambda request, inputs: answers.pop(0))
    failure = compare_folders(exported, exported, progress=SilentProgress()).failure
    assert "does not load the 'registered' way: OSError: no" in failure
    assert "loaded the 'compress' way, its outputs differ from the local folder's in shape" in failure


def test_a_folder_in_another_format(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    assert "does not open" in compare_folders(exported, copy, progress=SilentProgress()).failure
