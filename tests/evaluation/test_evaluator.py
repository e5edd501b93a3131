"""The evaluator on tiny real models: identity, noise, determinism, the cache, what does not fit."""

import json
import shutil

import pytest
import torch
from compress.evaluation.evaluator import Evaluator
from compress.evaluation.metrics import PERFECT_DB, powers
from compress.progress import SilentProgress
from compress.recipes.gates import METRICS
from compress.recipes.schema import EvaluateSettings
from safetensors.torch import load_file, save_file

CLASSES = (
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel",
)  # fmt: skip
FIDELITY = {"samples": 3, "steps": 4, "guidance_scale": 2.0, "batch_size": 2}
SILENT = SilentProgress()


class Notes(SilentProgress):
    def __init__(self):
        self.messages = []

    def note(self, message):
        self.messages.append(message)


def _evaluator(conditions=None, seed=0, **settings):
    return Evaluator(EvaluateSettings.model_validate({"fidelity": FIDELITY, **settings}), seed, conditions)


def _spoil(model, amount=0.02):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in model.linears():
            if site.block is not None:
                weight = model.module.get_submodule(site.name).weight
                weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("class_name", CLASSES)
def test_an_unchanged_model_is_equal(open_tiny, conditions_of, class_name):
    model = open_tiny(class_name)
    evaluator = _evaluator(conditions_of(class_name))
    result = evaluator.compare(model, evaluator.reference(model, None, SILENT), SILENT)
    assert result.metrics == {
        "sqnr_db": PERFECT_DB,
        "sqnr_db_worst_step": PERFECT_DB,
        "psnr_db": PERFECT_DB,
        "ssim": 1.0,
    }
    assert torch.equal(result.images["original"], result.images["compressed"])
    assert {row["sqnr_db"] for row in result.details["layers"]} == {PERFECT_DB}
    assert "latents" in result.details["fidelity"]["compared"]
    json.dumps(result.details)


@pytest.mark.parametrize("class_name", CLASSES)
def test_noise_is_seen_everywhere(open_tiny, conditions_of, class_name):
    model = open_tiny(class_name)
    evaluator = _evaluator(conditions_of(class_name))
    reference = evaluator.reference(model, None, SILENT)
    _spoil(model)
    result = evaluator.compare(model, reference, SILENT)
    assert set(result.metrics) <= set(METRICS)
    assert 15 < result.metrics["sqnr_db"] < 60
    assert result.metrics["sqnr_db_worst_step"] <= result.metrics["sqnr_db"]
    assert result.metrics["ssim"] < 1
    # Each batch has its own calls at each of the four steps.
    assert len(reference.calls()) == 8
    assert len(result.details["timesteps"]) == 4
    assert all(row["sqnr_db"] < 80 for row in result.details["layers"])


def test_sqnr_is_that_of_the_recorded_calls(open_tiny):
    """The figures once more, by hand from what was recorded."""
    model = open_tiny()
    evaluator = _evaluator()
    reference = evaluator.reference(model, None, SILENT)
    _spoil(model)
    result = evaluator.compare(model, reference, SILENT)
    sums = {}
    with torch.no_grad():
        for kwargs, wanted in reference.calls():
            pair = powers(wanted, model.module(**kwargs).sample)
            signal, noise = sums.get(float(kwargs["timestep"][0]), (0.0, 0.0))
            sums[float(kwargs["timestep"][0])] = (signal + pair[0], noise + pair[1])
    for row in result.details["timesteps"]:
        signal, noise = sums[row["timestep"]]
        assert row["sqnr_db"] == pytest.approx(10 * torch.tensor(signal / noise).log10().item(), abs=1e-3)
    assert result.details["worst_timestep"] in sums


def test_two_evaluations_are_equal(open_tiny):
    results = []
    for name in ("first", "second"):
        model = open_tiny(name=name)
        evaluator = _evaluator()
        reference = evaluator.reference(model, None, SILENT)
        _spoil(model)
        results.append(evaluator.compare(model, reference, SILENT))
    assert results[0].metrics == results[1].metrics
    assert results[0].details == results[1].details
    assert torch.equal(results[0].images["compressed"], results[1].images["compressed"])


def test_the_recording_is_found_again(open_tiny, tmp_path, monkeypatch):
    model = open_tiny()
    first = _evaluator().reference(model, tmp_path / "cache", SILENT)
    monkeypatch.setattr("compress.evaluation.evaluator.sample", None)  # drawing again would fail
    again = _evaluator().reference(model, tmp_path / "cache", SILENT)
    assert again.folder == first.folder
    assert again.index == first.index
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("change", ["seed", "settings", "weights"])
def test_anything_else_is_recorded_anew(open_tiny, tmp_path, change):
    cache = tmp_path / "cache"
    first = _evaluator().reference(open_tiny(name="a"), cache, SILENT)
    model = open_tiny(name="b", seed=5) if change == "weights" else open_tiny(name="b")
    evaluator = {
        "seed": lambda: _evaluator(seed=1),
        "settings": lambda: _evaluator(fidelity={**FIDELITY, "steps": 3}),
        "weights": _evaluator,
    }[change]()
    assert evaluator.reference(model, cache, SILENT).folder != first.folder


def test_conditions_count_by_their_content(open_tiny, conditions_of, tmp_path):
    class_name = "SD3Transformer2DModel"
    model, conditions = open_tiny(class_name), conditions_of(class_name)
    cache = tmp_path / "cache"
    first = _evaluator(conditions).reference(model, cache, SILENT)
    moved = tmp_path / "moved.safetensors"
    shutil.copy(conditions.embeddings, moved)
    elsewhere = conditions.model_copy(update={"embeddings": moved})
    assert _evaluator(elsewhere).reference(model, cache, SILENT).folder == first.folder
    tensors = load_file(moved)
    tensors["prompt_embeds"] += 1
    save_file(tensors, moved)
    assert _evaluator(elsewhere).reference(model, cache, SILENT).folder != first.folder


@pytest.mark.parametrize("damage", ["missing", "one byte", "index"])
def test_a_damaged_recording_is_made_again(open_tiny, tmp_path, damage):
    model = open_tiny()
    first = _evaluator().reference(model, tmp_path, SILENT)
    victim = first.folder / "calls" / "00001.safetensors"
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "one byte":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (first.folder / "reference.json").write_text("{")
    again = _evaluator().reference(model, tmp_path, SILENT)
    assert len(again.calls()) == 8
    assert again.folder == first.folder
    assert all(tensor.isfinite().all() for tensor in load_file(victim).values())
    assert victim.read_bytes()[-1] == content[-1]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_fresh_reference_replaces_the_kept_one(open_tiny, tmp_path, monkeypatch):
    model, cache = open_tiny(), tmp_path / "cache"
    first = _evaluator().reference(model, cache, SILENT)
    inode = first.folder.stat().st_ino
    again = _evaluator().reference(model, cache, SILENT, fresh=True)
    assert again.folder == first.folder
    assert again.index == first.index
    assert again.folder.stat().st_ino != inode
    monkeypatch.setattr("compress.evaluation.evaluator.sample", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _evaluator().reference(model, cache, SILENT, fresh=True)
    assert _evaluator().reference(model, cache, SILENT).index == first.index  # the old one stays usable
    assert list(cache.iterdir()) == [first.folder]


def test_no_partial_recording_stays_behind(open_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.evaluation.watched.record_layers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _evaluator().reference(open_tiny(), tmp_path / "cache", SILENT)
    assert list((tmp_path / "cache").iterdir()) == []


def test_quality_is_skipped_with_a_note_where_the_classifier_does_not_fit(open_tiny):
    model = open_tiny()
    notes = Notes()
    evaluator = _evaluator(quality={"samples": 4, "steps": 2})
    result = evaluator.compare(model, evaluator.reference(model, None, notes), notes)
    assert "class_agreement" not in result.metrics
    assert "shape" in result.details["quality"]["skipped"]
    assert notes.messages == [result.details["quality"]["skipped"]]


def test_quality_of_samples_that_the_classifier_can_judge(pixel_dit):
    evaluator = _evaluator(quality={"samples": 20, "steps": 2, "batch_size": 8})
    reference = evaluator.reference(pixel_dit, None, SILENT)
    result = evaluator.compare(pixel_dit, reference, SILENT)
    metrics = result.metrics
    assert metrics["class_agreement_drop"] == 0
    assert metrics["class_agreement"] == metrics["class_agreement_original"]
    assert metrics["fid"] == metrics["fid_original"] > result.details["quality"]["fid_floor"]
    assert len(result.details["quality"]["per_class"]) == 10
    assert result.details["fidelity"]["data_range"] == 2.0
    assert result.labels[0].startswith("class ")


def test_nothing_is_measured_where_nothing_is_asked_for(open_tiny):
    model = open_tiny()
    evaluator = _evaluator(fidelity=None)
    result = evaluator.compare(model, evaluator.reference(model, None, SILENT), SILENT)
    assert result.metrics == {}
    assert set(result.details) == {"linears"}
