"""bits.yaml says what the weight files hold, and only where layers differ."""

import json

import pytest
import yaml
from compress.exporters.bits_file import FILE_NAME
from compress.exporters.formats import write
from safetensors import safe_open

MIXED = {
    "*.attn1.to_q": {"bits": 2, "activation": {"bits": 8}},
    "*.attn1.*": {"bits": 4, "activation": {"bits": 8}},
    "*.ff.net.2": {"bits": 3},
    "*.norm1.linear": {"bits": 8},
}


def stored_bits(folder, name, columns):
    """Return the bits of a weight from the shape of its tensor alone."""
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        tensor = file.get_tensor(f"{name}.qweight")
    return 8 * tensor.shape[1] * tensor.element_size() // columns


@pytest.mark.parametrize("format_", ["compress", "sdnq"])
def test_it_lists_the_layers_in_the_order_of_the_model(make_tiny, open_quantized, tmp_path, format_):
    fields = MIXED if format_ == "compress" else {**MIXED, "*.norm1.linear": {"bits": 8, "symmetric": False}}
    model = open_quantized(make_tiny(name="source"), fields)
    (tmp_path / "out").mkdir()
    info = write(model, tmp_path / "out", format_)
    assert FILE_NAME in info.files
    listed = yaml.safe_load((tmp_path / "out" / FILE_NAME).read_text())
    expected = [site.name for site in model.linears() if site.name in model.quantization]
    assert list(listed) == expected
    assert listed["transformer_blocks.0.attn1.to_q"] == {"weight": 2, "activation": 8}
    assert listed["transformer_blocks.1.ff.net.2"] == {"weight": 3}
    assert "transformer_blocks.0.ff.net.0.proj" not in listed


def test_it_equals_manifest_and_shapes(make_tiny, open_quantized, tmp_path):
    model = open_quantized(make_tiny(name="source"), MIXED)
    folder = tmp_path / "out"
    folder.mkdir()
    write(model, folder, "compress")
    listed = yaml.safe_load((folder / FILE_NAME).read_text())
    manifest = json.loads((folder / "compress.json").read_text())["quantization"]
    assert listed.keys() == manifest.keys()
    for name, bits in listed.items():
        assert (
            bits["weight"] == manifest[name]["bits"] == stored_bits(folder, name, manifest[name]["shape"][1])
        )
        activation = manifest[name]["activation"]
        assert bits.get("activation") == (activation and activation["bits"])


def test_layers_that_are_all_alike_need_no_list(make_tiny, open_quantized, tmp_path):
    model = open_quantized(make_tiny(name="source"), {"*.attn1.*": {"bits": 4}})
    (tmp_path / "out").mkdir()
    assert FILE_NAME not in write(model, tmp_path / "out", "compress").files


def test_where_bits_were_chosen_floating_point_may_be_the_only_difference(
    make_tiny, open_quantized, tmp_path
):
    rule = "allocated: mean_bits 10"
    model = open_quantized(make_tiny(name="source"), {"*.attn1.*": {"bits": 8, "decided_by": rule}})
    (tmp_path / "out").mkdir()
    assert FILE_NAME in write(model, tmp_path / "out", "compress").files
    listed = yaml.safe_load((tmp_path / "out" / FILE_NAME).read_text())
    assert set(listed) == set(model.quantization)
    assert all(bits["weight"] == 8 for bits in listed.values())
