"""Cut classifiers: which form each gets, and that every form comes back; also by the stock class alone."""

from __future__ import annotations

import json

import compress
import pytest
import torch
from compress.errors import SourceError
from compress.exporters.form import stored_form
from compress.exporters.formats import predict_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.progress import SilentProgress
from compress.resuming import resume
from compress.runtime.manifest import ModuleSurgery
from compress.runtime.validate import open_folder

UNIFORM = [(3, 16, 96), (3, 16, 96)]
LAYERED = [(3, 12, 96), (2, 16, 60)]


@pytest.fixture
def opened(make_vit, open_cut):
    """Return `opened(sizes, class_name=...)` -> OpenModel."""

    def build(sizes, class_name="ViTForImageClassification"):
        return open_cut(make_vit(class_name), sizes)

    return build


@pytest.fixture
def written(tmp_path):
    def write_to(model, name="out"):
        out = tmp_path / name
        out.mkdir()
        write(model, out, "compress")
        return out

    return write_to


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_equal_widths_are_a_stock_folder(opened, written, outputs_of, class_name):
    import transformers

    model = opened(UNIFORM, class_name)
    out = written(model)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["head_dim"] == 16
    assert "surgery" not in (out / "compress.json").read_text()
    module, info = getattr(transformers, class_name).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs_of(module), outputs_of(model.module))
    assert predict_bytes(model.dense(), "compress") == (out / "model.safetensors").stat().st_size


def test_layers_of_other_widths_are_said_in_the_librarys_words(opened, written, outputs_of):
    import transformers

    model = opened(LAYERED)
    out = written(model)
    config = json.loads((out / "config.json").read_text())
    assert config["per_layer_config"]["1"] == {
        "intermediate_size": 60, "num_attention_heads": 2, "head_dim": 16
    }  # fmt: skip
    expected = outputs_of(model.module)
    for load in (
        compress.load,
        transformers.ViTForImageClassification.from_pretrained,
        transformers.AutoModelForImageClassification.from_pretrained,
    ):
        module = load(out)
        assert torch.equal(outputs_of(module), expected)
        assert module.config._attn_implementation == model.module.config._attn_implementation
    assert predict_bytes(model.dense(), "compress") == (out / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_fresh_process_loads_it_both_ways(opened, written):
    model = opened(LAYERED)
    found = verify_export(model, written(model), seed=3, progress=SilentProgress())
    assert (found.failure, found.max_abs_error) == (None, 0.0)


def test_saved_by_the_library_it_loads_again(opened, written, outputs_of, tmp_path):
    import transformers

    model = opened(LAYERED)
    out = written(model)
    for number, load in enumerate((compress.load, transformers.ViTForImageClassification.from_pretrained)):
        module = load(out)
        assert module.hf_quantizer.is_trainable and not module.is_quantized
        module.save_pretrained(tmp_path / f"again{number}")
        assert torch.equal(outputs_of(compress.load(tmp_path / f"again{number}")), outputs_of(model.module))


@pytest.mark.parametrize("sizes", [UNIFORM, LAYERED])
def test_going_on_from_a_folder_gives_the_same_model_and_the_same_bytes(opened, written, outputs_of, sizes):
    model = opened(sizes)
    model.attachments["pruning.json"] = '{"kept": []}\n'
    # What is listed beyond what is needed changes no byte.
    model.surgery["vit.layers.0.mlp"] = ModuleSurgery()
    out = written(model)
    other = opened([(4, 16, 128), (4, 16, 128)])
    assert other.surgery == {}
    resume(other, out)
    assert other.attachments == model.attachments
    assert other.size() == model.size() and other.config == model.config
    assert torch.equal(outputs_of(other.module), outputs_of(model.module))
    again = written(other, "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in out.iterdir()
    }


def test_a_config_of_layers_that_does_not_fit_is_refused(opened, written):
    import transformers

    out = written(opened(LAYERED))
    config = json.loads((out / "config.json").read_text())
    config["per_layer_config"]["1"]["intermediate_size"] = 64
    (out / "config.json").write_text(json.dumps(config))
    for load in (compress.load, transformers.ViTForImageClassification.from_pretrained):
        with pytest.raises(SourceError, match="intermediate_size: 64, but the manifest leaves 60"):
            load(out)


@pytest.mark.parametrize("stated", [None, {}])
def test_a_config_that_says_nothing_of_layers_leaves_all_to_the_manifest(opened, written, outputs_of, stated):
    import transformers

    model = opened(LAYERED)
    out = written(model)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "per_layer_config": stated}))
    for load in (compress.load, transformers.ViTForImageClassification.from_pretrained):
        assert torch.equal(outputs_of(load(out)), outputs_of(model.module))


def test_no_flag_of_the_library_lets_another_shape_in(opened, written):
    import transformers
    from safetensors.torch import load_file, save_file

    out = written(opened(LAYERED))
    tensors = load_file(out / "model.safetensors")
    tensors["classifier.bias"] = torch.zeros(5)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for load in (compress.load, transformers.ViTForImageClassification.from_pretrained):
        options = {} if load is compress.load else {"ignore_mismatched_sizes": True}
        with pytest.raises(SourceError, match=r"classifier\.bias has shape \[5\]"):
            load(out, **options)


def test_what_was_cut_once_more_is_not_saved_by_the_library(opened, written, tmp_path):
    module = compress.load(written(opened(LAYERED)))
    linear = module.vit.layers[1].mlp.fc1
    linear.weight = torch.nn.Parameter(linear.weight[:40].clone())
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.fc1\.weight is not what was loaded"):
        module.save_pretrained(tmp_path / "again")


def test_a_native_config_that_says_other_sizes_is_not_written(opened, monkeypatch):
    model = opened(UNIFORM)
    right = model.family.native_config
    wrong = lambda config, surgery: {**right(config, surgery), "intermediate_size": 100}  # noqa: E731
    monkeypatch.setattr(model.family, "native_config", wrong)
    with pytest.raises((ValueError, SourceError), match="does not build vit.layers.0.mlp.fc1 as it is"):
        stored_form(model.family, model.config, model.surgery)


@pytest.mark.parametrize("key", ["num_attention_heads", "scaling"])
def test_an_attribute_that_the_manifest_leaves_out_is_refused(opened, written, key):
    import transformers

    out = written(opened([(3, 16, 96), (2, 12, 60)]))
    for name in ("compress.json", "config.json"):
        document = json.loads((out / name).read_text())
        section = document if name == "compress.json" else document["quantization_config"]
        del section["surgery"]["vit.layers.1.attention"]["attributes"][key]
        (out / name).write_text(json.dumps(document))
    for load in (compress.load, transformers.ViTForImageClassification.from_pretrained):
        with pytest.raises(SourceError, match=r"vit\.layers\.1\.attention"):
            load(out)


def test_sizes_that_no_model_has_are_refused_before_the_stock_class_builds_them(opened, written):
    import transformers

    out = written(opened(LAYERED))
    config = json.loads((out / "config.json").read_text())
    del config["per_layer_config"]  # the library's own config class would count through all layers
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**30}))
    for load in (compress.load, transformers.ViTForImageClassification.from_pretrained):
        with pytest.raises(SourceError, match="num_hidden_layers: 1073741824 is not an integer from 1 to"):
            load(out)


def test_a_stock_folder_says_no_name_of_weights(make_vit, open_cut, written):
    source = make_vit()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": "model.safetensors"}))
    out = written(open_cut(source, UNIFORM))
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())


def test_names_of_attachments_are_known(opened, tmp_path):
    model = opened(UNIFORM)
    model.attachments["weights.bin"] = "no"
    with pytest.raises(ValueError, match=r"weights\.bin"):
        write(model, tmp_path, "compress")


def test_the_manifest_of_a_stock_folder_holds_history_alone(opened, written):
    stored = open_folder(written(opened(UNIFORM)))
    assert stored.quant_method is None and not stored.manifest.surgery
