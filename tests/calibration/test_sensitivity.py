"""Sensitivities: one layer at a time, the right numbers, and whole tables after a kill."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from compress.calibration import sensitivity_probe
from compress.calibration.content import hash_weights
from compress.calibration.diffusion import record
from compress.calibration.sensitivity import Candidate, Target, measure, read_measured
from compress.calibration.sensitivity_calls import RecordedCalls
from compress.calibration.sensitivity_probe import Plan, Probe
from compress.calibration.sensitivity_table import read_table
from compress.calibration.similarity import powers, ssim
from compress.compressors.quantization.grid import Grid, dequantize, quantize
from compress.errors import SourceError, StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from compress.runtime.integer import fake_quantize_tokens
from torch import nn

QUIET = SilentProgress()
SETTINGS = CalibrationSettings(samples=4, steps=4, guidance_scale=3.0, batch_size=2)
W2, W4, W8 = (Candidate("weight", f"w{bits}", bits) for bits in (2, 4, 8))
A8 = Candidate("activation", "a8", 8)


@contextmanager
def rounded(name, linear, candidate):
    """Round one layer as the integer layers do; of module level, so that other processes find it."""
    if candidate.kind == "weight":
        before = linear.weight
        grid = Grid(candidate.bits, symmetric=False, clip="minmax")
        weight = dequantize(quantize(before.detach().float(), grid)).to(before.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            linear.weight = before
        return

    def see(_, args):
        rows = args[0].reshape(-1, args[0].shape[-1])
        return fake_quantize_tokens(rows.float(), candidate.bits, True).view(args[0].shape).to(args[0].dtype)

    hook = linear.register_forward_pre_hook(see)
    try:
        yield
    finally:
        hook.remove()


def opened(folder):
    return open_model(ModelRef(id=str(folder)), progress=QUIET)


@dataclass
class Subject:
    folder: Path
    model: object
    calls: RecordedCalls
    names: list[str]

    def measure(self, path, targets, quantizer=rounded, **options):
        options = {"settings": {}, "threads": 1, "progress": QUIET, **options}
        return measure(self.model, self.calls, targets, quantizer, path=path, **options)

    def probe(self, quantizer=rounded, **options):
        return Probe(self.model, Plan(self.calls, tuple(self.names), quantizer, **options))


def subject_of(folder, cache, steps=2):
    model = opened(folder)
    calibration = record(model, SETTINGS, seed=3, cache=cache, progress=QUIET)
    return Subject(folder, model, RecordedCalls(calibration, steps), [site.name for site in model.linears()])


@pytest.fixture
def subject(tiny_dit, tmp_path):
    return subject_of(tiny_dit, tmp_path / "cache")


def all_targets(subject, *candidates, metric="sqnr_db"):
    return [Target(name, candidates, metric) for name in subject.names]


def outputs(subject, edit=None):
    """Whole forwards over the calls, with one layer rounded or none."""
    linear = None if edit is None else subject.model.module.get_submodule(edit[0])
    found = []
    with torch.no_grad():
        for call in subject.calls:
            if edit is None:
                found.append(subject.model.module(**call, return_dict=False)[0])
            else:
                with rounded(edit[0], linear, edit[1]):
                    found.append(subject.model.module(**call, return_dict=False)[0])
    return found


def values(table):
    return {row.place: (row.value, row.loss) for row in table.rows}


# --- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "limit"), [("DiT", 10**9), ("DiT", 1), ("PixArt", 10**9), ("SD3", 1)])
def test_values_are_those_of_whole_forwards_bit_for_bit(make_tiny, tmp_path, family, limit):
    subject = subject_of_family(make_tiny, family)
    table = subject.measure(tmp_path / "t.jsonl", all_targets(subject, W4, A8), kept_limit_bytes=limit)
    assert len(table.rows) == 2 * len(subject.names)
    exact = outputs(subject)
    for row in table.rows:
        after = outputs(subject, (row.layer, {"weight": W4, "activation": A8}[row.kind]))
        pairs = [powers(one, other) for one, other in zip(exact, after, strict=True)]
        assert row.loss == sum(noise for _, noise in pairs) / sum(signal for signal, _ in pairs), row


@dataclass(frozen=True)
class ExampleCalls:
    """Random inputs of a family, for models that need prompts."""

    items: list[dict[str, object]]
    seed: int = 5
    key: str = "examples"

    def __iter__(self):
        return iter(self.items)


def subject_of_family(make_tiny, name):
    folder = make_tiny(f"{name}Transformer2DModel")
    model, generator = opened(folder), torch.Generator().manual_seed(5)
    calls = [model.family.example_inputs(model.module, 2, generator) for _ in range(3)]
    return Subject(folder, model, ExampleCalls(calls), [site.name for site in model.linears()])


def test_ssim_is_that_of_the_outputs(subject, tmp_path):
    table = subject.measure(tmp_path / "t.jsonl", [Target(subject.names[3], (W2,), "ssim")])
    exact, after = outputs(subject), outputs(subject, (subject.names[3], W2))
    everything = torch.cat(exact)
    expected = ssim(everything, torch.cat(after), float(everything.max() - everything.min()))
    (row,) = table.rows
    assert row.metric == "ssim"
    assert row.value == pytest.approx(expected, rel=1e-12)
    assert row.loss == 1.0 - row.value > 0.0


def test_nothing_quantized_is_a_perfect_row(subject, tmp_path):
    @contextmanager
    def nothing(name, linear, candidate):
        yield

    name = subject.names[2]
    rows = subject.measure(tmp_path / "a.jsonl", [Target(name, (W2,))], nothing).rows
    rows += subject.measure(tmp_path / "b.jsonl", [Target(name, (W2,), "ssim")], nothing).rows
    assert [(row.value, row.loss) for row in rows] == [(200.0, 0.0), (1.0, 0.0)]


def test_exactly_one_layer_is_quantized_at_a_time(subject, tmp_path):
    """Acceptance B6 of MixDQ: counted by hooks that see every forward."""
    module = subject.model.module
    linears = {name: module.get_submodule(name) for name in subject.names}
    weights = {name: linear.weight for name, linear in linears.items()}
    original = {name: linear.weight.clone() for name, linear in linears.items()}
    seen = []

    def count(*_):
        changed = [
            (name, "weight" if linear.weight is not weights[name] else "activation")
            for name, linear in linears.items()
            if linear.weight is not weights[name] or linear._forward_pre_hooks
        ]
        assert all(torch.equal(weights[name], before) for name, before in original.items())
        seen.append(tuple(changed))

    hook = module.register_forward_pre_hook(count)
    table = subject.measure(tmp_path / "t.jsonl", all_targets(subject, W2, W4, A8))
    hook.remove()
    runs = [changed for changed in seen if changed and len(changed) < len(linears)]  # one looks at all inputs
    calls = len(list(subject.calls))
    assert len(table.rows) == 3 * len(subject.names)
    assert len(runs) == len(table.rows) * calls
    assert all(len(changed) == 1 for changed in runs)
    expected = {(name, kind): number * calls for name in linears for kind, number in KINDS.items()}
    assert {changed[0]: runs.count(changed) for changed in runs} == expected


KINDS = {"weight": 2, "activation": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_comes_back_bit_for_bit(make_tiny, tmp_path, dtype):
    subject = subject_of(make_tiny(dtype=dtype), tmp_path / "cache")
    before, parameters = hash_weights(subject.model.module), list(subject.model.module.parameters())
    subject.measure(tmp_path / "t.jsonl", all_targets(subject, W4, A8))
    assert hash_weights(subject.model.module) == before
    assert all(a is b for a, b in zip(parameters, subject.model.module.parameters(), strict=True))
    for child in subject.model.module.modules():
        assert not child._forward_pre_hooks
        assert not child._forward_hooks
        assert "forward" not in child.__dict__


def test_an_interruption_leaves_the_model_as_it_was(make_tiny, tmp_path):
    class Impatient(SilentProgress):
        def advance(self, units=1, detail=""):
            if detail:
                raise KeyboardInterrupt

    subject = subject_of(make_tiny(dtype="bfloat16"), tmp_path / "cache")
    before, path = hash_weights(subject.model.module), tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt) as caught:
        subject.measure(path, all_targets(subject, W4), progress=Impatient())
    assert hash_weights(subject.model.module) == before, caught
    assert len(read_table(path).rows) == 1


def test_sixteen_bits_are_measured_in_float32(make_tiny, tmp_path):
    """In bfloat16 every row has the rounding of the whole model in it."""
    subject = subject_of(make_tiny(dtype="bfloat16"), tmp_path / "cache")
    name = "transformer_blocks.0.attn1.to_q"
    wide = subject.measure(tmp_path / "a.jsonl", [Target(name, (A8,))]).rows[0]
    narrow = subject.measure(tmp_path / "b.jsonl", [Target(name, (A8,))], dtype=None).rows[0]
    assert wide.value > narrow.value + 6.0


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Rows of the built-in model and of a copy with planted outliers: (name, rows, rows with outliers)."""
    folder = tmp_path_factory.mktemp("shipped")
    model = open_model(ModelRef(id="builtin:dit"), progress=QUIET)
    settings = CalibrationSettings(samples=2, steps=4, guidance_scale=1.5)
    calls = RecordedCalls(record(model, settings, seed=0, cache=folder, progress=QUIET), 2)
    subject = Subject(folder, model, calls, [site.name for site in model.linears()])
    rows = subject.measure(folder / "a.jsonl", all_targets(subject, W2, W4, W8)).rows
    name = "transformer_blocks.3.attn1.to_out.0"
    with torch.no_grad():
        # A channel that is always zero, so that its weights matter to the grid alone: one per row, as
        # an outlier in one row would leave the other rows' grids as they are.
        value = model.module.get_submodule("transformer_blocks.3.attn1.to_v")
        value.weight[5], value.bias[5] = 0.0, 0.0
        weight = model.module.get_submodule(name).weight
        weight[:, 5] = 100 * weight.abs().max()
    return name, rows, subject.measure(folder / "b.jsonl", all_targets(subject, W4)).rows


@pytest.mark.slow
def test_more_bits_hurt_less(shipped):
    """Acceptance B7 of MixDQ."""
    _, rows, _ = shipped
    found = {row.place: row.value for row in rows}
    names = [row.layer for row in rows if row.label == "w2"]
    ordered = [
        found["weight", name, "w8"] > found["weight", name, "w4"] > found["weight", name, "w2"]
        for name in names
    ]
    assert len(names) == 74
    assert sum(ordered) >= 0.95 * len(names)


@pytest.mark.slow
def test_planted_outliers_rank_worst(shipped):
    """Acceptance B7 of MixDQ."""
    name, rows, planted = shipped
    before = sorted((row.loss, row.layer) for row in rows if row.label == "w4")
    after = sorted((row.loss, row.layer) for row in planted)
    assert after[-1][1] == name
    assert name not in [layer for _, layer in before[-20:]]
    assert [layer for _, layer in after[-4:-1]] == [layer for _, layer in before[-3:]]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_layer_kind_and_bits(subject, tmp_path, value):
    @contextmanager
    def breaks(name, linear, candidate):
        if name.endswith("1.ff.net.2") and candidate.bits == 2:
            linear.forward = lambda x: torch.full((*x.shape[:-1], linear.out_features), value)
        yield
        linear.__dict__.pop("forward", None)

    with pytest.raises(
        StageError, match=r"transformer_blocks\.1\.ff\.net\.2: .*weight at 2 bits \(w2\).*not"
    ):
        subject.measure(tmp_path / "t.jsonl", all_targets(subject, W4, W2), breaks)


def test_an_original_that_is_not_finite_is_refused(subject, tmp_path):
    with torch.no_grad():
        subject.model.module.proj_out_2.bias[0] = torch.nan
    with pytest.raises(StageError, match="recorded call 0: the original model's output is not finite"):
        subject.measure(tmp_path / "t.jsonl", all_targets(subject, W4))


def _leaves_weight(linear):
    linear.weight = nn.Parameter(linear.weight * 2, requires_grad=False)


def _leaves_hook(linear):
    linear.register_forward_pre_hook(lambda *_: None)


def _writes(linear):
    linear.weight.data[0, 0] += 1


@pytest.mark.parametrize("damage", [_leaves_weight, _leaves_hook, _writes])
def test_a_quantizer_that_does_not_restore_is_refused(subject, tmp_path, damage):
    @contextmanager
    def careless(name, linear, candidate):
        damage(linear)
        yield

    with pytest.raises(StageError, match=f"{subject.names[0]}: the quantizer did not restore"):
        subject.measure(tmp_path / "t.jsonl", [Target(subject.names[0], (W4,))], careless)


def test_layers_that_cannot_be_measured_are_refused(subject, tmp_path):
    for name, message in (("nowhere", "no such layer"), ("norm_out", "not a linear layer")):
        with pytest.raises(StageError, match=message):
            subject.measure(tmp_path / "t.jsonl", [Target(name, (W4,))])
    with pytest.raises(ValueError, match="twice"):
        subject.measure(tmp_path / "t.jsonl", [Target(subject.names[0], (W4, W4))])
    with pytest.raises(ValueError, match="opener"):
        subject.measure(tmp_path / "t.jsonl", [Target(subject.names[0], (W4,))], workers=2)


# --- the file -----------------------------------------------------------------------------------


def test_every_cut_of_the_file_gives_the_same_table(subject, tmp_path):
    path, targets = tmp_path / "t.jsonl", all_targets(subject, W4)[:4]
    whole = subject.measure(path, targets)
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for end in [0, 1, 20, *(end + offset for end in ends[:-1] for offset in (-1, 0, 1, 37))]:
        path.write_bytes(content[:end])
        started = []

        @contextmanager
        def counted(name, linear, candidate, started=started):
            started.append(name)
            with rounded(name, linear, candidate):
                yield

        again = subject.measure(path, targets, counted)
        assert values(again) == values(whole)
        assert [row.place for row in again.rows] == [row.place for row in whole.rows]
        assert len(started) == 4 - max(0, sum(place <= end for place in ends) - 1)
        assert values(read_table(path)) == values(whole)


def test_a_finished_table_is_only_read(subject, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    targets = all_targets(subject, W4)[:2]
    first = subject.measure(folder, targets)
    (path,) = folder.iterdir()
    assert path.name == f"sensitivity-{first.key[:32]}.jsonl"

    def never(*_):
        raise AssertionError

    before = path.read_bytes()
    assert subject.measure(folder, targets, never) == first
    assert path.read_bytes() == before


def test_the_table_of_something_else_is_refused_or_replaced(subject, tmp_path):
    path, target = tmp_path / "t.jsonl", [Target(subject.names[0], (W4,))]
    keys = {subject.measure(path, target).key}
    before = path.read_bytes()
    weight = subject.model.module.get_submodule(subject.names[-1]).weight
    other_calls = Subject(subject.folder, subject.model, replace(subject.calls, steps=3), subject.names)
    renamed = [Target(subject.names[0], (replace(W4, settings={"group": 64}),))]
    changes = {
        "candidates": lambda **options: subject.measure(path, renamed, **options),
        "metric": lambda **options: subject.measure(path, [replace(target[0], metric="ssim")], **options),
        "quantizer": lambda **options: subject.measure(path, target, **{**options, "settings": {"a": 1}}),
        "dtype": lambda **options: subject.measure(path, target, dtype=torch.float64, **options),
        "calls": lambda **options: other_calls.measure(path, target, **options),
        "weights": lambda **options: (weight.mul_(2), subject.measure(path, target, **options))[1],
    }
    for name, change in changes.items():
        with pytest.raises(SourceError, match="measured on something else"):
            change()
        assert path.read_bytes() == before, name
        keys.add(change(replace=True).key)
        assert len(read_table(path).rows) == 1
        before = path.read_bytes()
    assert len(keys) == 1 + len(changes)


def test_damaged_and_foreign_files(subject, tmp_path):
    path, targets = tmp_path / "t.jsonl", all_targets(subject, W4)[:2]
    subject.measure(path, targets)
    header, first, second = path.read_text().splitlines()
    nan = json.dumps({**json.loads(first), "loss": float("nan")})
    unknown = json.dumps({**json.loads(first), "label": "w5"})
    for lines, message in (
        ([header, "{", second], r":2: damaged"),
        ([header, first, first], r":3: .* is there twice"),
        ([header, nan], rf":2: the loss of weight w4 of {subject.names[0]} is nan"),
        ([header, '{"kind": "weight"}'], r":2: damaged: not a row"),
        ([header, unknown], "w5 of .* is none of the candidates"),
    ):
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(SourceError, match=message):
            subject.measure(path, targets)
    for text in ("a letter to somebody\n", "a letter", "[1]\n", "\n"):
        path.write_text(text)
        with pytest.raises(SourceError, match="not a table"):
            subject.measure(path, targets, replace=True)
        assert path.read_text() == text


def test_a_given_table_is_only_read(subject, tmp_path):
    path, targets = tmp_path / "t.jsonl", all_targets(subject, W4)[:2]
    made = subject.measure(path, targets)
    whole = path.read_bytes()

    def read(settings):
        return read_measured(subject.model, subject.calls, targets, path=path, settings=settings)

    assert read({}).rows == made.rows
    with pytest.raises(SourceError, match="measured on something else"):
        read({"another": 1})
    assert path.read_bytes() == whole
    for rows in (1, 0):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[: 1 + rows]))
        before = path.read_bytes()
        with pytest.raises(SourceError, match=f"unfinished: {rows} of 2 rows") as caught:
            read({})
        assert caught.value.hint == "leave out sensitivity.table to measure, or name another file"
        assert path.read_bytes() == before


def test_two_runs_do_not_write_one_table(subject, tmp_path):
    path, target = tmp_path / "t.jsonl", [Target(subject.names[0], (W4,))]

    @contextmanager
    def meanwhile(*_):
        with pytest.raises(SourceError, match="another process is writing"):
            subject.measure(path, target)
        yield

    assert len(subject.measure(path, target, meanwhile).rows) == 1


def test_another_number_of_threads_is_told(subject, tmp_path):
    notes = []

    class Heard(SilentProgress):
        def note(self, message):
            notes.append(message)

    path, targets = tmp_path / "t.jsonl", all_targets(subject, W4)[:2]
    subject.measure(path, targets)
    subject.measure(path, targets, threads=2, progress=Heard())
    assert not notes
    path.write_bytes(path.read_bytes()[:-5])
    subject.measure(path, targets, threads=2, progress=Heard())
    assert "begun with 1 threads a process, continued with 2" in notes[0]


# --- memory -------------------------------------------------------------------------------------


def test_kept_outputs_stay_within_the_limit(subject, monkeypatch):
    largest = []

    def watched(runner, call, entry, keep=sensitivity_probe.SuffixRunner.keep):
        kept = keep(runner, call, entry)
        largest.append(kept.bytes)
        return kept

    monkeypatch.setattr(sensitivity_probe.SuffixRunner, "keep", watched)
    calls = len(list(subject.calls))
    probe = subject.probe()
    one = max(largest)  # a block's output in one call
    largest.clear()
    for limit, portions in ((10**9, [calls]), (one * 2, [2] * (calls // 2)), (1, [1] * calls)):
        probe._limit = limit
        sizes = [(len(indices), sum(item.bytes for item in kept)) for indices, kept in probe._portions(1)]
        assert [size for size, _ in sizes] == portions
        assert all(used <= max(limit, one) for _, used in sizes)
