"""Padding to equal widths: the same outputs, by the stock class alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from compress.errors import PlanError, StageError
from compress.exporters.formats import as_shipped, predict_bytes, write
from compress.exporters.inspection import inspect
from compress.exporters.padded import padded_spec, padding_notes
from compress.models.open import open_model, read_spec
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from safetensors.torch import load_file, save_file

VIT = "ViTForImageClassification"
LAYERED = [(3, 12, 96), (2, 16, 60)]
ALONE = """
import sys
import torch, transformers
from safetensors.torch import load_file, save_file
name, folder, inputs, outputs = sys.argv[1:]
module, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    save_file({"logits": module(**load_file(inputs)).logits}, outputs)
assert "compress" not in sys.modules
"""


@pytest.fixture
def by_the_library_alone(tmp_path):
    """Return `logits(class_name, folder, inputs)`: of a process that does not know this package."""

    def run(class_name, folder, inputs):
        save_file(inputs, tmp_path / "inputs.safetensors")
        outputs = tmp_path / "outputs.safetensors"
        command = [
            sys.executable,
            "-P",
            "-c",
            ALONE,
            class_name,
            folder,
            tmp_path / "inputs.safetensors",
            outputs,
        ]
        subprocess.run([str(part) for part in command], check=True, cwd=tmp_path, timeout=120)
        return load_file(outputs)["logits"]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("class_name", [VIT, "DeiTForImageClassificationWithTeacher"])
def test_a_padded_model_loads_with_the_stock_class_and_answers_the_same(
    make_vit, open_cut, tmp_path, by_the_library_alone, class_name
):
    model = open_cut(make_vit(class_name), LAYERED)
    shipped = as_shipped(model, "compress", padded=True)
    assert shipped.surgery == {} and model.surgery
    assert (shipped.config["num_attention_heads"], shipped.config["intermediate_size"]) == (3, 96)
    out = tmp_path / "out"
    out.mkdir()
    info = write(shipped, out, "compress")
    assert any("import compress" not in way and "transformers." in way for way in info.loads_with)
    assert inspect(out)["format"] == "dense"
    inputs = model.family.example_inputs(model.module, 3, torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.module(**inputs).logits
    assert torch.allclose(by_the_library_alone(class_name, out, inputs), expected, atol=1e-5, rtol=0)
    assert predict_bytes(padded_spec(model.dense(), "compress"), "compress") == info.bytes
    assert shipped.size().parameters > model.size().parameters
    assert f"{shipped.size().parameters:,} parameters" in padding_notes(model, shipped)[0]


def test_equal_widths_need_no_padding(make_vit, open_cut):
    model = open_cut(make_vit(), [(3, 16, 96), (3, 16, 96)])
    shipped = as_shipped(model, "compress", padded=True)
    assert shipped.module is model.module and shipped.size() == model.size()
    assert "nothing was filled up" in padding_notes(model, shipped)[0]


def test_what_gives_other_outputs_when_padded_is_refused(make_vit, open_cut):
    model = open_cut(make_vit(), LAYERED)
    # Computed by the module and stored nowhere: the padded module does not have it.
    model.module.vit.layers[0].mlp.fc2.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(StageError, match="padding changes outputs by up to"):
        as_shipped(model, "compress", padded=True)


def test_bfloat16_differs_by_its_own_rounding_alone(make_vit, open_cut, outputs_of):
    model = open_cut(make_vit(), LAYERED, dtype="bfloat16")
    shipped = as_shipped(model, "compress", padded=True)
    assert {tensor.dtype for tensor in shipped.module.state_dict().values()} == {torch.bfloat16}
    assert torch.allclose(outputs_of(shipped.module), outputs_of(model.module), atol=0.05)


def test_a_class_without_such_sizes_is_refused_by_the_plan(make_tiny, open_cut):
    spec = open_cut(make_tiny(), [(3, 12, 100), (2, 16, 256)]).dense()
    with pytest.raises(PlanError, match="DiTTransformer2DModel has no sizes between"):
        padded_spec(spec, "compress")


def test_what_is_not_cut_or_is_quantized_is_refused(make_vit, open_cut):
    with pytest.raises(PlanError, match="cuts anything"):
        padded_spec(read_spec(ModelRef(id=str(make_vit()))), "compress")
    spec = open_cut(make_vit(), LAYERED).dense()
    with pytest.raises(PlanError, match="torchao"):
        padded_spec(spec, "torchao")


@pytest.mark.parametrize("format", ["torchao", "sdnq", "dequantized"])
def test_stock_formats_refuse_sizes_of_their_own(make_tiny, open_cut, tmp_path, format):
    model = open_cut(make_tiny(), [(3, 12, 100), (2, 16, 256)])
    for attempt in (lambda: predict_bytes(model.dense(), format), lambda: write(model, tmp_path, format)):
        with pytest.raises(PlanError, match="stock class alone, which cannot build"):
            attempt()
    assert not list(tmp_path.glob("*.safetensors"))


def test_equal_widths_are_dequantized_to_a_stock_folder(make_vit, open_cut, tmp_path, outputs_of):
    model = open_cut(make_vit(), [(3, 16, 96), (3, 16, 96)])
    out = tmp_path / "out"
    out.mkdir()
    info = write(model, out, "dequantized")
    assert predict_bytes(model.dense(), "dequantized") == info.bytes
    again = open_model(ModelRef(id=str(out)), progress=SilentProgress())
    assert torch.equal(outputs_of(again.module), outputs_of(model.module))
