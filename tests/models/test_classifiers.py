"""Image classifiers of transformers: what holds for all families, against the stock classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from compress.errors import SourceError
from compress.models.checkpoint import locate
from compress.models.open import open_model, read_spec
from compress.models.registry import FAMILY_NAMES, family_for, task_of
from compress.models.shapes import complete_config, expected_shapes
from compress.preflight import linear_names
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.load import load
from compress.runtime.vision_sizes import VISION_CLASSES, is_vision_class, structural
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CLASSES = sorted(VISION_CLASSES)
VIT, DEIT, TEACHER = (
    "ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher",
)  # fmt: skip
CONVNEXT, SWIN = "ConvNextForImageClassification", "SwinForImageClassification"
VARIANTS = [
    *((name, {}) for name in CLASSES),
    *((name, {"num_channels": 1, "num_labels": 2}) for name in CLASSES),
    (VIT, {"qkv_bias": False, "image_size": [24, 16], "patch_size": [8, 4]}),
    (VIT, {"head_dim": 12, "image_size": 18}),
    (TEACHER, {"qkv_bias": False, "num_hidden_layers": 1}),
    (CONVNEXT, {"layer_scale_init_value": 0.0, "image_size": [40, 70]}),
    (CONVNEXT, {"num_stages": 2, "hidden_sizes": [8, 8], "depths": [2, 1], "patch_size": 2}),
    (SWIN, {"qkv_bias": False, "use_absolute_embeddings": True, "mlp_ratio": 2.3}),
    (SWIN, {"image_size": 37, "depths": [2, 2], "window_size": 3}),
    (SWIN, {"image_size": [32, 24], "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 3}),
]


def _shown(value: object) -> str:
    return (
        value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in dict(value).items()) or "plain"
    )


@pytest.fixture
def opened(make_vit):
    def build(class_name, **config):
        return open_model(ModelRef(id=str(make_vit(class_name, **config))), progress=SilentProgress())

    return build


def _inputs(model, batch=2):
    return model.family.example_inputs(model.module, batch, torch.Generator().manual_seed(7))


def _logits(model, batch=2):
    with torch.no_grad():
        return model.module(**_inputs(model, batch)).logits


@pytest.mark.parametrize(("class_name", "changes"), VARIANTS, ids=_shown)
def test_shapes_macs_and_order_are_those_of_the_stock_class(class_name, changes, opened, check_forward_order):
    model = opened(class_name, **changes)
    stock = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
    assert expected_shapes(class_name, model.config) == stock
    inputs = _inputs(model, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.module(**inputs)
    assert counter.get_total_flops() == 2 * model.family.macs(model.config)
    check_forward_order(model)


@pytest.mark.parametrize("class_name", CLASSES)
def test_defaults_are_the_stock_classes(class_name):
    model_type, defaults = VISION_CLASSES[class_name]
    stock = transformers.AutoConfig.for_model(model_type)
    for key, value in structural(class_name, {}).items():
        given = getattr(stock, key)
        assert value == (tuple(given) if isinstance(given, list) else given), key
    assert set(defaults) == set(structural(class_name, {}))


@pytest.mark.parametrize("class_name", CLASSES)
def test_it_opens_as_the_stock_loader_does(class_name, make_vit):
    folder = make_vit(class_name)
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    stock = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(stock).__name__ == class_name
    with torch.no_grad():
        expected = stock(**_inputs(model)).logits
        assert torch.equal(_logits(model), expected)
        assert torch.equal(load(folder)(**_inputs(model)).logits, expected)
    assert model.size() == read_spec(ModelRef(id=str(folder))).size()
    assert model.size().parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert model.config == {**json.loads((folder / "config.json").read_text()), "_class_name": class_name}


@pytest.mark.parametrize("class_name", CLASSES)
def test_names_in_files_are_the_former_ones_and_either_is_read(class_name, make_vit, tmp_path):
    from compress.runtime.vision_names import module_name, stored_name
    from safetensors.torch import save_file

    folder = make_vit(class_name)
    stored = load_file(folder / "model.safetensors")
    names = set(expected_shapes(class_name, locate(ModelRef(id=str(folder))).config))
    assert {stored_name(name) for name in names} == set(stored)
    assert {module_name(name) for name in stored} == names == {module_name(name) for name in names}
    save_file(
        {module_name(name): value for name, value in stored.items()}, folder / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    stock = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(_logits(model), stock(**_inputs(model)).logits)


@pytest.mark.parametrize("class_name", CLASSES)
def test_what_is_written_is_what_the_library_writes(class_name, make_vit, tmp_path):
    from compress.exporters.formats import predict_bytes, write

    folder, target = make_vit(class_name), tmp_path / "written"
    target.mkdir()
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    info = write(model, target, "compress")
    assert info.bytes == predict_bytes(read_spec(ModelRef(id=str(folder))), "compress")
    ours, theirs = load_file(target / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert _config(target) == _config(folder)
    loaded, report = transformers.AutoModelForImageClassification.from_pretrained(
        target, output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**_inputs(model)).logits, _logits(model))


def _config(folder: Path):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("class_name", "changes"), VARIANTS, ids=_shown)
def test_folding_changes_no_output(class_name, changes, opened):
    model = opened(class_name, **changes)
    groups = model.family.folds(model.module)
    before = _logits(model).double()
    generator = torch.Generator().manual_seed(3)
    for group in groups:
        columns = model.module.get_submodule(group.targets[0]).weight.shape[1]
        factor = torch.empty(columns).uniform_(0.25, 4.0, generator=generator)
        group.absorb(model.module, factor)
        for name in group.targets:
            weight = model.module.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(weight / factor)
    after = _logits(model).double()
    assert groups and (after - before).abs().max() / before.abs().max() < 1e-5


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_structure_names_what_is_there(class_name, opened):
    model = opened(class_name)
    found = model.family.structure(model.module)
    modules, parameters = dict(model.module.named_modules()), dict(model.module.named_parameters())
    blocks = [name for name, _ in model.family.blocks(model.module)]
    assert list(found.inner.values()) == list(range(len(blocks)))
    for name, block in found.inner.items():
        assert isinstance(modules[name], torch.nn.Linear) and name.startswith(f"{blocks[block]}.")
    assert len(found.attentions) == (0 if class_name == CONVNEXT else len(blocks))
    for site in found.attentions:
        attention, wide = modules[site.name], site.heads * site.head_dim
        assert [modules[name].out_features for name in (site.q, site.k, site.v)] == [wide] * 3
        assert modules[site.out].in_features == wide and site.name.startswith(f"{blocks[site.block]}.")
        meanings = {"heads": site.heads, "head_dim": site.head_dim, "scale": site.head_dim**-0.5}
        assert all(getattr(attention, key) == meanings[what] for key, what in site.attributes.items())
        assert (site.table is not None) == (class_name == SWIN)
        if site.table is not None:
            assert parameters[site.table].shape[1] == site.heads
    answers = [n for n, m in modules.items() if getattr(m, "out_features", None) == 10]
    tables = [site.table for site in found.attentions if site.table]
    assert list(found.ignored) == answers + tables and found.width


def test_families_and_tasks(make_vit):
    assert {FAMILY_NAMES[name] for name in CLASSES} == {"vit", "convnext", "swin"}
    assert {task_of(FAMILY_NAMES[name]) for name in CLASSES} == {"classify"}
    assert task_of("dit") == "denoise" and task_of("llm") == "language"
    for name in CLASSES:
        family = family_for(name)
        assert (family.name, family.task, family.library) == (FAMILY_NAMES[name], "classify", "transformers")
    assert not is_vision_class("ViTForMaskedImageModeling") and not is_vision_class(None)
    names = linear_names(locate(ModelRef(id=str(make_vit(SWIN)))))
    assert "swin.encoder.layers.0.downsample.reduction" in names
    assert not any("table" in name for name in names)


def test_labels_are_counted_as_stock_code_counts_them():
    base = {"hidden_sizes": [8, 8, 8, 8]}
    for given, count in (
        ({}, 2), ({"num_labels": 7}, 7), ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
    ):  # fmt: skip
        stock = transformers.ConvNextConfig(**base, **given)
        config = complete_config(CONVNEXT, {**base, **given}, "config.json")
        shape = expected_shapes(CONVNEXT, config)["classifier.weight"]
        assert shape == (count, 8) and stock.num_labels == count


def test_a_release_that_names_modules_otherwise_is_refused(make_vit, monkeypatch):
    folder = make_vit(VIT)
    model_class = transformers.ViTForImageClassification
    build = model_class.__init__

    def former(self, config):
        build(self, config)
        self.vit.encoder = self.vit.layers
        del self.vit.layers

    monkeypatch.setattr(model_class, "__init__", former)
    with pytest.raises(SourceError, match=r"transformers 5.* builds it with other modules, such as vit\.enc"):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())
