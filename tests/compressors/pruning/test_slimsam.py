"""The stage on tiny models: phases and their order, going on after a break, equal runs, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compress.calibration.classification import NoImages
from compress.calibration.content import hash_weights
from compress.calibration.recording import record
from compress.compressors.base import Workspace
from compress.compressors.pruning.sam import slimming
from compress.compressors.pruning.sam.records import Records
from compress.compressors.pruning.sam.sites import encoder_sites
from compress.compressors.pruning.slimsam import SlimSam
from compress.errors import PlanError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from compress.recipes.slimsam import SlimSamSettings
from compress.runtime.hashes import digest

from ...tiny_sam import save_tiny_sam
from ...tiny_scenes import write_scenes

TINY = {"ratio": 0.5, "steps": 3, "batch_size": 2, "choice_images": 2, "lr": 1e-3, "checkpoint_every": 1}
ALTERNATE = ["embedding pruning", "embedding aligning", "bottleneck pruning", "bottleneck aligning"]


class Told(SilentProgress):
    """Keeps what a user is told."""

    def __init__(self):
        self.notes, self.warnings, self.steps = [], [], []

    def start(self, label, total):
        self.steps.append(label)

    def steps_of(self, names):
        return [label for label in self.steps if label in names]

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint and twelve images with masks."""
    folder = tmp_path_factory.mktemp("slimsam")
    return save_tiny_sam(folder / "model"), write_scenes(folder / "images", 12)


@pytest.fixture(scope="module")
def plain(stored):
    """Images without masks."""
    return write_scenes(stored[1].parent / "plain", 12, masks=False)


@pytest.fixture
def apply(stored, tmp_path):
    """Return `apply(name of a working folder, **settings)` -> (model, details, what was told)."""

    def run(name, images=stored[1], dtype=None, **settings):
        told = Told()
        model = open_model(ModelRef(id=str(stored[0]), dtype=dtype), progress=told)
        chosen = CalibrationSettings(images=images, samples=3)
        calibration = record(model, chosen, seed=0, cache=None, progress=told)
        (tmp_path / name).mkdir(exist_ok=True)
        space = Workspace(tmp_path / name, tmp_path)
        details = SlimSam().apply(model, SlimSamSettings(**{**TINY, **settings}), calibration, space, told)
        return model, details, told

    return run


def lasting(details):
    """Return details without what differs between equal runs."""
    document = copy.deepcopy(details)
    for phase in document["phases"]:
        phase.pop("seconds"), phase.pop("resumed_at", None)
    return document


def planned(stored, **settings):
    ref = ModelRef(id=str(stored[0]))
    return SlimSam().plan(_spec(ref), SlimSamSettings(**{**TINY, **settings}))


def _spec(ref):
    return open_model(ref, progress=SilentProgress()).spec


def test_four_phases_leave_what_was_planned(stored, apply):
    model, details, told = apply("a")
    plan = planned(stored)
    after = model.dense()
    assert after.surgery == plan.spec.surgery and after.tensors == plan.spec.tensors
    assert model.size() == plan.after and plan.least is None
    assert [phase["name"] for phase in details["phases"]] == ALTERNATE == told.steps_of(ALTERNATE)
    assert [phase["kind"] for phase in details["phases"]] == ["pruning", "aligning"] * 2
    assert details["widths"] == {"embedding": [48, 24], "head_dim": [[12, 6]] * 3, "inner": [[96, 48]] * 3}
    assert details["heads"] == 4 and json.loads(json.dumps(details)) == details
    assert details["before"]["output_error"] == 0.0 and details["before"]["miou"] > 0
    assert (details["score_images"], details["train_images"]) == (3, 8)
    assert details["choice"] == {"by": "miou", "images": 2, "masks": 2}
    for phase in details["phases"][1::2]:
        assert (phase["steps"], phase["batch_size"], phase["resumed_at"]) == (3, 2, 0)
        assert phase["epochs"] == 0.75 and phase["best_step"] in (0, 3)
        assert [row[0] for row in phase["choice_values"]] == [0, 3] and len(phase["training_loss"]) == 3
    assert any("chosen by mIoU with 2 masks of 2 images" in note for note in told.notes)
    assert not told.warnings


def test_images_that_cannot_be_trained_on_are_told(tmp_path, apply):
    images = write_scenes(tmp_path / "damaged", 12)
    for path in sorted(images.glob("*.json"))[:4]:
        path.write_text("{")
    _, details, told = apply("damaged", images=images)
    in_training = 10 - details["train_images"] - details["choice"]["images"]
    assert in_training >= 2 and any(f": {in_training} files cannot be read" in line for line in told.warnings)


def test_what_is_not_the_encoder_stays_to_the_bit(stored, apply):
    model, _, _ = apply("a")
    before = open_model(ModelRef(id=str(stored[0])), progress=SilentProgress()).module.state_dict()
    after = model.module.state_dict()
    others = [name for name in before if not name.startswith("vision_encoder.")]
    assert len(others) > 20 and all(torch.equal(before[name], after[name]) for name in others)
    assert all(parameter.dtype == torch.float32 for parameter in model.module.parameters())
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())


def test_each_part_is_pruned_while_the_other_stays_and_is_scored_on_the_model_of_then(
    plain, apply, monkeypatch
):
    seen = []

    def scored(model, objective, **keys):
        sites = encoder_sites(model.module)
        widths = (sites.width, sites.layers[0].head_dim, sites.layers[0].inner)
        seen.append(("scored", widths, hash_weights(model.module), keys["embedding"], keys["bottleneck"]))
        return score(model, objective, **keys)

    def aligned(student, teachers, phase, *args, **keys):
        sites = encoder_sites(student)
        before = hash_weights(student)
        found = align(student, teachers, phase, *args, **keys)
        assert hash_weights(student) != before
        widths = (sites.width, sites.layers[0].head_dim, sites.layers[0].inner)
        previous = None if teachers.previous is None else hash_weights(teachers.previous)
        seen.append(
            (phase, widths, hash_weights(student), hash_weights(student.vision_encoder),
             hash_weights(teachers.original), previous)
        )  # fmt: skip
        return found

    score, align = slimming.score, slimming.align
    monkeypatch.setattr(slimming, "score", scored)
    monkeypatch.setattr(slimming, "align", aligned)
    # Chosen by the output, which three steps improve.
    apply("a", images=plain)
    first, embedding, second, bottleneck = seen
    assert first[1:2] == ((48, 12, 96),) and first[3:] == (True, False)
    assert embedding[:2] == ("embedding", (24, 12, 96)) and embedding[4:] == (first[2], None)
    # Scored is the aligned model, whose own embedding is then the target; and it teaches.
    assert second[1:3] == ((24, 12, 96), embedding[2]) and second[3:] == (False, True)
    assert bottleneck[:2] == ("bottleneck", (24, 6, 48)) and bottleneck[4:] == (first[2], embedding[3])


def test_one_step_prunes_all_at_once_and_aligns_as_long(apply, monkeypatch):
    steps = []
    align = slimming.align

    def counted(student, teachers, phase, *args, **keys):
        steps.append((phase, keys["steps"]))
        return align(student, teachers, phase, *args, **keys)

    monkeypatch.setattr(slimming, "align", counted)
    model, details, _ = apply("a", slimming="one_step")
    assert steps == [("outputs", 6)]
    assert [phase["name"] for phase in details["phases"]] == ["pruning", "aligning"]
    assert details["widths"]["embedding"] == [48, 24] and details["widths"]["inner"] == [[96, 48]] * 3
    assert all(json.loads(model.attachments["slimming.json"])["kept"].values())


def test_without_features_no_copy_is_made_to_learn_from(apply, monkeypatch):
    teachers = []
    align = slimming.align

    def seen(student, who, *args, **keys):
        teachers.append(who.previous)
        return align(student, who, *args, **keys)

    monkeypatch.setattr(slimming, "align", seen)
    apply("a", features=False)
    apply("b", feature_epochs=1)  # whose share is 0 from the first epoch on
    assert teachers == [None] * 4


def test_the_file_of_what_was_kept_repeats_the_cut(stored, apply):
    model, details, _ = apply("a", steps=1, lr=1e-30)  # so small a step leaves the weights
    document = json.loads(model.attachments["slimming.json"])
    assert (document["format"], document["version"], document["seed"]) == ("compress-slimming", 1, 0)
    assert document["macs"] == details["macs"] and document["parameters"] == details["parameters"]
    kept = document["kept"]
    again = open_model(ModelRef(id=str(stored[0])), progress=SilentProgress())
    slimming.cut_embedding(again, torch.tensor(kept["embedding"]), rel_pos="slice")
    slimming.cut_bottleneck(
        again, [torch.tensor(one) for one in kept["attention"]], [torch.tensor(one) for one in kept["inner"]],
        attn_scale="preserve", rel_pos="slice",
    )  # fmt: skip
    assert hash_weights(again.module) == hash_weights(model.module)


class Stop(BaseException):
    """Breaks a run off, as a signal would."""


def _breaking(monkeypatch, owner, name, count, *, after):
    """Let the `count`-th call of a function end the run, before it or after it."""
    real, calls = getattr(owner, name), []

    def broken(*args, **keys):
        calls.append(name)
        if len(calls) == count and not after:
            raise Stop
        found = real(*args, **keys)
        if len(calls) == count:
            raise Stop
        return found

    monkeypatch.setattr(owner, name, broken)


PLACES = [
    ("score", 1, True), ("cut_embedding", 1, False), ("cut_embedding", 1, True), ("align", 1, False),
    ("align", 1, True), ("score", 2, True), ("cut_bottleneck", 1, False), ("align", 2, False),
    ("align", 2, True), ("stage_details", 1, False),
]  # fmt: skip


@pytest.mark.slow
def test_a_run_that_breaks_off_anywhere_ends_with_the_same_bytes(apply, monkeypatch):
    whole, details, _ = apply("whole")
    expected = hash_weights(whole.module), lasting(details), whole.attachments
    for name, count, after in PLACES:
        folder = f"{name}-{count}-{after}"
        with monkeypatch.context() as patch, pytest.raises(Stop):
            _breaking(patch, slimming, name, count, after=after)
            apply(folder)
        with monkeypatch.context() as patch:
            if name != "score" and count == 1:  # what was chosen is not scored again
                patch.setattr(slimming, "score", _only_second(slimming.score))
            model, found, told = apply(folder)
        assert (hash_weights(model.module), lasting(found), model.attachments) == expected, folder
        assert not told.warnings, folder


def _only_second(score):
    def scored(model, objective, *, embedding, **keys):
        assert not embedding
        return score(model, objective, embedding=embedding, **keys)

    return scored


@pytest.mark.slow
def test_breaks_at_every_record_end_with_the_same_bytes(apply, monkeypatch):
    whole, details, _ = apply("whole")
    for count in range(1, 8):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            _breaking(patch, Records, "write", count, after=count % 2 == 0)
            apply(f"record {count}")
        model, found, _ = apply(f"record {count}")
        assert hash_weights(model.module) == hash_weights(whole.module), count
        assert lasting(found) == lasting(details), count
    with monkeypatch.context() as patch:  # that were all of them
        _breaking(patch, Records, "write", 8, after=False)
        apply("none left")


def test_records_that_are_damaged_or_of_other_settings_are_made_again(apply, tmp_path):
    whole, details, _ = apply("a")
    path = tmp_path / "a" / "embedding pruning, kept.json"
    told = json.loads(path.read_text())
    told["value"]["embedding"][0] += 1
    path.write_text(json.dumps(told))
    (tmp_path / "a" / "before.json").write_text("{")
    model, found, told = apply("a")
    assert hash_weights(model.module) == hash_weights(whole.module) and lasting(found) == lasting(details)
    assert len(told.warnings) == 2 and all("damaged" in message for message in told.warnings)
    other, _, _ = apply("a", ratio=0.75)  # a folder belongs to one stage; were it not so, nothing is mixed
    assert encoder_sites(other.module).width == 12


def test_indices_come_back_from_disk_as_they_were(tmp_path):
    kept = slimming.Kept(None, (torch.tensor([0, 5]), torch.tensor([1])), (torch.tensor([2]),) * 2)
    records = Records(tmp_path, "key", SilentProgress())
    records.write_kept("kept", kept)
    found = records.read_kept("kept")
    assert found.embedding is None and [one.tolist() for one in found.attention] == [[0, 5], [1]]
    assert all(one.dtype == torch.int64 for one in (*found.attention, *found.inner))
    assert Records(tmp_path, "another", SilentProgress()).read("kept") is None
    assert records.read("nothing") is None


def test_equal_runs_write_equal_values(apply):
    first, second = apply("a"), apply("b")
    assert hash_weights(first[0].module) == hash_weights(second[0].module)
    assert digest(lasting(first[1])) == digest(lasting(second[1]))
    assert first[0].attachments == second[0].attachments


def test_global_ranking_stays_between_the_sizes_that_were_planned(stored, apply):
    plan = planned(stored, ranking="global")
    model, details, _ = apply("a", ranking="global")
    assert plan.least is not None and details["normalizer"] == "gaussian"
    size, low, high = model.size(), plan.least.size(), plan.after
    assert low.parameters <= size.parameters <= high.parameters and low.parameters < high.parameters
    assert low.macs <= size.macs <= high.macs
    assert len({after for _, after in details["widths"]["head_dim"]}) > 1


def test_half_precision_is_scored_and_trained_in_float32_and_comes_back(stored, apply):
    model, details, _ = apply("a", dtype="bfloat16")
    assert {item.dtype for item in model.module.vision_encoder.parameters()} == {torch.bfloat16}
    assert all(phase["output_error"] > 0 for phase in details["phases"])


def test_images_without_masks_choose_by_the_output(apply, plain):
    _, details, told = apply("a", images=plain)
    assert details["choice"] == {"by": "output_error", "images": 2, "masks": None}
    assert details["before"] == {"output_error": 0.0, "miou": None}
    errors = [phase["output_error"] for phase in details["phases"]]
    assert errors[1] < errors[0] and errors[3] < errors[2]
    assert any("error of the embedding on 2 images" in note for note in told.notes)


def test_halvings_are_told(apply, plain):
    # So large a rate only makes it worse; with an epoch of four steps it is halved twice.
    _, details, told = apply("a", images=plain, steps=12, lr=0.3, patience=1)
    rates = [row[2] for row in details["phases"][1]["choice_values"]]
    assert rates[-1] < rates[0]
    assert any("embedding aligning: the weights after step 0 of 12 stay" in note for note in told.notes)
    assert any("halved after step 4, 8" in note for note in told.notes)


def test_a_model_without_images_is_refused(stored, tmp_path):
    model = open_model(ModelRef(id=str(stored[0])), progress=SilentProgress())
    nothing, space = NoImages(0, "key"), Workspace(tmp_path, tmp_path)
    with pytest.raises(PlanError, match="no images") as refused:
        SlimSam().apply(model, SlimSamSettings(**TINY), nothing, space, SilentProgress())
    assert "calibration" in refused.value.hint


def test_a_quantized_model_is_refused(stored):
    spec = _spec(ModelRef(id=str(stored[0])))
    with pytest.raises(PlanError, match="quantized"):
        SlimSam().plan(spec.evolve(quantization={"a": object()}), SlimSamSettings(**TINY))


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_a_ratio_that_leaves_less_than_a_channel_per_head_is_refused(stored, ranking):
    with pytest.raises(PlanError, match="leaves") as refused:
        planned(stored, ratio=0.99, ranking=ranking)
    assert "ratio of at most" in refused.value.hint
