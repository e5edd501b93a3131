"""An adapter as a result: planned as written, verified in a fresh process, compared, inspected, described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import compress
import pytest
import torch
from compress.errors import PlanError, SourceError
from compress.exporters.card_metadata import metadata
from compress.exporters.card_subject import Subject
from compress.exporters.folder_comparison import compare_folders
from compress.exporters.formats import predict_bytes, predict_tensor_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.inspection import inspect
from compress.exporters.verify import FolderError, verify_folder
from compress.models.base import OpenModel
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.hashes import file_sha256
from compress.runtime.manifest import HistoryEntry
from safetensors.torch import load_file, save_file

from ..tiny_cache import decoded, quantize_linears, save_llama, with_cache

FACTOR = "model.layers.1.self_attn.cskv.k_b.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[OpenModel, Path]:
    place = tmp_path_factory.mktemp("adapter")
    model = with_cache(save_llama(place / "model"))
    model.history.append(
        HistoryEntry(method="cskv", settings={"window": 4}, seed=3, input_hash="x", versions={"torch": "2"})
    )
    (place / "out").mkdir()
    write(model, place / "out", "compress", kv_cache="adapter", max_shard_size=1000)
    return model, place / "out"


def _copy(made: tuple[OpenModel, Path], place: Path) -> Path:
    return shutil.copytree(made[1], place / "copy")


def _corrupt(folder: Path) -> Path:
    """Change a number, and the hash with it, so that it is found by computing alone."""
    path = folder / "cskv.safetensors"
    tensors = load_file(path)
    tensors[FACTOR][0, 0] += 0.5
    save_file(tensors, path, {"format": "pt"})
    document = json.loads((folder / "cskv.json").read_text())
    document["factors_sha256"] = file_sha256(path)
    (folder / "cskv.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_predicts_what_is_written(tmp_path, dtype):
    model = with_cache(save_llama(tmp_path / "model", dtype))
    (tmp_path / "out").mkdir()
    info = write(model, tmp_path / "out", "compress", kv_cache="adapter")
    spec = model.spec.with_kv_cache(model.kv_cache)
    assert predict_bytes(spec, "compress", kv_cache="adapter") == info.bytes
    assert (tmp_path / "out" / "cskv.safetensors").stat().st_size == info.bytes
    stored = load_file(tmp_path / "out" / "cskv.safetensors")
    factors = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert info.tensor_bytes == predict_tensor_bytes(spec, "compress", kv_cache="adapter")
    assert info.tensor_bytes == model.spec.size().bytes + factors
    assert info.files == ["cskv.json", "cskv.safetensors"] and info.loads_with == ["compress.load(path)"]


def test_a_fresh_process_decodes_the_same_bits(made):
    model, folder = made
    found = verify_export(model, folder, seed=1, progress=SilentProgress())
    assert found.failure is None and found.verified and found.max_abs_error == 0.0
    assert found.loads_with == ["compress.load(path)"]
    assert any("decodes 8 tokens through the compressed cache" in note for note in found.notes)


def test_a_factor_that_was_changed_is_found_out(made, tmp_path):
    folder = _corrupt(_copy(made, tmp_path))
    found = verify_export(made[0], folder, seed=1, progress=SilentProgress())
    assert not found.verified and "decodes through the compressed cache differs" in (found.failure or "")


def test_a_flipped_bit_is_found_without_the_report(made, tmp_path):
    """Where the hashes of the report are those of the damaged file, too."""
    folder = _copy(made, tmp_path)
    assert "8 factors are those of cskv.json (SHA-256)" in _check_of_tensors(folder)
    path = folder / "cskv.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "cskv.safetensors: its bytes are not those" in _check_of_tensors(folder)
    found = verify_export(made[0], folder, seed=1, progress=SilentProgress())
    assert "cskv.safetensors: its bytes are not those" in (found.failure or "")


def _check_of_tensors(folder: Path) -> str:
    with pytest.raises(FolderError) as told:  # it has no report
        verify_folder(folder)
    [detail] = [check["detail"] for check in told.value.result["checks"] if check["name"] == "tensors"]
    return str(detail)


def test_a_copy_is_compared_by_running_both(made, tmp_path):
    _, folder = made
    copy = _copy(made, tmp_path)
    same = compare_folders(folder, copy, progress=SilentProgress())
    assert same.failure is None and same.ways == {"compress": 0.0} and not same.notes
    other = compare_folders(folder, _corrupt(copy), progress=SilentProgress())
    assert "decodes otherwise through the compressed cache" in (other.failure or "")


def test_a_copy_is_not_run_where_the_original_is_gone(made, tmp_path):
    copy, other = _copy(made, tmp_path), shutil.copytree(made[1], tmp_path / "other")
    for folder in (copy, other):
        document = json.loads((folder / "cskv.json").read_text())
        document["base"]["id"] = str(tmp_path / "gone")
        (folder / "cskv.json").write_text(json.dumps(document))
    found = compare_folders(copy, other, progress=SilentProgress())
    assert found.failure is None
    assert "it was not run" in found.notes[0] and "which is not here" in found.notes[0]


def test_it_is_inspected_without_its_original(made, tmp_path):
    model, _ = made
    copy = _copy(made, tmp_path)
    found = inspect(copy)
    assert (found["class"], found["format"], found["dtype"]) == ("LlamaForCausalLM", "adapter", "float32")
    assert found["base"] == {"id": str(model.source.id), "revision": None, "subfolder": None}
    assert found["bytes"] == (copy / "cskv.safetensors").stat().st_size
    assert found["tensor_bytes"] == 4 * found["parameters"] and found["layers"] == []
    assert found["history"][0]["settings"] == {"window": 4}
    cache = found["kv_cache"]
    assert cache["factor_bytes"] == found["tensor_bytes"] and cache["window"] == 4
    assert cache["bytes_per_token"] == {"before": 512.0, "after": 4.0 * (3 + 5 + 4 + 6)}
    assert [layer["rank_k"] for layer in cache["layers"]] == [3, 4]
    assert cache["at_context"] is None and cache["break_even_tokens_one"] > cache["break_even_tokens"]
    (copy / "cskv.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"cskv\.safetensors: truncated"):
        inspect(copy)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"tokens": 9, "before": 8, "after": 7, "with_factors": 10, "x": 1}, True),
        ({"tokens": 9, "before": "8", "after": 7, "with_factors": 10}, False),
        ({"tokens": 0, "before": 8, "after": 7, "with_factors": 10}, False),
        ({"tokens": 9}, False),
        ([], False),
    ],
)
def test_its_whole_cache_is_what_the_stage_wrote_down(made, tmp_path, told, expected):
    copy = _copy(made, tmp_path)
    document = json.loads((copy / "cskv.json").read_text())
    document["history"][0]["details"] = {"kv_cache": {"at_context": told}}
    (copy / "cskv.json").write_text(json.dumps(document))
    found = inspect(copy)["kv_cache"]["at_context"]
    numbers = {"tokens": 9, "before": 8, "after": 7, "with_factors": 10}
    assert found == (numbers if expected else None)


def quantized(model: OpenModel) -> None:
    quantize_linears(model)


def uncompressed(model: OpenModel) -> None:
    model.kv_cache = None


def shallower(model: OpenModel) -> None:
    model.config["num_hidden_layers"] = 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantized, "stages changed them"),
        (uncompressed, "not compressed"),
        (shallower, "stages changed them"),
    ],
)
def test_it_goes_with_the_weights_of_the_original_alone(tmp_path, change, words):
    model = with_cache(save_llama(tmp_path / "model"))
    change(model)
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match=f"export.kv_cache: adapter: .*{words}"):
        write(model, tmp_path / "out", "compress", kv_cache="adapter")


def test_a_part_of_a_folder_is_named_as_its_subfolder(tmp_path):
    save_llama(tmp_path / "whole" / "part")
    ref = ModelRef(id=str(tmp_path / "whole"), subfolder="part")
    opened, model = open_model(ref, progress=SilentProgress()), with_cache(tmp_path / "whole" / "part")
    model.source = opened.source
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out", "compress", kv_cache="adapter")
    document = json.loads((tmp_path / "out" / "cskv.json").read_text())
    assert document["base"]["subfolder"] == "part" and document["base"]["id"] == str(tmp_path / "whole")
    assert verify_export(model, tmp_path / "out", seed=1, progress=SilentProgress()).verified
    assert torch.equal(decoded(compress.load(tmp_path / "out")), decoded(model.module))


def _document(**export: str) -> dict:
    return {
        "model": {"id": "org/base", "revision": "a" * 40, "class": "LlamaForCausalLM", "license": "mit"},
        "stages": [{"method": "cskv"}],
        "evaluation": {"metrics": {"bytes": 1}},
        "export": {"format": "compress", "path": "out", **export},
    }


def test_the_hub_learns_that_it_is_an_adapter():
    found = metadata(Subject(_document(kv_cache="adapter")))
    assert found["base_model"] == "org/base" and found["base_model_relation"] == "adapter"
    assert found["library_name"] == "compress" and "cskv" in found["tags"]
    whole = metadata(Subject(_document(kv_cache="checkpoint")))
    assert whole["base_model_relation"] == "finetune" and whole["library_name"] == "transformers"
