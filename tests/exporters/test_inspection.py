"""`inspect` describes every format from headers alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from compress.errors import SourceError
from compress.exporters.formats import write
from compress.exporters.inspection import inspect


@pytest.fixture
def exported(make_tiny, open_quantized, schemes, tmp_path):
    def build(name, format):
        model = open_quantized(make_tiny(dtype="bfloat16"), schemes[name])
        out = tmp_path / "out"
        out.mkdir()
        return model, out, write(model, out, format)

    return build


def test_our_format(exported):
    model, out, info = exported("mixed", "compress")
    result = inspect(out)
    assert result["format"] == "compress"
    assert result["bytes"] == info.bytes
    assert result["parameters"] == model.spec.parameters
    assert result["parameters_stored"] == model.spec.parameters_stored
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert set(model.quantization) < set(layers)
    query = layers["transformer_blocks.0.attn1.to_q"]
    assert (query["bits"], query["activation_bits"], query["shape"]) == (4, 8, [64, 64])
    assert (query["dtype"], query["decided_by"]) == ("U8", "*.attn1.*")
    assert query["bytes"] == 64 * 32 + 64 * (4 + 1 + 2)
    copy = layers["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"]
    assert copy["shared_with"] == copy["name"].replace("blocks.1", "blocks.0")
    assert copy["bytes"] == 0
    assert [entry["method"] for entry in result["history"]] == ["test"]


@pytest.mark.parametrize(("name", "format"), [("none", "compress"), ("w4a8", "dequantized")])
def test_dense_formats(exported, name, format):
    model, out, _ = exported(name, format)
    result = inspect(out)
    assert result["format"] == "dense"
    assert result["quantized_bits"] is None
    assert result["parameters"] == model.spec.parameters_stored
    assert {layer["bits"] for layer in result["layers"]} == {16}


def test_torchao_format(exported):
    model, out, _ = exported("torchao", "torchao")
    result = inspect(out)
    assert result["parameters"] == model.spec.parameters_stored
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert layers["transformer_blocks.0.attn1.to_q"]["activation_bits"] == 8
    assert layers["transformer_blocks.0.norm1.linear"]["activation_bits"] is None
    assert result["quantized_bits"] == 8


def test_average_bits(exported):
    model, out, _ = exported("mixed", "compress")
    chosen = [
        scheme
        for name, scheme in model.quantization.items()
        if not ("blocks.1" in name and "timestep" in name)
    ]
    weights = sum(scheme.shape[0] * scheme.shape[1] for scheme in chosen)
    average = sum(scheme.bits * scheme.shape[0] * scheme.shape[1] for scheme in chosen) / weights
    assert inspect(out)["quantized_bits"] == pytest.approx(average, abs=1e-4)


def test_layers_are_in_natural_order(exported):
    _, out, _ = exported("w4a8", "compress")
    names = [layer["name"] for layer in inspect(out)["layers"]]
    blocks = [name for name in names if name.startswith("transformer_blocks.")]
    assert blocks[0].startswith("transformer_blocks.0.")
    assert blocks[-1].startswith("transformer_blocks.1.")


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(SourceError, match=r"config.json does not exist"):
        inspect(tmp_path)
    with pytest.raises(SourceError, match="is not a folder"):
        inspect(tmp_path / "absent")


def test_no_torch(exported):
    _, out, _ = exported("mixed", "compress")
    use = f"from compress.exporters.inspection import inspect; inspect({str(out)!r})"
    code = f"import sys; {use}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
