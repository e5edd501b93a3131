"""Bits for experts: those of a layer share choices, are measured so, and keep the budget to the byte."""

from __future__ import annotations

import json

import compress
import pytest
import torch
from compress.calibration.precision import computing_in
from compress.calibration.sensitivity_table import read_table
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.quantization.mixed.bank import Bank
from compress.compressors.quantization.mixed.candidates import find_candidates
from compress.compressors.quantization.mixed.scoring import input_elements
from compress.compressors.quantization.scheme import survey_linears
from compress.errors import PlanError
from compress.exporters.formats import write
from compress.models.open import read_spec
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.recipes.stages import MixdqSettings
from compress.resuming import Reopener
from compress.runtime.moe_names import expert_linear

from ...quantized_moe import logits, opened, quantized, sequences
from ...tiny_moe import make_moe

LEAVES = ("gate_proj", "up_proj", "down_proj")


def mixdq(mean_bits=4.0, **changes):
    base = {"bits": (2, 4, 8), "sensitivity": {"samples": 2}, "points": 1}
    return {"budget": {"mean_bits": mean_bits}, **base, **changes}


def candidates(folder, class_name="MixtralForCausalLM", **changes):
    spec = read_spec(ModelRef(id=str(make_moe(folder, class_name)))).split()
    settings = MixdqSettings(**mixdq(**changes))
    survey = survey_linears(spec.family, spec.family.split(spec.meta_module()), settings, {})
    return find_candidates(spec.family, survey, settings, spec.dtype, spec.shared).layers


def test_experts_of_a_layer_share_three_choices(tmp_path):
    together = candidates(tmp_path / "a")
    each = {layer.site.name: layer for layer in candidates(tmp_path / "b", experts="each")}
    assert len(together) == 3 * (4 + 3) and len(each) == 3 * (4 + 3 * 6)
    for layer in together:
        alone = [each[name] for name in layer.names]
        assert len(alone) == (6 if expert_linear(layer.site.name) else 1)
        assert layer.weights == sum(single.weights for single in alone)
        for label, cost in layer.costs.items():
            assert cost == sum(single.costs[label] for single in alone)
        found = [expert_linear(name) for name in layer.names]
        assert len({name and (name[0], name[2]) for name in found}) == 1
        assert [single.site.name for single in layer.singles] == list(layer.names)
    assert {name for layer in together for name in layer.names} == set(each)


def test_an_expert_with_bits_of_its_own_is_left_out_of_the_choice(tmp_path):
    layers = candidates(tmp_path / "m", fixed={"*.experts.2.*": 8}, keep=["*.experts.5.down_proj"])
    sizes = {layer.names: layer for layer in layers}
    gates = tuple(f"model.layers.0.mlp.experts.{index}.gate_proj" for index in (0, 1, 3, 4, 5))
    downs = tuple(f"model.layers.0.mlp.experts.{index}.down_proj" for index in (0, 1, 3, 4))
    assert gates in sizes and downs in sizes
    alone = sizes[("model.layers.0.mlp.experts.2.gate_proj",)]
    assert list(alone.costs) == ["w8"] and alone.together == ()


def test_choices_for_each_expert_need_experts(tmp_path, make_llm):
    stage = registry.get("mixdq")
    spec = read_spec(ModelRef(id=str(make_llm("LlamaForCausalLM"))))
    with pytest.raises(PlanError, match="experts: each has no effect"):
        stage.plan(spec, MixdqSettings(**mixdq(experts="each")))
    notes = stage.plan(
        read_spec(ModelRef(id=str(make_moe(tmp_path / "m", "MixtralForCausalLM")))), MixdqSettings(**mixdq())
    ).notes
    assert any("dealt out to 66 layers" in note for note in notes)
    assert any("54 layers of experts share 9 choices" in note for note in notes)
    assert any(note.startswith("63 sensitivities are measured") for note in notes)  # 21 choices at 3 bits


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV2ForCausalLM"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": "each", "bits": (4, 8), "budget": {"mean_bits": 6}},
        {"rounding": "gptq", "group_size": None, "bits": (3, 16), "budget": {"mean_bits": 9}},
        {"activation_bits": (8, 16), "activation_budget": {"mean_bits": 10.0}},
        {"activation_scale": "static"},
    ],
    ids=str,
)
def test_the_budget_is_kept_and_counted_to_the_byte(class_name, changes, tmp_path):
    model = opened(tmp_path / "m", class_name)
    settings = mixdq(**changes)
    planned = registry.get("mixdq").plan(model.spec, MixdqSettings(**settings))
    details = quantized(model, tmp_path, "mixdq", **settings)
    used = details["allocation"]["used"]
    assert used["mean_bits"] <= settings["budget"]["mean_bits"]
    assert model.size().bytes == used["bytes"]
    assert used["bytes"] <= planned.after.bytes * 1.01  # scales, which mean bits do not count
    rows = details["allocation"]["layers"]
    assert sum(row["bytes"] for row in rows) == used["allocated_bytes"]
    bits = {row["name"]: row["weight_bits"] for row in rows}
    assert {name: bits[name] for name in model.quantization} == {
        name: scheme.bits for name, scheme in model.quantization.items()
    }
    grouped = {}
    for name, number in bits.items():
        if expert := expert_linear(name):
            grouped.setdefault((expert[0], expert[2]), set()).add(number)
    if "experts" not in changes:
        assert all(len(found) == 1 for found in grouped.values())
    (group,) = details["allocation"]["groups"]
    assert group["layers"] == len(bits) == sum(group["histogram"].values())
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out", "compress")
    assert torch.equal(logits(compress.load(tmp_path / "out")), logits(model.module))


def test_a_shared_choice_is_measured_with_all_of_its_experts_rounded(tmp_path):
    model = opened(tmp_path / "m", "OlmoeForCausalLM")
    text = sequences(tmp_path / "text")
    fresh = opened(tmp_path / "again", "OlmoeForCausalLM")
    details = quantized(model, tmp_path, "mixdq", text, **mixdq())
    rows = {(row[1], row[2]): row[5] for row in details["sensitivity"]["rows"]}
    mixture = "model.layers.1.mlp.experts"
    assert {name for name, _ in rows if expert_linear(name)} == {
        f"model.layers.{layer}.mlp.experts.0.{leaf}" for layer in range(3) for leaf in LEAVES
    }
    fresh.family.split(fresh.module)
    (folder,) = (tmp_path / "work").glob("**/bank")
    bank = Bank(folder, torch.float32)

    def loss(names):
        noise = signal = 0.0
        with computing_in(fresh.module, torch.float32):
            for row in text.ids()[:2]:
                exact = fresh.module(input_ids=row[None], use_cache=False).logits
                layers = {name: fresh.module.get_submodule(name) for name in names}
                for name, layer in layers.items():
                    made = bank.layer(name, "w2", layer, {"activation": None})
                    layer.forward = made.reference_forward
                found = fresh.module(input_ids=row[None], use_cache=False).logits
                for layer in layers.values():
                    del layer.forward
                noise += float((found - exact).double().square().sum())
                signal += float(exact.double().square().sum())
        return noise / signal

    with torch.no_grad():
        whole = loss([f"{mixture}.{index}.down_proj" for index in range(6)])
        one = loss([f"{mixture}.0.down_proj"])
    assert rows[f"{mixture}.0.down_proj", "w2"] == pytest.approx(whole, rel=1e-5)
    assert one < 0.7 * whole


def test_every_expert_is_rounded_from_its_own_weight(tmp_path):
    model = opened(tmp_path / "m", "MixtralForCausalLM")
    state = model.family.split(model.module).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    quantized(model, tmp_path, "mixdq", **mixdq(8.0, bits=(6, 8)))
    for name in model.quantization:
        found = model.module.get_submodule(name).equivalent_weight()
        assert torch.allclose(found, before[f"{name}.weight"], atol=0.05), name


def test_an_expert_that_no_token_meets_counts_as_losing_nothing(tmp_path):
    model = opened(tmp_path / "m", "MixtralForCausalLM")
    text = sequences(tmp_path / "few", samples=4, ids=1, length=2)  # one token, over and over
    details = quantized(model, tmp_path, "mixdq", text, **mixdq(experts="each", bits=(2, 8)))
    unreached = details["experts_unreached"]
    assert unreached
    bits = {row["name"]: row["weight_bits"] for row in details["allocation"]["layers"]}
    assert all(bits[f"{expert}.{leaf}"] == 2 for expert in unreached for leaf in LEAVES)
    assert 8 in bits.values() and torch.isfinite(logits(model.module)).all()


def test_inputs_of_experts_are_as_large_as_those_of_the_mean_expert(tmp_path):
    model = opened(tmp_path / "m", "MixtralForCausalLM")
    model.family.split(model.module)
    names = [site.name for site in model.linears()]
    found = input_elements(model, [{"input_ids": torch.arange(20)[None], "use_cache": False}], names)
    assert found["model.layers.0.self_attn.q_proj"] == 20 * 32
    for index in range(6):  # 2 of 6 experts a token
        assert found[f"model.layers.0.mlp.experts.{index}.up_proj"] == -(-20 * 2 * 32 // 6)
        assert found[f"model.layers.0.mlp.experts.{index}.down_proj"] == 20 * 2 * 24 // 6


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    folder = make_moe(tmp_path / "m", "Qwen2MoeForCausalLM", dtype="bfloat16")
    tables = []
    for workers in (1, 2):
        model = opened_again(folder)
        place = tmp_path / str(workers)
        for name in ("work", "shared"):
            (place / name).mkdir(parents=True)
        reopen = Reopener(ModelRef(id=str(folder)), "cpu", None)
        workspace = Workspace(place / "work", place / "shared", workers=workers, reopen=reopen)
        text = sequences(tmp_path / "text")
        torch.set_num_threads(1)
        registry.get("mixdq").apply(model, MixdqSettings(**mixdq()), text, workspace, SilentProgress())
        (file,) = (place / "shared").glob("sensitivity-*.jsonl")
        rows = sorted(read_table(file).rows, key=lambda row: row.place)
        tables.append([(row.place, row.value) for row in rows])
    assert tables[0] == tables[1]


def opened_again(folder):
    from compress.models.open import open_model

    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def test_killed_while_it_measures_it_goes_on_to_the_same_bytes(tmp_path):
    class Killed(SilentProgress):
        def advance(self, amount=1, item=""):
            measuring = list((tmp_path / "b" / "shared").glob("*.jsonl"))
            if measuring and item == "model.layers.1.mlp.experts.0.up_proj":
                raise KeyboardInterrupt

    folder = make_moe(tmp_path / "m", "MixtralForCausalLM", dtype="bfloat16")
    text, files, settings = sequences(tmp_path / "text"), [], MixdqSettings(**mixdq())
    for place in ("a", "b"):
        spaces = [tmp_path / place / name for name in ("work", "shared", "out")]
        for space in spaces:
            space.mkdir(parents=True)
        workspace = Workspace(spaces[0], spaces[1])
        stage, model = registry.get("mixdq"), opened_again(folder)
        if place == "b":
            with pytest.raises(KeyboardInterrupt):
                stage.apply(model, settings, text, workspace, Killed())
            model = opened_again(folder)
        details = stage.apply(model, settings, text, workspace, SilentProgress())
        write(model, spaces[2], "compress")
        files.append([(spaces[2] / "model.safetensors").read_bytes(), json.dumps(details["allocation"])])
    assert files[0] == files[1]
