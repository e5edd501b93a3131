"""A model with other sizes in every layer: written, predicted, read back; in this process and a fresh one."""

from __future__ import annotations

import json

import compress
import pytest
import torch
from compress.errors import PlanError, SourceError
from compress.exporters.formats import predict_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.inspection import inspect
from compress.progress import SilentProgress
from compress.runtime.load import read_checkpoint
from compress.runtime.validate import open_folder

SIZES = [(3, 12, 100), (2, 16, 256)]


@pytest.fixture
def cut(make_tiny, open_cut):
    return open_cut(make_tiny(), SIZES)


@pytest.fixture
def folder(cut, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(cut, out, "compress")
    return out


def load_stock(folder, **options):
    import diffusers

    return diffusers.DiTTransformer2DModel.from_pretrained(folder, **options)


def test_a_cut_model_comes_back_bit_for_bit(cut, folder, outputs_of):
    expected = outputs_of(cut.module)
    for module in (compress.load(folder), load_stock(folder), read_checkpoint(folder)[0]):
        assert torch.equal(outputs_of(module), expected)
        attention = module.transformer_blocks[0].attn1
        assert (attention.heads, attention.inner_dim, attention.scale) == (3, 36, 12**-0.5)
    assert read_checkpoint(folder)[1].surgery == cut.surgery


@pytest.mark.slow
def test_a_fresh_process_loads_it_both_ways(cut, folder):
    found = verify_export(cut, folder, seed=3, progress=SilentProgress())
    assert (found.failure, found.max_abs_error) == (None, 0.0)
    assert found.loads_with == [
        "compress.load(path)", "import compress; diffusers.DiTTransformer2DModel.from_pretrained(path)"
    ]  # fmt: skip


def test_what_is_predicted_is_written(cut, folder):
    spec = cut.dense()
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert predict_bytes(spec, "compress") == weights
    assert spec.evolve(surgery=cut.surgery).size() == cut.size()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt*"))


def test_it_is_not_called_quantized_and_can_be_trained(folder):
    described = inspect(folder)
    assert described["quantized_bits"] is None and described["cut"] == 12
    assert all(layer["method"] is None for layer in described["layers"])
    for module in (compress.load(folder), load_stock(folder)):
        assert module.hf_quantizer.is_trainable and not module.is_quantized
        module.float()
        inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3])}
        module(**inputs, class_labels=torch.tensor([1])).sample.sum().backward()


def test_saved_by_the_library_it_loads_again(cut, folder, tmp_path, outputs_of):
    for number, module in enumerate((compress.load(folder), load_stock(folder))):
        again = tmp_path / f"again{number}"
        module.save_pretrained(again)
        assert torch.equal(outputs_of(compress.load(again)), outputs_of(cut.module))
        assert open_folder(again).manifest.surgery == cut.surgery


def test_a_model_that_is_not_cut_says_nothing_of_it(make_tiny, open_quantized, schemes, tmp_path):
    out = tmp_path / "dense"
    out.mkdir()
    write(open_quantized(make_tiny(), schemes["w4a8"]), out, "compress")
    assert "surgery" not in (out / "compress.json").read_text()
    assert "surgery" not in json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("scheme", ["w4a8", "mixed"])
def test_quantized_layers_lie_on_top_of_the_cut(
    make_tiny, open_quantized, schemes, tmp_path, outputs_of, scheme
):
    sizes = [(3, 16, 128), (2, 16, 192)]  # blocks of 64 channels are rotated
    model = open_quantized(make_tiny(dtype="bfloat16"), schemes[scheme], sizes=sizes)
    out = tmp_path / "quantized"
    out.mkdir()
    write(model, out, "compress")
    expected = outputs_of(model.module)
    for module in (compress.load(out), load_stock(out), read_checkpoint(out)[0]):
        assert torch.equal(outputs_of(module), expected)
    assert not compress.load(out).hf_quantizer.is_trainable
    described, stored = inspect(out), open_folder(out)
    assert described["cut"] == len(stored.manifest.surgery) > 0 and described["quantized_bits"] is not None
    assert described["parameters"] == model.size().parameters < model.spec.size().parameters
    compress.load(out).save_pretrained(tmp_path / "again")
    assert torch.equal(outputs_of(compress.load(tmp_path / "again")), expected)
    with pytest.raises(PlanError, match="stock class alone"):
        write(model, out, "dequantized")


def tampered(name, key, value):
    def change(surgery):
        surgery[name][key[0]][key[1]] = value

    return change


BLOCK = "transformer_blocks.0."
CHANGES = {
    "narrower than stored": (tampered(f"{BLOCK}ff.net.2", ("shapes", "weight"), [64, 90]), "has shape"),
    "wider than the config": (
        tampered(f"{BLOCK}ff.net.2", ("shapes", "weight"), [64, 1048576]), "only makes it smaller"),
    "a bias of another length": (
        tampered(f"{BLOCK}ff.net.0.proj", ("shapes", "bias"), [99]), "with a bias of"),
    "another number of heads": (
        tampered(f"{BLOCK}attn1", ("attributes", "heads"), 4), "scale .* is not that of 9 channels"),
    "stale heads": (lambda surgery: surgery.pop(f"{BLOCK}attn1"), "make"),
    "another scale": (tampered(f"{BLOCK}attn1", ("attributes", "scale"), 0.5), "scale 0.5"),
    "no scale": (
        lambda surgery: surgery[f"{BLOCK}attn1"]["attributes"].pop("scale"), "scale .* is not that of 12"),
    "no number of heads": (
        lambda surgery: surgery[f"{BLOCK}attn1"]["attributes"].pop("heads"), "scale .* is not that of 9"),
    "a module that is not there": (lambda surgery: surgery.update({"nowhere": {"shapes": {}}}), "nowhere"),
    "a parameter that is not there": (
        tampered(f"{BLOCK}ff.net.2", ("shapes", "gamma"), [3]), "no parameter gamma"),
    "a width of nothing": (tampered(f"{BLOCK}ff.net.2", ("shapes", "weight"), [64, 0]), "greater than"),
    "an attribute of code": (
        lambda surgery: surgery[f"{BLOCK}attn1"]["attributes"].update(processor=1), "processor"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_manifest_is_refused(folder, case):
    change, message = CHANGES[case]
    for name in ("compress.json", "config.json"):
        document = json.loads((folder / name).read_text())
        change((document if name == "compress.json" else document["quantization_config"])["surgery"])
        (folder / name).write_text(json.dumps(document))
    for load in (compress.load, load_stock):
        with pytest.raises(SourceError, match=message):
            load(folder)


def test_two_files_that_disagree_are_refused(folder):
    document = json.loads((folder / "compress.json").read_text())
    document["surgery"].popitem()
    (folder / "compress.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match="disagree about the sizes of module"):
        compress.load(folder)


def test_without_its_section_it_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="lists cut layers"):
        compress.load(folder)


def test_a_missing_tensor_is_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors[f"{BLOCK}ff.net.2.weight"]
    save_file(tensors, weights)
    for load in (compress.load, load_stock):
        with pytest.raises(SourceError, match="missing"):
            load(folder)
