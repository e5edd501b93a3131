"""Quantized mixtures of experts: what is planned is written, and every loader gives the bits of memory."""

from __future__ import annotations

import json
import subprocess
import sys

import compress
import pytest
import torch
import transformers
from compress.compressors import registry
from compress.errors import SourceError, StageError
from compress.exporters.formats import as_shipped, predict_bytes, write
from compress.models.experts import keep_experts_of
from compress.progress import SilentProgress
from compress.runtime.linear import QuantizedLinear
from compress.runtime.linear_experts import LinearExperts
from compress.runtime.moe_config import moe_shape
from compress.runtime.moe_names import expert_linear
from compress.runtime.validate import open_folder
from safetensors.torch import load_file, save_file

from ..quantized_moe import logits, opened, quantized, sequences, settings_of
from ..tiny_moe import CLASSES

METHODS = {
    "rtn": {"weight_bits": 4},
    "smoothquant": {"weight_bits": 8, "act_exponent": 0.6},
    "mixdq": {"budget": {"mean_bits": 5}, "bits": [4, 8], "sensitivity": {"samples": 1}, "points": 1},
}
SPLIT = [name for name in CLASSES if name != "GptOssForCausalLM"]


def _written(model, folder, format="compress"):
    folder.mkdir()
    return write(model, folder, format)


def _from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def _experts(names):
    return [name for name in names if expert_linear(name)]


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_written_and_both_loaders_give_the_bits_of_memory(class_name, dtype, tmp_path):
    model = opened(tmp_path / "m", class_name, dtype=dtype)
    before = model.size()
    plan = registry.get("rtn").plan(model.spec, settings_of("rtn", **METHODS["rtn"]))
    quantized(model, tmp_path, "rtn", **METHODS["rtn"])
    info = _written(model, tmp_path / "out")
    assert info.bytes == predict_bytes(plan.spec, "compress")
    assert plan.after == model.size() and plan.after.parameters == before.parameters
    assert plan.after.parameters_stored == before.parameters_stored
    assert dict(plan.spec.quantization) == model.quantization
    expected, state = logits(model.module), model.module.state_dict()
    stock, report = _from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for module in (stock, compress.load(tmp_path / "out")):
        assert torch.equal(logits(module), expected)
        found = module.state_dict()
        assert list(found) == list(state)
        assert all(t.dtype == state[n].dtype and torch.equal(t, state[n]) for n, t in found.items())


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_expert_is_quantized_and_no_router(class_name, tmp_path):
    model = opened(tmp_path / "m", class_name)
    plan = registry.get("rtn").plan(model.spec, settings_of("rtn"))
    details = quantized(model, tmp_path, "rtn")
    shape, listed = moe_shape(model.config), _experts(model.quantization)
    assert any("routers" in note or "role: router" in note for note in plan.notes)
    if class_name == "GptOssForCausalLM":
        assert not listed and any("experts of GptOssForCausalLM stay in floating" in n for n in plan.notes)
        return
    assert len(listed) == 3 * shape.routing.experts * len(shape.sparse)
    first = model.family.linears(model.module)
    order = [expert_linear(site.name)[1:] for site in first if expert_linear(site.name)][:6]
    leaves = ("gate_proj", "up_proj", "down_proj")
    assert order == [(expert, leaf) for expert in (0, 1) for leaf in leaves]
    roles = {site.role for site in first if site.name not in model.quantization}
    assert roles <= {"router", "head"} and details["label"] == "W8A8"
    rows = {row["name"]: row for row in details["layers"]}
    assert rows[listed[0]]["role"] == "ff.gate" and rows[listed[0]]["sqnr_db"] > 20
    assert not any("router" in name or name.endswith("mlp.gate") for name in model.quantization)


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("method", ["smoothquant", "mixdq"])
def test_two_runs_give_the_same_bytes_in_the_bytes_planned(class_name, method, tmp_path):
    files = []
    for place in ("a", "b"):
        model = opened(tmp_path / place / "m", class_name)
        plan = registry.get(method).plan(model.spec, settings_of(method, **METHODS[method]))
        quantized(model, tmp_path / place, method, **METHODS[method])
        info = _written(model, tmp_path / place / "out")
        if method == "smoothquant":
            assert info.bytes == predict_bytes(plan.spec, "compress")
        files.append((tmp_path / place / "out" / "model.safetensors").read_bytes())
        assert torch.equal(logits(compress.load(tmp_path / place / "out")), logits(model.module))
    assert files[0] == files[1]


@pytest.mark.parametrize("class_name", SPLIT)
def test_dequantized_it_is_a_stock_checkpoint(class_name, tmp_path):
    model = opened(tmp_path / "m", class_name)
    names = set(load_file(tmp_path / "m" / "model.safetensors"))
    plan = registry.get("rtn").plan(model.spec, settings_of("rtn"))
    quantized(model, tmp_path, "rtn")
    shipped = as_shipped(model, "dequantized")
    assert not any(isinstance(child, LinearExperts) for child in shipped.module.modules())
    assert any(isinstance(child, LinearExperts) for child in model.module.modules())
    info = _written(model, tmp_path / "out", "dequantized")
    assert info.bytes == predict_bytes(plan.spec, "dequantized")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == names
    stock, report = _from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(stock), logits(compress.load(tmp_path / "out")))
    shipped.module.set_experts_implementation("eager")
    stock.set_experts_implementation("eager")
    assert torch.equal(logits(stock), logits(shipped.module))


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("keep", ["*.experts.*", "*.experts.1.*", "*.experts.*.down_proj", "*self_attn*"])
def test_what_is_kept_stays_as_it_was(class_name, keep, tmp_path):
    model = opened(tmp_path / "m", class_name)
    before = {name: tensor.clone() for name, tensor in model.family.split(model.module).state_dict().items()}
    model.family.fuse(model.module)
    plan = registry.get("rtn").plan(model.spec, settings_of("rtn", keep=[keep]))
    quantized(model, tmp_path, "rtn", keep=[keep])
    split = [child for child in model.module.modules() if isinstance(child, LinearExperts)]
    assert bool(split) == (keep != "*.experts.*")  # experts of which none is quantized are the stock class's
    info = _written(model, tmp_path / "out")
    assert info.bytes == predict_bytes(plan.spec, "compress")
    expected = logits(model.module)
    stock, report = _from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    ours = compress.load(tmp_path / "out")
    assert torch.equal(logits(ours), expected) and torch.equal(logits(stock), expected)
    model.family.split(ours)
    kept = [name for name, tensor in ours.state_dict().items() if name in before]
    assert kept and all(torch.equal(ours.state_dict()[name], before[name]) for name in kept)
    assert all(torch.equal(ours.get_parameter(name), before[name]) for name in before if _router(name))
    for way, module in {"stock": stock, "ours": compress.load(tmp_path / "out")}.items():
        module.save_pretrained(tmp_path / way)  # as the library does it
        assert torch.equal(logits(compress.load(tmp_path / way)), expected)
        assert torch.equal(logits(_from_pretrained(tmp_path / way)), expected)


def test_the_library_is_not_asked_to_fuse_what_is_stored_expert_by_expert(tmp_path):
    model = opened(tmp_path / "m", "Qwen3MoeForCausalLM")
    quantized(model, tmp_path, "rtn", keep=["*.experts.1.*"])
    _written(model, tmp_path / "out")
    quantizer = compress.load(tmp_path / "out").hf_quantizer
    assert quantizer.update_weight_conversions(["anything"], model.module) == []


def _router(name):
    return name.endswith(("mlp.gate.weight", "mlp.router.weight"))


PROGRAM = """
import sys, transformers
def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
for folder in sys.argv[1:]:
    try:
        load(folder)
    except (ValueError, RuntimeError) as error:
        told = str(error)
        assert 'compress has to be imported' in told or 'ignore_mismatched_sizes' in told, told
    else:
        sys.exit('it loaded')
import compress
for folder in sys.argv[1:]:
    load(folder)
"""


@pytest.mark.slow
def test_stock_transformers_stops(tmp_path):
    folders = []
    for class_name, keep in (
        ("MixtralForCausalLM", ()),
        ("MixtralForCausalLM", ("*self_attn*",)),
        ("OlmoeForCausalLM", ("*self_attn*", "*.down_proj", "*.experts.2.*")),
    ):
        place = tmp_path / str(len(folders))
        model = opened(place / "m", class_name)
        quantized(model, place, "rtn", keep=keep)
        _written(model, place / "out")
        # The library drops the key that stops it first; what stops it then is the tensor without content.
        compress.load(place / "out").save_pretrained(place / "saved")
        folders += [str(place / "out"), str(place / "saved")]
    command = [sys.executable, "-P", "-c", PROGRAM, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_experts_that_no_token_meets_are_rounded_by_their_weights_and_told(tmp_path):
    class Told(SilentProgress):
        notes: list[str] = []

        def note(self, text):
            self.notes.append(text)

    model = opened(tmp_path / "m", "MixtralForCausalLM")
    router = model.module.model.layers[1].mlp.gate.weight
    router[4] = -router[5]  # of two experts one comes last whenever the other comes first,
    router[3] = 0.0
    router[2] = 0.0
    text = sequences(tmp_path / "few", samples=2, ids=1, length=1)  # and there is one token only
    stage = registry.get("smoothquant")
    weight = model.module.model.layers[1].mlp.experts.gate_up_proj.clone()
    settings = settings_of("smoothquant", weight_symmetric=True, keep=["*self_attn*"])
    details = stage.apply(model, settings, text, None, Told())
    unreached = details["experts_unreached"]
    assert len(unreached) == 4 * 3 and any(
        "no token of the calibration met 12 experts" in n for n in Told.notes
    )
    rows = {row["name"]: row["sqnr_db"] for row in details["layers"] if row["quantized"]}
    assert {name.rpartition(".")[0] for name, value in rows.items() if value is None} == set(unreached)
    found = {}
    for expert in range(6):
        name = f"model.layers.1.mlp.experts.{expert}"
        layer = model.module.get_submodule(f"{name}.gate_proj")
        assert isinstance(layer, QuantizedLinear)
        found[expert] = (layer.equivalent_weight(), weight[expert, :24])
        assert torch.isfinite(layer.equivalent_weight()).all()
    assert torch.isfinite(logits(model.module)).all() and len(found) == 6


def test_static_grids_of_experts_that_no_token_meets_are_those_of_the_others(tmp_path):
    model = opened(tmp_path / "m", "MixtralForCausalLM")
    text = sequences(tmp_path / "few", samples=2, ids=1, length=1)
    details = quantized(model, tmp_path, "rtn", text, activation_scale="static")
    ends = {row["name"]: row["activation_range"] for row in details["layers"] if row["quantized"]}
    downs = [ends[f"model.layers.1.mlp.experts.{expert}.down_proj"] for expert in range(6)]
    assert min(low for low, _ in downs) <= 0.0 < max(high for _, high in downs)
    joined = [min(low for low, _ in downs), max(high for _, high in downs)]
    assert downs.count(joined) >= 4  # the four that were not met
    assert torch.isfinite(logits(model.module)).all()


def test_a_layer_that_every_token_meets_has_to_be_reached(tmp_path):
    model = opened(tmp_path / "m", "MixtralForCausalLM")
    module = model.module.model.layers[0].mlp
    module.forward = lambda states: torch.zeros_like(states)
    text = sequences(tmp_path / "text")
    text.observe(model, ["model.layers.1.self_attn.q_proj"], lambda *_: None, SilentProgress())
    model.module.model.layers[1].self_attn.forward = lambda *_, **__: (torch.zeros(2, 20, 32), None)
    with pytest.raises(StageError, match=r"self_attn\.q_proj: no forward reaches"):
        text.observe(model, ["model.layers.1.self_attn.q_proj"], lambda *_: None, SilentProgress())


def test_pruned_first_the_experts_that_are_left_are_quantized(tmp_path):
    model = opened(tmp_path / "m", "Qwen3MoeForCausalLM")
    kept = dict.fromkeys(moe_shape(model.config).sparse, (1, 3, 4))
    rows = torch.zeros(3, 6)
    rows[:, :3], rows[0, 5] = torch.eye(3), 0.5
    keep_experts_of(model, kept, mixing={1: rows})
    spec = model.dense()
    plan = registry.get("rtn").plan(spec, settings_of("rtn", weight_bits=4))
    quantized(model, tmp_path, "rtn", weight_bits=4)
    info = _written(model, tmp_path / "out")
    assert info.bytes == predict_bytes(plan.spec, "compress") and plan.after == model.size()
    assert len(_experts(model.quantization)) == 3 * 3 * len(kept)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == 3
    for load in (compress.load, _from_pretrained):
        assert torch.equal(logits(load(tmp_path / "out")), logits(model.module))


def _changed(folder, change):
    for name in ("config.json", "compress.json"):
        document = json.loads((folder / name).read_text())
        section = document.get("quantization_config", document)
        change(section.get("modules", section.get("quantization")))
        (folder / name).write_text(json.dumps(document))


def test_a_manifest_that_names_experts_that_are_not_there_is_refused(tmp_path):
    model = opened(tmp_path / "m", "MixtralForCausalLM")
    quantized(model, tmp_path, "rtn")
    folder = tmp_path / "out"
    _written(model, folder)
    good = {name: (folder / name).read_text() for name in ("config.json", "compress.json")}
    first = "model.layers.0.mlp.experts.0.up_proj"

    def rename(modules):
        modules["model.layers.0.mlp.experts.6.up_proj"] = modules.pop(first)

    _changed(folder, rename)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.startswith(first)]:
        tensors[name.replace("experts.0.up", "experts.6.up")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (compress.load, _from_pretrained):
        with pytest.raises(SourceError, match=r"experts\.6\.up_proj, which the model does not have"):
            load(folder)
    for name, text in good.items():
        (folder / name).write_text(text)
    with pytest.raises(SourceError, match=r"experts\.0\.up_proj"):
        open_folder(folder)


def test_a_dense_folder_may_still_store_experts_whole_or_one_by_one_not_both(tmp_path):
    model = opened(tmp_path / "m", "OlmoeForCausalLM")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(6, 32, 24)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="stored as a whole, and expert by expert"):
        open_folder(tmp_path / "m")
    assert model.spec.tensors
