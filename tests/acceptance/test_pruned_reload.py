"""Acceptance of stored pruned models: they come back bit for bit, or not at all.

Models of every prunable class are cut along their real groups, differently in every block, and exported.
A fresh process must compute the same bits; a process without this package must refuse the folder, loudly.
"""

from __future__ import annotations

import json
import subprocess
import sys

import compress
import pytest
import torch
from compress.compressors.pruning.checking import check
from compress.compressors.pruning.cutting import cut
from compress.compressors.pruning.graph import find_groups
from compress.compressors.pruning.groups import Selection
from compress.errors import SourceError
from compress.exporters.formats import as_shipped, predict_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.models.open import open_model
from compress.models.registry import family_for
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.resuming import resume

VIT, DEIT = "ViTForImageClassification", "DeiTForImageClassificationWithTeacher"
CONVNEXT, SWIN = "ConvNextForImageClassification", "SwinForImageClassification"
DIT, PIXART = "DiTTransformer2DModel", "PixArtTransformer2DModel"
CLASSES = (VIT, DEIT, CONVNEXT, SWIN, DIT, PIXART)
SUFFIXES = {".safetensors", ".json", ".yaml"}
STOCK_ALONE = """
import importlib, json, sys
answers = {}
for library, name, folder in json.loads(sys.argv[1]):
    stock = getattr(importlib.import_module(library), name)
    flags = [{}, {"ignore_mismatched_sizes": True}]
    if library == "transformers":
        flags += [{"ignore_mismatched_sizes": True, "attn_implementation": "eager"}]
    else:
        flags += [{"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}]
    answers[name] = []
    for options in flags:
        try:
            stock.from_pretrained(folder, **options)
            answers[name].append(None)
        except Exception as error:
            answers[name].append(f"{type(error).__name__}: {error}")
assert "compress" not in sys.modules
print(json.dumps(answers))
"""


def selection_of(groups, seed=0):
    """Choose at random, another share in every group; a head goes from every second attention."""
    generator = torch.Generator().manual_seed(seed)
    kept, heads, sizes = {}, {}, {}
    for index, group in enumerate(groups):
        site, sizes[group.name] = group.attention, group.size
        if site is None:
            share = 0.5 if group.kind == "width" else (0.3, 0.6, 0.45)[index % 3]
            count = max(1, int(group.size * share))
            kept[group.name] = tuple(
                torch.randperm(group.size, generator=generator)[:count].sort().values.tolist()
            )
            continue
        heads[group.name] = tuple(range(index % 2, site.heads))
        dims = site.head_dim - 2 * (index % 3)
        kept[group.name] = tuple(
            head * site.head_dim + channel
            for head in heads[group.name]
            for channel in torch.randperm(site.head_dim, generator=generator)[:dims].sort().values.tolist()
        )
    return Selection(kept, heads, sizes)


def folder_of(class_name, make_tiny, make_vit, name="first"):
    return (
        make_tiny(class_name, name=f"{name}-{class_name}")
        if class_name in (DIT, PIXART)
        else make_vit(class_name)
    )


def outputs_of(module):
    family = family_for(type(module).__name__)
    inputs = family.example_inputs(module, 2, torch.Generator().manual_seed(4))
    with torch.no_grad():
        return module(**inputs, return_dict=False)[0]


def opened(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


@pytest.fixture
def pruned(make_tiny, make_vit):
    def build(class_name):
        model = opened(folder_of(class_name, make_tiny, make_vit))
        groups = find_groups(model)
        cut(model, groups, selection_of(groups), attn_scale="preserve")
        check(model)
        return model

    return build


@pytest.fixture
def exported(tmp_path):
    def export(model, name="out"):
        out = tmp_path / name
        out.mkdir()
        write(model, out, "compress")
        return out

    return export


@pytest.mark.parametrize("class_name", CLASSES)
def test_it_comes_back_here(pruned, exported, class_name):
    model = pruned(class_name)
    out = exported(model)
    expected = outputs_of(model.module)
    assert torch.equal(outputs_of(compress.load(out)), expected)
    library = __import__(model.family.library)
    assert torch.equal(outputs_of(getattr(library, class_name).from_pretrained(out)), expected)
    assert {path.suffix for path in out.rglob("*") if path.is_file()} <= SUFFIXES
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert predict_bytes(model.dense(), "compress") == weights
    assert model.size().bytes < model.spec.size().bytes


@pytest.mark.parametrize("class_name", [DEIT, SWIN, DIT])
def test_going_on_from_a_stage_gives_the_same_bytes(pruned, exported, make_tiny, make_vit, class_name):
    model = pruned(class_name)
    out = exported(model)
    other = opened(folder_of(class_name, make_tiny, make_vit, "second"))
    resume(other, out)
    assert other.surgery == model.surgery and other.size() == model.size()
    again = exported(other, "again")
    for path in (path for path in out.iterdir() if path.is_file()):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_tensor_of_another_width_is_refused(pruned, exported, class_name):
    model = pruned(class_name)
    out = exported(model)
    module, parameter, shape = next(
        (name, key, shape)
        for name, item in model.surgery.items()
        for key, shape in item.shapes.items()
        if key == "weight" and len(shape) == 2
    )
    for file in ("compress.json", "config.json"):
        document = json.loads((out / file).read_text())
        section = document if file == "compress.json" else document["quantization_config"]
        entry = section["surgery"].setdefault(module, {"shapes": {}, "attributes": {}})
        entry["shapes"][parameter] = [shape[0], shape[1] - 1]
        (out / file).write_text(json.dumps(document))
    library = __import__(model.family.library)
    for load in (compress.load, getattr(library, class_name).from_pretrained):
        with pytest.raises(SourceError):
            load(out)


@pytest.mark.slow
@pytest.mark.parametrize("class_name", CLASSES)
def test_it_comes_back_in_a_fresh_process(pruned, exported, class_name):
    model = pruned(class_name)
    found = verify_export(model, exported(model), seed=1, progress=SilentProgress())
    assert (found.failure, found.verified, found.max_abs_error) == (None, True, 0.0)
    assert len(found.ways) == 2


@pytest.mark.slow
def test_stock_code_without_us_refuses_it(pruned, exported, tmp_path):
    asked = []
    for class_name in CLASSES:
        model = pruned(class_name)
        asked.append((model.family.library, class_name, str(exported(model, class_name))))
    command = [sys.executable, "-P", "-c", STOCK_ALONE, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=300)
    answers = json.loads(done.stdout.splitlines()[-1])
    for class_name in CLASSES:
        reason = "quantization type" if class_name in (DIT, PIXART) else "compress has to be imported first"
        for answer in answers[class_name]:
            assert answer is not None, f"{class_name} was loaded with weights that nobody trained"
            assert reason in answer


@pytest.mark.slow
@pytest.mark.parametrize("class_name", [VIT, DEIT, SWIN, CONVNEXT])
def test_padded_it_loads_with_the_stock_class_alone(make_vit, exported, class_name):
    model = opened(make_vit(class_name))
    groups = [group for group in find_groups(model) if group.kind != "width"]
    cut(model, groups, selection_of(groups), attn_scale="preserve")
    shipped = as_shipped(model, "compress", padded=True)
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(9))
    with torch.no_grad():
        difference = (shipped.module(**inputs).logits - model.module(**inputs).logits).abs().max()
    assert difference <= 1e-5
    found = verify_export(shipped, exported(shipped), seed=1, progress=SilentProgress())
    assert (found.failure, found.max_abs_error) == (None, 0.0)
    assert [way for way in found.loads_with if "import compress" not in way and "compress.load" not in way]
