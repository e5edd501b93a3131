"""Bytes of another kind of number: the header says so, and nothing reads them as something else."""

from __future__ import annotations

import json
import struct

import compress
import pytest
import torch
from compress.errors import SourceError
from compress.exporters.formats import write
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.load import read_checkpoint
from safetensors.torch import load_file, save_file

DIT, VIT, SWIN = "DiTTransformer2DModel", "ViTForImageClassification", "SwinForImageClassification"
OF_FOUR_BYTES = ("I32", "U32")


def retyped(folder, name, dtype):
    """Let the header of a folder's file say another dtype of the same size; the bytes stay."""
    path = next(folder.glob("*.safetensors"))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[name]["dtype"] = dtype
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path.name


def stock(class_name):
    import diffusers
    import transformers

    library = diffusers if class_name == DIT else transformers
    return getattr(library, class_name).from_pretrained


def ours(folder):
    return read_checkpoint(folder)[0]


@pytest.fixture
def written(tmp_path):
    def write_to(model, format="compress"):
        out = tmp_path / "out"
        out.mkdir()
        write(model, out, format)
        return out

    return write_to


def refuses(load, folder, message):
    with pytest.raises(SourceError, match=message) as raised:
        load(folder)
    assert ".safetensors" in str(raised.value)


@pytest.mark.parametrize("dtype", OF_FOUR_BYTES)
def test_a_cut_diffusion_model(make_tiny, open_cut, written, dtype):
    out = written(open_cut(make_tiny(), [(3, 12, 100), (2, 16, 256)]))
    retyped(out, "proj_out_2.bias", dtype)
    for load in (compress.load, ours, stock(DIT)):
        refuses(load, out, f"tensor proj_out_2.bias is stored as {dtype}; the model needs F32 or F16 or BF16")


def test_a_cut_classifier(make_vit, open_cut, written):
    out = written(open_cut(make_vit(VIT), [(3, 12, 96), (2, 16, 60)]))
    retyped(out, "vit.layernorm.weight", "I32")
    for load in (compress.load, ours, stock(VIT)):
        refuses(load, out, "vit.layernorm.weight is stored as I32")


@pytest.mark.parametrize("kind", ["quantized", "shared", "dequantized"])
def test_a_quantized_diffusion_model(make_tiny, open_quantized, written, kind):
    scheme = {"*.attn1.*": {"bits": 4, "symmetric": False, "activation": {"bits": 8}}}
    out = written(open_quantized(make_tiny(), scheme), "dequantized" if kind == "dequantized" else "compress")
    shared = json.loads((out / "compress.json").read_text())["shared"]
    name = next(iter(shared.values())) if kind == "shared" else "proj_out_2.weight"
    retyped(out, name, "I32")
    loads = (compress.load, ours) if kind == "dequantized" else (compress.load, ours, stock(DIT))
    for load in loads:
        refuses(load, out, f"{name.rpartition('.')[0]}.* is stored as I32")


@pytest.mark.parametrize("format", ["torchao", "sdnq"])
def test_the_dense_layers_of_another_librarys_format(make_tiny, open_quantized, written, format):
    bits = {"bits": 8, "activation": {"bits": 8}} if format == "torchao" else {"bits": 8}
    out = written(open_quantized(make_tiny(), {"*.attn1.*": bits}), format)
    retyped(out, "transformer_blocks.1.ff.net.2.weight", "I32")
    refuses(compress.load, out, "ff.net.2.weight is stored as I32")


@pytest.mark.parametrize("class_name", [DIT, SWIN])
def test_a_dense_stock_folder(make_tiny, make_vit, class_name):
    folder = make_tiny() if class_name == DIT else make_vit(SWIN)
    name = "proj_out_2.bias" if class_name == DIT else "swin.layernorm.bias"
    retyped(folder, name, "I32")
    for load in (compress.load, ours):
        refuses(load, folder, f"{name} is stored as I32")
    with pytest.raises(SourceError, match="not as a floating-point number"):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_float_that_no_model_computes_with(make_tiny, dtype):
    folder = make_tiny()
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["proj_out_2.bias"] = tensors["proj_out_2.bias"].to(dtype)
    save_file(tensors, path)
    with pytest.raises(SourceError, match=r"proj_out_2\.bias is stored as F") as raised:
        compress.load(folder)
    assert ("convert it to float32" in str(raised.value.hint)) == (dtype == torch.float64)


def test_a_module_without_floats_wants_its_own_type(tmp_path):
    from compress.runtime.headers import read_header
    from compress.runtime.stored_tensors import check_tensors
    from torch import nn

    module = nn.Module()
    module.register_buffer("index", torch.zeros(4, dtype=torch.int64))
    for dtype, good in ((torch.int64, True), (torch.float64, False), (torch.uint64, False)):
        save_file({"index": torch.zeros(4, dtype=dtype)}, tmp_path / "t.safetensors")
        tensors = read_header(tmp_path / "t.safetensors")[0]
        if good:
            check_tensors(module, tensors)
        else:
            with pytest.raises(SourceError, match="the model needs I64"):
                check_tensors(module, tensors)
