"""Bad input is named, quickly, and without torch; good input is found in every layout."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from compress.errors import SourceError
from compress.models import checkpoint as module
from compress.models.checkpoint import hash_files, locate, preflight
from compress.recipes.schema import ModelRef
from compress.runtime.hashes import file_sha256
from safetensors.numpy import load_file, save_file

from ..peaks import PEAK

WEIGHTS = "diffusion_pytorch_model.safetensors"


def ref(path, **more):
    return ModelRef(id=str(path), **more)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, parts=2):
    """Split the weights as save_pretrained does for large models."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for index in range(parts):
        file = f"diffusion_pytorch_model-{index + 1:05d}-of-{parts:05d}.safetensors"
        chosen = names[index::parts]
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / WEIGHTS).unlink()
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def as_pipeline(component, root):
    root.mkdir()
    shutil.copytree(component / "scheduler", root / "scheduler")
    shutil.copytree(component, root / "transformer", ignore=shutil.ignore_patterns("scheduler"))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    return root


# --- what opens ---------------------------------------------------------------------------------


def test_a_component_folder(tiny_dit):
    found = preflight(ref(tiny_dit))
    assert found.class_name == "DiTTransformer2DModel"
    assert found.folder == tiny_dit
    assert found.pipeline is None
    assert found.scheduler == tiny_dit / "scheduler" / "scheduler_config.json"
    assert found.bytes == sum(header.bytes for header in found.headers.values())
    assert hash_files(found) == {WEIGHTS: file_sha256(tiny_dit / WEIGHTS)}


@pytest.mark.parametrize("subfolder", [None, "transformer"])
def test_a_pipeline_folder(tiny_dit, tmp_path, subfolder):
    root = as_pipeline(tiny_dit, tmp_path / "pipeline")
    found = preflight(ref(root, subfolder=subfolder))
    assert found.folder == root / "transformer"
    assert found.pipeline == root
    assert found.scheduler == root / "scheduler" / "scheduler_config.json"


def test_the_transformer_of_a_pipeline_finds_its_scheduler(tiny_dit, tmp_path):
    root = as_pipeline(tiny_dit, tmp_path / "pipeline")
    found = locate(ref(root / "transformer"))
    assert found.pipeline == root
    assert found.scheduler is not None


def test_shards(tiny_dit):
    whole = set(locate(ref(tiny_dit)).headers)
    shard(tiny_dit)
    found = preflight(ref(tiny_dit))
    assert set(found.headers) == whole
    assert len(found.files) == 2


def test_configs_alone_will_do_for_a_plan(tiny_dit):
    (tiny_dit / WEIGHTS).unlink()
    assert locate(ref(tiny_dit), weights=False).headers == {}
    with pytest.raises(SourceError, match="no safetensors weights"):
        locate(ref(tiny_dit))


@pytest.mark.parametrize(
    ("norm_type", "class_name"),
    [("ada_norm_zero", "DiTTransformer2DModel"), ("ada_norm_single", "PixArtTransformer2DModel")],
)
def test_checkpoints_of_the_former_common_class(make_tiny, norm_type, class_name):
    folder = make_tiny(class_name)
    edit_config(folder, _class_name="Transformer2DModel", norm_type=norm_type, num_vector_embeds=None)
    assert locate(ref(folder)).class_name == class_name


def test_other_weight_names(tiny_dit):
    (tiny_dit / WEIGHTS).rename(tiny_dit / "weights.safetensors")
    assert len(locate(ref(tiny_dit)).files) == 1
    shutil.copy(tiny_dit / "weights.safetensors", tiny_dit / "more.safetensors")
    with pytest.raises(SourceError, match="several weight files and no index"):
        locate(ref(tiny_dit))


# --- what is refused ----------------------------------------------------------------------------


def refused(path, message, hint=None, *, full=True, **more):
    started = time.process_time()
    with pytest.raises(SourceError) as caught:
        (preflight if full else locate)(ref(path, **more))
    assert time.process_time() - started < 1
    assert message in caught.value.message, caught.value.message
    if hint:
        assert hint in caught.value.hint
    assert caught.value.exit_code == 4


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing" / "here" / "at-all", "no such folder", "builtin:NAME")
    refused("./dit", "./dit: no such folder")
    refused("dit", "dit: no such folder", "org/name")


def test_a_file_is_no_model(tiny_dit):
    refused(tiny_dit / WEIGHTS, "is a file", "folder")


def test_folder_without_config(tmp_path):
    refused(tmp_path, "no config.json", "component folder")


def test_unknown_builtin():
    refused("builtin:nothing", "no such built-in", "built in:")
    refused("builtin:../dit", "no such built-in")


def test_builtins_are_found(monkeypatch, tiny_dit):
    monkeypatch.setattr(module, "BUILTIN_FOLDER", tiny_dit.parent)
    tiny_dit.rename(tiny_dit.parent / "tiny")
    assert locate(ref("builtin:tiny")).class_name == "DiTTransformer2DModel"


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "nul"])
def test_broken_config(tiny_dit, text):
    (tiny_dit / "config.json").write_text(text)
    refused(tiny_dit, "config.json: not")


def test_unsupported_class(tiny_dit):
    edit_config(tiny_dit, _class_name="AuraFlowTransformer2DModel")
    known = "DiTTransformer2DModel, PixArtTransformer2DModel"
    refused(tiny_dit, "'AuraFlowTransformer2DModel' is not supported", known)
    edit_config(tiny_dit, _class_name=None)
    refused(tiny_dit, "a class that the config does not name")
    edit_config(tiny_dit, _class_name="Transformer2DModel", norm_type="layer_norm")
    refused(tiny_dit, "'Transformer2DModel' is not supported")


@pytest.mark.parametrize("value", [5, [], {"a": 1}, [["DiTTransformer2DModel"]]])
def test_architectures_that_name_nothing(tiny_dit, value):
    edit_config(tiny_dit, _class_name=None, architectures=value)
    refused(tiny_dit, "is not supported")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"sample_size": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"sample_size": "\xff"}', "is not UTF-8"),
        (b'{"x": ' * 400 + b"1" + b"}" * 400, "levels deep"),
    ],
)
def test_json_that_only_a_hand_writes(tiny_dit, text, message):
    (tiny_dit / "config.json").write_bytes(text)
    refused(tiny_dit, message)


def test_metadata_that_is_no_object(tiny_dit):
    path = tiny_dit / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = ["x"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(tiny_dit, "__metadata__")


def test_already_quantized(tiny_dit):
    edit_config(tiny_dit, quantization_config={"quant_method": "compress"})
    refused(tiny_dit, "already quantized", "checkpoint it was made from")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "weights.pth"])
@pytest.mark.parametrize("full", [True, False])
def test_pickles_only(tiny_dit, name, full):
    (tiny_dit / WEIGHTS).unlink()
    (tiny_dit / name).write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=rf"{name}: the only weights are pickles"):
        locate(ref(tiny_dit), weights=full)


def test_truncated_weights(tiny_dit):
    data = (tiny_dit / WEIGHTS).read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        (tiny_dit / WEIGHTS).write_bytes(data[:size])
        refused(tiny_dit, "truncated", full=False)


def test_a_header_that_claims_a_huge_tensor(tiny_dit):
    header = {"proj_out_1.weight": {"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 2**43]}}
    text = json.dumps(header).encode()
    (tiny_dit / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    refused(tiny_dit, "tensor 'proj_out_1.weight': truncated")


def test_shapes_that_do_not_fit_the_config(tiny_dit):
    edit_config(tiny_dit, num_embeds_ada_norm=12)
    refused(
        tiny_dit, "class_embedder.embedding_table.weight' has shape [11, 64], the config implies [13, 64]"
    )


def test_missing_tensors(tiny_dit):
    edit_config(tiny_dit, num_layers=3)
    refused(tiny_dit, "more are missing from the weights", "config.json")


def test_unexpected_tensors(tiny_dit):
    edit_config(tiny_dit, num_layers=1)
    refused(tiny_dit, "transformer_blocks.1.", "config.json")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tiny_dit, value):
    tensors = load_file(tiny_dit / WEIGHTS)
    name = "transformer_blocks.1.ff.net.2.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = value
    save_file(tensors, tiny_dit / WEIGHTS)
    refused(tiny_dit, f"tensor '{name}' (F32) holds 1 NaN or Inf")


def test_a_missing_shard(tiny_dit):
    shard(tiny_dit)
    (tiny_dit / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    refused(tiny_dit, "00002-of-00002.safetensors: missing")


def test_an_index_that_lies(tiny_dit):
    index = shard(tiny_dit)
    document = json.loads(index.read_text())
    name = next(iter(document["weight_map"]))
    other = next(file for file in document["weight_map"].values() if file != document["weight_map"][name])
    index.write_text(json.dumps({"weight_map": document["weight_map"] | {name: other}}))
    refused(tiny_dit, f"tensor {name!r} is missing")
    index.write_text(json.dumps({"weight_map": document["weight_map"] | {name: "../../etc/x.safetensors"}}))
    refused(tiny_dit, "is not the name of a safetensors file")
    index.write_text("{}")
    refused(tiny_dit, "no weight_map")


def test_a_subfolder_outside_the_model(tiny_dit):
    refused(tiny_dit, "lies outside the model", subfolder="..")
    refused(tiny_dit, "no config.json", subfolder="unet")


# --- cost ---------------------------------------------------------------------------------------


def fresh(code, *arguments):
    script = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )


def test_a_fresh_process_answers_without_torch(tiny_dit):
    edit_config(tiny_dit, num_embeds_ada_norm=12)
    done = fresh(
        """
        import resource, sys
        from compress.errors import SourceError
        from compress.models.checkpoint import preflight
        from compress.recipes.schema import ModelRef
        try:
            preflight(ModelRef(id=sys.argv[1]))
        except SourceError:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            heavy = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
            print(usage.ru_utime + usage.ru_stime, *heavy)
        """,
        tiny_dit,
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 1.5


def test_the_scan_uses_little_memory(make_tiny):
    folder = make_tiny(num_attention_heads=16, attention_head_dim=64)
    size = os.path.getsize(folder / WEIGHTS)  # noqa: PTH202 (a plain number is all that is wanted)
    done = fresh(
        PEAK
        + """
import sys
from compress.models.checkpoint import locate, scan_finite
from compress.recipes.schema import ModelRef
found = locate(ModelRef(id=sys.argv[1]))
before = peak()
scan_finite(found)
print(peak() - before)
""",
        folder,
    )
    assert size > 100e6
    assert int(done.stdout) < 16e6
