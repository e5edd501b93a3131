"""`compress.load` and the stock loader: what loads, and what is refused before it is allocated."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time

import compress
import pytest
import torch
from compress.errors import SourceError
from compress.exporters.formats import write
from compress.runtime.load import model_class, read_checkpoint
from compress.runtime.validate import open_folder
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
FIELDS = {
    "*.attn1.*": {"bits": 4, "symmetric": False, "activation": {"bits": 8}},
    "*.ff.net.0.*": {"bits": 3, "activation": {"bits": 8}, "rotation": {"block": 64}},
    "*.ff.net.2": {"bits": 8, "activation": {"bits": 8}, "input_scale": True},
    "*.timestep_embedder.linear_1": {"bits": 6, "group_size": 32},
}
QUERY = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def exported(make_tiny, open_quantized, tmp_path):
    """Return (model in memory, exported folder); bfloat16, with shared copies."""
    model = open_quantized(make_tiny(dtype="bfloat16"), FIELDS)
    out = tmp_path / "out"
    out.mkdir()
    write(model, out, "compress")
    return model, out


def output(module):
    from compress.models.registry import family_for

    inputs = family_for(type(module).__name__).example_inputs(module, 2, torch.Generator().manual_seed(5))
    with torch.no_grad():
        return module(**inputs, return_dict=False)[0]


def edit(folder, change, names=("compress.json", "config.json")):
    """Apply `change(modules, whole)` to the quantization sections of both files."""
    for name in names:
        path = folder / name
        data = json.loads(path.read_text())
        section = data["quantization_config"] if name == "config.json" else data
        change(section["modules"] if name == "config.json" else section["quantization"], section)
        path.write_text(json.dumps(data))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def load_stock(folder, **options):
    import diffusers

    return diffusers.DiTTransformer2DModel.from_pretrained(folder, **options)


def test_resuming_reads_module_and_manifest(exported):
    model, out = exported
    module, manifest = read_checkpoint(out)
    assert manifest.quantization == model.quantization
    assert list(manifest.history) == model.history
    assert torch.equal(output(module), output(model.module))


def test_the_built_in_loads():
    from pathlib import Path

    if not (Path(compress.__file__).parent / "models/builtin/dit" / WEIGHTS).is_file():
        pytest.skip("the built-in's weights are not in this checkout")
    module = compress.load("builtin:dit")
    assert not module.training
    assert next(module.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_keeps_the_packed_tensors(exported, dtype):
    model, out = exported
    original = model.module.state_dict()
    for module in (compress.load(out, dtype=dtype), load_stock(out, torch_dtype=dtype)):
        for name, tensor in module.state_dict().items():
            suffix = name.rpartition(".")[2]
            packed = name.rpartition(".")[0] in model.quantization and suffix != "bias"
            assert tensor.dtype == (original[name].dtype if packed else dtype), name
            assert torch.equal(tensor.float(), original[name].to(tensor.dtype).float()), name
        assert output(module).dtype == dtype


def test_saved_again_it_loads_again(exported, tmp_path):
    model, out = exported
    expected = output(model.module)
    for number, module in enumerate((compress.load(out), load_stock(out))):
        again = tmp_path / f"again{number}"
        module.save_pretrained(again)
        assert open_folder(again).manifest.shared == open_folder(out).manifest.shared
        assert torch.equal(output(compress.load(again)), expected)
        assert torch.equal(output(load_stock(again)), expected)


def test_a_copy_that_was_changed_is_not_lost_when_saved(exported, tmp_path):
    module = compress.load(exported[1])
    copy = next(name for name in open_folder(exported[1]).manifest.shared if name.endswith("linear_2.bias"))
    module.get_parameter(copy).data += 1
    with pytest.raises(SourceError, match="no longer equals"):
        module.save_pretrained(tmp_path / "again")


def test_replaced_layers_are_not_saved_under_the_old_config(exported, tmp_path):
    module = compress.load(exported[1])
    module.transformer_blocks[0].attn1.to_q = torch.nn.Linear(64, 64)
    with pytest.raises(SourceError, match=f"layer {QUERY} is not the one that was loaded"):
        module.save_pretrained(tmp_path / "again")


def test_misaligned_tensors_are_copied(exported):
    model, out = exported
    path = out / WEIGHTS
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    shifted = struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :]
    path.write_bytes(shifted)
    expected = output(model.module)
    for module in (compress.load(out), load_stock(out)):
        layer = module.get_submodule(QUERY)
        assert layer.qweight.data_ptr() % 64 == 0
        assert torch.equal(output(module), expected)


def test_without_us_the_stock_class_stops(exported):
    code = (
        "import sys, diffusers\n"
        "try:\n"
        f"    diffusers.DiTTransformer2DModel.from_pretrained({str(exported[1])!r})\n"
        "except ValueError as error:\n"
        "    assert 'Unknown quantization type' in str(error) and 'compress' not in sys.modules\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compress", "diffusers"])
def test_the_order_of_imports_does_not_matter(exported, first):
    second = {"compress": "diffusers", "diffusers": "compress"}[first]
    code = (
        f"import {first}\n"
        + ("from diffusers import DiTTransformer2DModel\n" if first == "diffusers" else "")
        + f"import {second}\n"
        "import diffusers\n"
        f"diffusers.DiTTransformer2DModel.from_pretrained({str(exported[1])!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_us_stays_light():
    code = "import sys, compress; assert not {'torch', 'diffusers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def too_wide(modules, _):
    modules[QUERY]["shape"] = [64, 128]


def too_many_bits(modules, _):
    modules[QUERY]["bits"] = 8


def huge(modules, _):
    modules[QUERY]["shape"] = [10**18, 64]


def largest_allowed(modules, _):
    modules[QUERY]["shape"] = [2**20, 2**16]


def outside(modules, _):
    modules["../../etc/passwd"] = modules.pop(QUERY)


def other_version(_, section):
    section["version"] = 99


def unknown_key(modules, _):
    modules[QUERY]["exec"] = "x"


def shared_with_nothing(_, section):
    section["shared"]["a.b"] = "c.d"


def another_layer(modules, _):
    modules["transformer_blocks.0.norm9"] = modules[QUERY]


def bits_as_text(modules, _):
    modules[QUERY]["bits"] = "4"


MANIFEST_EDITS = [
    (too_wide, QUERY),
    (too_many_bits, f"{QUERY}.qweight is U8"),
    (huge, "shape"),
    (largest_allowed, f"{QUERY}.qweight"),
    (outside, "etc/passwd|pattern"),
    (other_version, "version 99"),
    (unknown_key, "exec|Extra inputs"),
    (shared_with_nothing, "c.d is missing"),
    (another_layer, "norm9"),
    (bits_as_text, "bits"),
]


@pytest.mark.parametrize(("change", "words"), MANIFEST_EDITS, ids=[e[0].__name__ for e in MANIFEST_EDITS])
def test_an_edited_manifest_is_refused(exported, change, words):
    _, out = exported
    edit(out, change)
    with pytest.raises(SourceError, match=words) as caught:
        compress.load(out)
    assert caught.value.exit_code == 4
    with pytest.raises(SourceError):
        load_stock(out)


def test_files_that_disagree_are_refused(exported):
    _, out = exported
    edit(out, too_wide, names=("compress.json",))
    with pytest.raises(SourceError, match="disagree about layer"):
        compress.load(out)


@pytest.mark.parametrize("change", [huge, largest_allowed, too_wide])
def test_a_refusal_needs_neither_torch_nor_time(exported, change):
    _, out = exported
    edit(out, change)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from compress.errors import SourceError\n"
        "from compress.runtime.validate import open_folder\n"
        "try:\n"
        f"    open_folder(Path({str(out)!r}))\n"
        "except SourceError:\n"
        "    assert 'torch' not in sys.modules\n"
        "    sys.exit(4)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert time.perf_counter() - start < 2.0


def test_a_deleted_sign_vector_is_named(exported):
    _, out = exported
    name = "transformer_blocks.1.ff.net.0.proj.rotation_sign"
    edit_tensors(out, lambda tensors: tensors.pop(name))
    with pytest.raises(SourceError, match=f"{name} is missing"):
        compress.load(out)
    with pytest.raises(SourceError, match=f"{name} is missing"):
        load_stock(out)


def drop_dense(tensors):
    del tensors["proj_out_2.bias"]


def add_stranger(tensors):
    tensors["stranger.weight"] = torch.zeros(4)


def add_to_a_layer(tensors):
    tensors[f"{QUERY}.weight"] = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_dense, "proj_out_2.bias is missing"),
        (add_stranger, "stranger.weight is not"),
        (add_to_a_layer, f"{QUERY}.weight does not belong"),
    ],
)
def test_nothing_is_initialised_or_ignored(exported, change, words):
    _, out = exported
    edit_tensors(out, change)
    with pytest.raises(SourceError, match=words):
        compress.load(out)
    with pytest.raises(SourceError, match=words):
        load_stock(out)


def test_a_dense_tensor_of_another_shape_is_refused(exported):
    _, out = exported
    edit_tensors(out, lambda tensors: tensors.update({"proj_out_2.bias": torch.zeros(5)}))
    for load in (compress.load, load_stock):
        with pytest.raises(SourceError, match=r"proj_out_2.bias has shape \[5\]; the config implies \[32\]"):
            load(out)


def truncate(out):
    path = out / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def header_longer_than_the_file(out):
    path = out / WEIGHTS
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def overlap(out):
    path = out / WEIGHTS
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    first, second = header[names[0]], header[names[1]]
    second.update(dtype=first["dtype"], shape=first["shape"], data_offsets=first["data_offsets"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def many_layers(out):
    config = json.loads((out / "config.json").read_text())
    config["num_layers"] = 10**6
    (out / "config.json").write_text(json.dumps(config))


def huge_sample(out):
    config = json.loads((out / "config.json").read_text())
    config["sample_size"] = 10**9
    (out / "config.json").write_text(json.dumps(config))


def only_pickles(out):
    (out / WEIGHTS).rename(out / "diffusion_pytorch_model.bin")


def index_that_leaves_the_folder(out):
    index = {"weight_map": {"a": "../other.safetensors"}}
    (out / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "truncated: its data ends at byte"),
        (header_longer_than_the_file, "the header claims 4611686018427387904 bytes"),
        (overlap, "overlaps the tensor before it"),
        (many_layers, "num_layers 1000000 with only"),
        (huge_sample, "sample_size 1000000000 is out of range"),
        (only_pickles, "pickled weights"),
        (index_that_leaves_the_folder, "is not the name of a file"),
        (lambda out: (out / "config.json").unlink(), "config.json does not exist"),
        (lambda out: (out / "config.json").write_text("{]"), "not JSON"),
        (lambda out: (out / "compress.json").write_text("[" * 10**5), "not JSON"),
        (lambda out: shutil.rmtree(out), "is not a folder"),
    ],
)
def test_damage_is_named(exported, damage, words):
    _, out = exported
    damage(out)
    with pytest.raises(SourceError, match=words):
        compress.load(out)


def test_a_class_that_diffusers_does_not_have(exported):
    _, out = exported
    config = json.loads((out / "config.json").read_text())
    config["_class_name"] = "os"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="os is not a model of diffusers"):
        compress.load(out)


def foreign(out, **section):
    """Make the folder one of another library, with nothing of ours in it."""
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = section
    (out / "config.json").write_text(json.dumps(config))
    (out / "compress.json").unlink()


def test_a_foreign_format_is_never_read_from_a_pickle(exported, monkeypatch):
    _, out = exported
    foreign(out, quant_method="other")
    seen = {}

    class Stock(model_class(open_folder(out))):
        @classmethod
        def from_pretrained(cls, folder, **options):
            seen.update(options)
            return torch.nn.Identity(), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    monkeypatch.setattr("compress.runtime.load.model_class", lambda stored: Stock)
    compress.load(out)
    assert seen["use_safetensors"] is True


def test_a_foreign_format_that_its_loader_refuses(exported):
    _, out = exported
    foreign(out, quant_method="other")
    with pytest.raises(SourceError, match="the loader of other format refuses it"):
        compress.load(out)


def test_subfolders_stay_inside(exported):
    _, out = exported
    with pytest.raises(SourceError, match="outside"):
        compress.load(out, subfolder="../..")
    shutil.copytree(out, out / "transformer")
    assert compress.load(out, subfolder="transformer").get_submodule(QUERY)
