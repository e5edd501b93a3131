"""Slimmed Segment Anything models: what is written, who can load it, and that the same masks come out."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import compress
import pytest
import torch
import transformers
from compress.compressors.pruning.sam.cutting import cut_bottleneck, cut_embedding, planned_surgery
from compress.errors import PlanError, SourceError
from compress.exporters.form import stored_form, stored_surgery
from compress.exporters.formats import predict_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.verify_worker import joined
from compress.models.base import flat_shapes
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.load import load, read_checkpoint
from compress.runtime.manifest import ModuleSurgery
from safetensors.torch import load_file, save_file

from ..tiny_sam import save_tiny_sam

UNIFORM = (24, (6, 6, 6), (40, 40, 40))
OTHERS = {
    "other widths per layer": (24, (4, 6, 8), (40, 30, 40)),
    "the embedding alone": (24, (12, 12, 12), (96, 96, 96)),
    "the bottleneck alone": (48, (6, 6, 6), (40, 40, 40)),
    "one layer": (48, (12, 12, 6), (96, 96, 96)),
    "inner widths per layer": (48, (12, 12, 12), (96, 40, 96)),
}
STOP = "compress has to be imported first, or load the folder with compress.load"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny_sam(tmp_path_factory.mktemp("original") / "sam")


@pytest.fixture
def slimmed(original):
    """Return `slimmed((width, head sizes, inner sizes))` -> OpenModel, cut and its keys folded."""

    def build(sizes):
        width, head_dims, inner = sizes
        model = open_model(ModelRef(id=str(original)), progress=SilentProgress())
        if width < 48:
            cut_embedding(model, torch.arange(0, 2 * width, 2), rel_pos="slice")
        cut_bottleneck(
            model, [torch.arange(n) for n in head_dims], [torch.arange(n) for n in inner],
            attn_scale="preserve", rel_pos="slice",
        )  # fmt: skip
        return model

    return build


@pytest.fixture
def exported(slimmed, tmp_path):
    def build(sizes, format="compress"):
        model, folder = slimmed(sizes), tmp_path / "out"
        folder.mkdir()
        return model, folder, write(model, folder, format)

    return build


def _compute(module, model):
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(5))
    with torch.no_grad():
        return joined(module(**inputs, return_dict=False), (0, 1))


def _stock(folder, **options):
    """Load a folder by the library alone, where this package cannot be imported."""
    code = (
        "import json, sys\n"
        "sys.modules['compress'] = None\n"
        "import torch, transformers\n"
        "from safetensors.torch import load_file, save_file\n"
        "folder, place, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])\n"
        "model, report = transformers.SamModel.from_pretrained(folder, output_loading_info=True, **options)\n"
        "with torch.no_grad():\n"
        "    found = model.eval()(**load_file(place + '/inputs'), return_dict=False)\n"
        "save_file({'scores': found[0].contiguous(), 'masks': found[1].contiguous()}, place + '/outputs')\n"
        "assert sys.modules['compress'] is None\n"
        "print(json.dumps({key: sorted(map(str, value)) for key, value in report.items()}))\n"
    )
    place = folder.parent / "stock"
    place.mkdir(exist_ok=True)
    inputs = options.pop("inputs", {"pixel_values": torch.zeros(1, 3, 64, 64)})
    save_file(inputs, place / "inputs")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder), str(place), json.dumps(options)],
        env=environment | {"HF_HUB_OFFLINE": "1"}, cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return done.stderr.strip().splitlines()[-1], None
    return json.loads(done.stdout.splitlines()[-1]), load_file(place / "outputs")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["compress", "dequantized"])
def test_equal_layers_load_with_plain_transformers(format, exported):
    model, folder, info = exported(UNIFORM, format)
    assert info.loads_with == ["compress.load(path)", "transformers.SamModel.from_pretrained(path)"]
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(5))
    report, outputs = _stock(folder, inputs=inputs)
    assert outputs is not None and not any(report.values()), report
    with torch.no_grad():
        scores, masks = model.module(**inputs, return_dict=False)
    assert masks.shape == (2, 1, 3, 32, 32) and masks.std() > 0.01
    assert (outputs["masks"] - masks).abs().max() < 1e-6 and (outputs["scores"] - scores).abs().max() < 1e-6


def test_the_config_of_equal_layers_says_their_widths(exported, original):
    model, folder, _ = exported(UNIFORM)
    before, after = (json.loads((path / "config.json").read_text()) for path in (original, folder))
    assert {key for key in after if after[key] != before.get(key)} == {"vision_config"}
    assert after["vision_config"] == {**before["vision_config"], "hidden_size": 24, "mlp_dim": 40}
    stock = transformers.SamModel.from_pretrained(folder).eval()
    assert torch.equal(_compute(stock, model), _compute(model.module, model))
    assert sum(p.numel() for p in stock.parameters()) == model.size().parameters
    again = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    assert again.surgery == {} and again.size() == model.size()
    assert torch.equal(_compute(load(folder), model), _compute(model.module, model))


@pytest.mark.parametrize("case", OTHERS)
def test_other_sizes_are_in_the_manifest_and_come_back(case, exported, original):
    model, folder, info = exported(OTHERS[case])
    expected = _compute(model.module, model)
    assert info.loads_with[1] == "import compress; transformers.SamModel.from_pretrained(path)"
    loaded, manifest = read_checkpoint(folder)
    assert manifest.surgery == model.surgery == planned_surgery(model.config, *OTHERS[case])
    for module in (loaded, compress.load(folder), transformers.SamModel.from_pretrained(folder).eval()):
        assert torch.equal(_compute(module, model), expected)
    config = json.loads((folder / "config.json").read_text())
    before = json.loads((original / "config.json").read_text())["vision_config"]
    assert config["vision_config"] == {**before, "transformers_weights": STOP}
    assert stored_surgery(folder, model.family, model.config) == model.surgery


@pytest.mark.parametrize("case", OTHERS)
def test_their_size_is_predicted(case, slimmed, exported):
    model, folder, info = exported(OTHERS[case])
    spec = model.spec.cut(planned_surgery(model.config, *OTHERS[case]))
    assert predict_bytes(spec, "compress") == info.bytes
    assert spec.size() == model.size() and model.size().parameters < model.spec.parameters


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["plain", "ignoring sizes"])
@pytest.mark.parametrize("case", ["other widths per layer", "the embedding alone"])
def test_code_that_does_not_know_us_refuses_them(case, options, exported):
    _, folder, _ = exported(OTHERS[case])
    error, outputs = _stock(folder, **options)
    assert outputs is None and STOP in error


@pytest.mark.parametrize("case", ["other widths per layer", "the embedding alone"])
def test_without_their_manifest_they_are_refused(case, exported):
    _, folder, _ = exported(OTHERS[case])
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "transformers_weights"):
        del config[key]
    del config["vision_config"]["transformers_weights"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "compress.json").unlink()
    with pytest.raises(SourceError, match="has shape"):
        load(folder)
    with pytest.raises(SourceError, match="the config implies"):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.SamModel.from_pretrained(folder)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["plain", "ignoring sizes"])
def test_the_encoder_alone_does_not_load(options, exported):
    """Its class reads a part of the config, and would fill other sizes with random numbers."""
    _, folder, _ = exported(OTHERS["other widths per layer"])
    with pytest.raises(ValueError, match=STOP):
        transformers.SamVisionModel.from_pretrained(folder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [UNIFORM, OTHERS["other widths per layer"]], ids=["uniform", "global"])
def test_a_fresh_process_computes_the_same_masks(sizes, exported):
    model, folder, _ = exported(sizes)
    found = verify_export(model, folder, seed=3, progress=SilentProgress())
    assert (found.failure, found.max_abs_error) == (None, 0.0) and found.verified
    changed = model.module.get_parameter("mask_decoder.upscale_conv2.bias")  # which moves masks alone
    changed.add_(0.5)
    found = verify_export(model, folder, seed=3, progress=SilentProgress())
    assert not found.verified and "the outputs differ" in str(found.failure)
    assert found.max_abs_error is not None and found.max_abs_error > 1e-3


@pytest.mark.parametrize("format", ["torchao", "sdnq", "compressed-tensors", "bitsandbytes-nf4"])
def test_formats_of_other_kinds_of_models_are_refused(format, exported):
    with pytest.raises(PlanError, match=r"a model of the family sam is"):
        exported(UNIFORM, format)


def test_layers_that_differ_are_written_by_no_stock_format(exported):
    with pytest.raises(PlanError, match="cannot build layers that were cut to sizes of their own") as raised:
        exported(OTHERS["other widths per layer"], "dequantized")
    assert raised.value.hint == "use compress"  # no config has room for them, padded or not


@pytest.mark.parametrize(
    ("sizes", "vision"),
    [((384, (32,) * 12, (1536,) * 12), (384, 1536)), ((168, (14,) * 12, (696,) * 12), (168, 696))],
    ids=["half", "quarter"],
)
def test_published_sizes_are_stock_configs(sizes, vision):
    from compress.models.registry import family_for
    from compress.models.shapes import complete_config

    config, family = complete_config("SamModel", {"model_type": "sam"}, "config.json"), family_for("SamModel")
    surgery = planned_surgery(config, *sizes)
    form = stored_form(family, config, surgery)
    assert form.surgery == {}
    assert form.config["vision_config"] == {"hidden_size": vision[0], "mlp_dim": vision[1]}
    assert family.paper_macs(form.config) == family.paper_macs(config, shapes=flat_shapes(surgery))
    moved = {**surgery, "vision_encoder.layers.3.attn": ModuleSurgery(
        shapes=surgery["vision_encoder.layers.3.attn"].shapes, attributes={"scale": 0.125})}  # fmt: skip
    assert family.native_config(config, moved) is None  # stock code would compute another scale
