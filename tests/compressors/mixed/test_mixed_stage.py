"""The stage that allocates bits, whole: on a tiny model, from the plan to equal bytes after a kill."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from compress.calibration.content import hash_weights
from compress.calibration.sensitivity_table import read_table
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.quantization.mixed.stage import samples_of, split_calls
from compress.errors import PlanError, SourceError, StageError
from compress.progress import SilentProgress
from compress.recipes.allocation import ALLOCATED
from compress.recipes.schema import ModelRef
from compress.recipes.stages import MixdqSettings, ViditQSettings
from compress.resuming import Reopener
from compress.runtime.linear import QuantizedLinear

QUIET = SilentProgress()


def mixdq(mean_bits=4.0, **changes):
    return MixdqSettings(budget={"mean_bits": mean_bits}, **{"bits": (2, 4, 8), **changes})


def vidit_q(mean_bits=4.0, bits=(2, 4, 8), **changes):
    allocation = {"budget": {"mean_bits": mean_bits}, "bits": bits}
    return ViditQSettings(bits=allocation, **{"adaln_weight_bits": None, **changes})


def space(folder, **changes):
    for name in ("work", "shared"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Workspace(folder / "work", folder / "shared", **changes)


def apply(model, settings, calibration, workspace):
    return registry.get(settings.method).apply(model, settings, calibration, workspace, QUIET)


def plan(model, settings):
    return registry.get(settings.method).plan(model.spec, settings)


def relative(a, b):
    return float((a - b).norm() / b.norm())


SETTINGS = [
    mixdq(),
    mixdq(3.0, group_size=16, rounding="gptq", clip="mse"),
    mixdq(6.0, bits=(4, 8, 16), activation_bits=(8, 16), activation_budget={"protect": 0.2}),
    mixdq(4.0, activation_bits=(4, 8), activation_budget={"mean_bits": 6.0}),
    mixdq(4.0, activation_scale="static", adaln_weight_bits=8),
    mixdq(4.0, activation_scale="static", activation_bits=(8, 16), activation_budget={"protect": 0.3}),
    mixdq(4.0, objective="mixdq", fixed={"*.attn1.to_q": 8, "*.attn1.to_k": 16}, adaln_weight_bits=16),
    vidit_q(4.0),
    vidit_q(3.0, bits=(2, 4, 16), rotation="block", act_exponent=0.5, low_rank=4, rounding="gptq"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda item: str(item)[:60])
def test_budget_bytes_and_records_agree(settings, opened, calibrate, outputs, tmp_path):
    model = opened()
    exact = outputs(model)
    planned = plan(model, settings)
    details = apply(model, settings, calibrate(model), space(tmp_path))
    asked = settings.allocation.budget.mean_bits
    used = details["allocation"]["used"]
    assert used["mean_bits"] <= asked
    assert used["bytes"] <= planned.after.bytes
    # To the byte: what the program counted is what the model holds.
    assert model.size().bytes == used["bytes"]
    schemes = {n: m.scheme for n, m in model.module.named_modules() if isinstance(m, QuantizedLinear)}
    assert schemes == model.quantization
    bits = {row["name"]: row["weight_bits"] for row in details["allocation"]["layers"]}
    assert {name: bits[name] for name in schemes} == {name: scheme.bits for name, scheme in schemes.items()}
    assert all(number == 16 for name, number in bits.items() if name not in schemes)
    assert [row["name"] for row in details["layers"]] == [row["name"] for row in planned.layers]
    assert {row["name"] for row in details["layers"] if row["quantized"]} == set(schemes)
    assert relative(outputs(model), exact) < 0.7
    measured = details["allocation"]["measured"]["sqnr_db"]
    assert 0 < measured < 60
    json.dumps(details, allow_nan=False)


def test_more_bits_come_closer(opened, calibrate, tmp_path):
    errors = []
    for mean in (2.5, 4.0, 8.0):
        model = opened()
        details = apply(model, mixdq(mean), calibrate(model), space(tmp_path / str(mean)))
        errors.append(details["allocation"]["measured"]["sqnr_db"])
    assert errors == sorted(errors)
    assert errors[-1] > errors[0] + 15


def test_what_is_shipped_is_what_was_measured(opened, calibrate, tmp_path):
    settings, model = mixdq(), opened()
    calibration = calibrate(model)
    _, compared = split_calls(calibration, settings)
    with torch.no_grad():
        exact = [model.module(**call, return_dict=False)[0] for call in compared]
    details = apply(model, settings, calibration, space(tmp_path))
    with torch.no_grad():
        found = [model.module(**call, return_dict=False)[0] for call in compared]
    signal = sum(float(item.double().square().sum()) for item in exact)
    pairs = zip(exact, found, strict=True)
    noise = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    db = 10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64))
    assert float(db) == pytest.approx(details["allocation"]["measured"]["sqnr_db"], abs=2e-3)


def test_sixteen_bit_models_are_measured_in_float32_and_go_back(opened, calibrate, outputs, tmp_path):
    model = opened(dtype="bfloat16")
    exact = outputs(model)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    settings = vidit_q(5.0, bits=(2, 4, 8, 16), act_exponent="sweep")
    details = apply(model, settings, calibrate(model), space(tmp_path))
    state = model.module.state_dict()
    floats = [name for name in state if name in before]
    assert all(state[name].dtype == before[name].dtype for name in floats)
    untouched = [name for name in floats if ".norm1.emb." in name or name.startswith("proj_out")]
    assert untouched
    assert all(torch.equal(state[name], before[name]) for name in untouched)
    assert model.size().bytes == details["allocation"]["used"]["bytes"]
    assert relative(outputs(model), exact) < 0.3


def test_the_largest_budget_that_a_plan_accepts_is_kept(opened, calibrate, tmp_path):
    def asked(size):
        allocation = {"budget": {"bytes": size}, "bits": (2, 4, 8)}
        return ViditQSettings(bits=allocation, adaln_weight_bits=None)

    with pytest.raises(PlanError, match="more than every layer takes") as caught:
        plan(opened(), asked(10**9))
    largest = int(re.search(r"to ([\d,]+) bytes can be asked", str(caught.value))[1].replace(",", ""))
    model = opened()
    plan(model, asked(largest))
    details = apply(model, asked(largest), calibrate(model), space(tmp_path))
    assert model.size().bytes == details["allocation"]["used"]["bytes"] < largest
    assert set(details["allocation"]["groups"][0]["histogram"]) == {"8"}


class Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


class KilledAt(SilentProgress):
    """Kills the stage when so many units of a step are done."""

    def __init__(self, label, units):
        self.label, self.units, self.open = label, units, []

    def start(self, label, total):
        self.open.append(label)

    def finish(self, completed=True):
        self.open.pop()

    def advance(self, units=1, detail=""):
        if self.open[-1] == self.label:
            self.units -= units
            if self.units < 0:
                raise Killed


class Notes(SilentProgress):
    def __init__(self):
        self.steps, self.notes = [], []

    def note(self, text):
        self.notes.append(text)

    def start(self, label, total):
        self.steps.append(label)


@pytest.mark.parametrize(
    ("label", "units"), [("choose transforms", 3), ("round layers", 5), ("sensitivities", 20)]
)
def test_killed_and_resumed_gives_the_same_bytes(opened, calibrate, tmp_path, label, units):
    settings = vidit_q(4.0, act_exponent=0.5, rotation="block", rounding="gptq")
    hashes, details = [], []
    for kill in (False, True):
        workspace, model = space(tmp_path / str(kill)), opened()
        method, calibration = registry.get("vidit_q"), calibrate(model)
        if kill:
            with pytest.raises(Killed):
                method.apply(model, settings, calibration, workspace, KilledAt(label, units))
            model = opened()
        details.append(method.apply(model, settings, calibration, workspace, QUIET))
        hashes.append(hash_weights(model.module))
    assert hashes[0] == hashes[1]
    assert details[0]["layers"] == details[1]["layers"]
    rows = [{tuple(row) for row in item["sensitivity"]["rows"]} for item in details]
    assert rows[0] == rows[1]


def test_a_resumed_stage_does_nothing_twice(opened, calibrate, tmp_path):
    workspace, model = space(tmp_path), opened()
    calibration, method = calibrate(model), registry.get("vidit_q")
    method.apply(model, vidit_q(4.0), calibration, workspace, QUIET)
    files = {path: path.stat().st_mtime_ns for path in workspace.folder.rglob("*.safetensors")}
    again, notes = opened(), Notes()
    method.apply(again, vidit_q(4.0), calibration, workspace, notes)
    assert "input statistics" not in notes.steps
    assert "round layers" not in notes.steps
    assert files == {path: path.stat().st_mtime_ns for path in workspace.folder.rglob("*.safetensors")}
    assert hash_weights(again.module) == hash_weights(model.module)


def test_few_samples_to_compare_on_are_told(opened, calibrate, tmp_path):
    model, notes = opened(), Notes()
    calibration = calibrate(model)
    registry.get("mixdq").apply(model, mixdq(), calibration, space(tmp_path), notes)
    (told,) = (note for note in notes.notes if note.startswith("allocations are compared on"))
    assert f"on {samples_of(8, calibration.samples)[1]} sample" in told
    assert [samples_of(8, have) for have in (2, 5, 15, 16, 40)] == [(1, 1), (2, 3), (7, 8), (8, 8), (8, 8)]


def test_a_damaged_layer_of_the_bank_is_rounded_again(opened, calibrate, tmp_path):
    workspace, model = space(tmp_path), opened()
    calibration = calibrate(model)
    apply(model, mixdq(), calibration, workspace)
    expected = hash_weights(model.module)  # now: the layers' tensors are the file, mapped into memory
    file = sorted((workspace.folder / "bank").iterdir())[3]
    whole = file.read_bytes()
    file.write_bytes(whole[:-40] + bytes(20) + whole[-20:])
    again, notes = opened(), Notes()
    registry.get("mixdq").apply(again, mixdq(), calibration, workspace, notes)
    assert "round layers" in notes.steps
    assert file.read_bytes() == whole
    assert hash_weights(again.module) == expected


def test_the_rule_of_a_chosen_layer_tells_so(opened, calibrate, tmp_path):
    """By it `bits.yaml` is written, also where floating point is the only other choice."""
    model = opened()
    apply(model, mixdq(10.0, bits=(8, 16)), calibrate(model), space(tmp_path))
    assert {scheme.bits for scheme in model.quantization.values()} == {8}
    assert all(scheme.decided_by.startswith(ALLOCATED) for scheme in model.quantization.values())


def test_another_budget_uses_the_sensitivities_again(opened, calibrate, tmp_path):
    tables = []
    for mean in (3.0, 5.0):
        model, workspace = opened(), space(tmp_path)
        apply(model, mixdq(mean), calibrate(model), Workspace(tmp_path / str(mean), workspace.shared))
        tables.append([path.read_bytes() for path in workspace.shared.iterdir()])
    assert len(tables[0]) == 1
    assert tables[0] == tables[1]


def test_fresh_measures_anew(opened, calibrate, tmp_path):
    first = space(tmp_path / "a")
    apply(opened(), mixdq(), calibrate(opened()), first)
    (table,) = first.shared.iterdir()
    rows = {row.place: row.loss for row in read_table(table).rows}
    lines = table.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "loss": 0.5})
    table.write_text("\n".join(lines) + "\n")
    model = opened()
    apply(model, mixdq(), calibrate(model), Workspace(space(tmp_path / "b").folder, first.shared, fresh=True))
    assert list(first.shared.iterdir()) == [table]
    assert {row.place: row.loss for row in read_table(table).rows} == rows


@pytest.mark.slow
def test_processes_give_the_rows_and_bytes_of_one(make_tiny, opened, calibrate, tmp_path):
    folder = make_tiny("DiTTransformer2DModel", name="spread", dtype="bfloat16")
    reopen = Reopener(ModelRef(id=str(folder)), "cpu", None)
    settings = vidit_q(4.0, act_exponent=0.5, rounding="gptq")
    found = []
    for workers in (1, 2):
        model = reopen()
        workspace = space(tmp_path / str(workers), workers=workers, reopen=reopen)
        details = apply(model, settings, calibrate(model), workspace)
        found.append((hash_weights(model.module), details["sensitivity"], details["layers"]))
    assert found[0] == found[1]


def test_a_table_of_the_same_thing_is_used(opened, calibrate, tmp_path):
    model, workspace = opened(), space(tmp_path / "a")
    calibration = calibrate(model)
    details = apply(model, mixdq(), calibration, workspace)
    (table,) = workspace.shared.iterdir()
    moved = table.rename(tmp_path / "mine.jsonl")
    content = moved.read_bytes()
    again, other = opened(), space(tmp_path / "b")
    settings = mixdq(sensitivity={"table": moved})
    assert apply(again, settings, calibration, other)["layers"] == details["layers"]
    assert list(other.shared.iterdir()) == []
    assert moved.read_bytes() == content


@pytest.mark.parametrize("change", ["model", "grid", "rounding", "calibration"])
def test_a_table_of_something_else_is_refused_with_both_hashes(opened, calibrate, tmp_path, change):
    model, workspace = opened(), space(tmp_path / "a")
    apply(model, mixdq(), calibrate(model), workspace)
    (table,) = workspace.shared.iterdir()
    other = opened(seed=1) if change == "model" else opened()
    changes = {"grid": {"group_size": 32}, "rounding": {"rounding": "gptq"}}.get(change, {})
    settings = mixdq(sensitivity={"table": table}, **changes)
    before = table.read_bytes()
    calibration = calibrate(other, seed=4 if change == "calibration" else 0)
    with pytest.raises(SourceError, match="measured on something else") as caught:
        apply(other, settings, calibration, space(tmp_path / "b"))
    assert read_table(table).key[:12] in str(caught.value)
    assert table.read_bytes() == before
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "changes",
    [{"act_exponent": 0.3}, {"rotation": "block"}, {"low_rank": 4}, {"rescale": True}, {"clip": "minmax"}],
    ids=str,
)
def test_what_makes_other_layers_makes_another_table(opened, calibrate, tmp_path, changes):
    model, workspace = opened(), space(tmp_path / "a")
    plain = {"act_exponent": 0.5, "rotation": "none", "low_rank": 0, "clip": "mse"}
    apply(model, vidit_q(4.0, **plain), calibrate(model), workspace)
    (table,) = workspace.shared.iterdir()
    asked = vidit_q(4.0, **{**plain, **changes}).model_dump(exclude={"weight_bits", "activation_bits"})
    asked["bits"]["sensitivity"]["table"] = table
    other = opened()
    with pytest.raises(SourceError, match="measured on something else"):
        apply(other, ViditQSettings(**asked), calibrate(other), space(tmp_path / "b"))


def test_an_unfinished_table_is_refused_and_not_gone_on_with(opened, calibrate, tmp_path):
    model, workspace = opened(), space(tmp_path / "a")
    apply(model, mixdq(), calibrate(model), workspace)
    (table,) = workspace.shared.iterdir()
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-2]) + "\n")
    before, again = table.read_bytes(), opened()
    settings = mixdq(sensitivity={"table": table})
    count = len(lines) - 1
    with pytest.raises(SourceError, match=f"unfinished: {count - 2} of {count} rows are there"):
        apply(again, settings, calibrate(again), space(tmp_path / "b"))
    assert table.read_bytes() == before


def test_the_plan_says_what_is_measured_and_how(opened, tmp_path):
    def notes(settings, **options):
        return " | ".join(plan(opened(**options), settings).notes)

    plain = notes(mixdq())
    assert "42 sensitivities are measured, each on up to 8 samples and 8 steps" in plain
    assert "objective" not in plain
    assert "groups:" not in plain
    table = tmp_path / "mine.jsonl"
    assert f"42 sensitivities are read from {table}, not measured" in notes(
        mixdq(sensitivity={"table": table})
    )
    assert "the paper's objective: the largest sum of decibels" in notes(mixdq(objective="mixdq"))
    whole = {"whole": {"layers": ["*"], "metric": "ssim"}}
    assert "groups: whole (14 layers by ssim)" in notes(mixdq(groups=whole))


def test_fewer_samples_than_asked_for_are_told(opened, calibrate, tmp_path):
    class Notes(SilentProgress):
        def __init__(self):
            self.texts = []

        def note(self, message):
            self.texts.append(message)

    model = opened()
    calibration = calibrate(model)
    heard = Notes()
    registry.get("mixdq").apply(model, mixdq(), calibration, space(tmp_path), heard)
    have = calibration.samples
    assert any(f"on {have // 2} of {have} calibration samples instead of 8" in text for text in heard.texts)


def test_a_table_that_is_not_there_is_refused_and_not_made(opened, calibrate, tmp_path):
    model, path = opened(), tmp_path / "no.jsonl"
    with pytest.raises(SourceError, match=r"no\.jsonl: no such file"):
        apply(model, mixdq(sensitivity={"table": path}), calibrate(model), space(tmp_path))
    assert not path.exists()


def test_a_damaged_sensitivity_names_its_layer(opened, calibrate, tmp_path):
    model, workspace = opened(), space(tmp_path)
    calibration = calibrate(model)
    apply(model, mixdq(), calibration, workspace)
    (table,) = workspace.shared.iterdir()
    lines = table.read_text().splitlines()
    row = json.loads(lines[5])
    lines[5] = json.dumps({**row, "loss": float("nan")})
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(SourceError, match="is nan") as caught:
        apply(opened(), mixdq(), calibration, workspace)
    assert row["layer"] in str(caught.value)


def test_nan_weights_are_refused_by_name(opened, calibrate, tmp_path):
    model = opened()
    calibration = calibrate(model)
    with torch.no_grad():
        model.module.transformer_blocks[1].ff.net[2].weight[0, 0] = torch.nan
    with pytest.raises(StageError):
        apply(model, mixdq(), calibration, space(tmp_path))


def test_a_calibration_of_one_sample_is_refused(opened, tmp_path):
    from compress.calibration.diffusion import record
    from compress.recipes.schema import CalibrationSettings

    model = opened()
    settings = CalibrationSettings(samples=1, steps=2, batch_size=1)
    calibration = record(model, settings, seed=0, cache=tmp_path / "c", progress=QUIET)
    with pytest.raises(StageError, match="the calibration has 1 sample"):
        apply(model, mixdq(), calibration, space(tmp_path))


def test_all_in_floating_point_is_no_stage(opened, calibrate, tmp_path):
    model = opened()
    with pytest.raises(StageError, match="every layer stays in floating point"):
        apply(model, mixdq(16.0, bits=(8, 16)), calibrate(model), space(tmp_path))


def test_the_comparison_sees_other_samples(calibrate, opened):
    measured, compared = split_calls(calibrate(opened()), mixdq())
    assert measured.key != compared.key
    ours, theirs = next(iter(measured)), next(iter(compared))
    assert not torch.equal(ours["hidden_states"], theirs["hidden_states"])


def test_what_processes_need_can_be_sent():
    from compress.compressors.quantization.mixed.bank import Bank
    from compress.compressors.quantization.mixed.quantizer import BankQuantizer
    from compress.compressors.quantization.mixed.sensing import Opener

    for item in (BankQuantizer(Bank(Path("a"), torch.float16)), Opener(int, mixdq(), None)):
        assert pickle.loads(pickle.dumps(item)) == item
