"""Figures of a classifier: by hand, on held-out images, on a run's own recording."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from compress.calibration.image_files import find_images
from compress.calibration.images import pools_of
from compress.calibration.labels import class_names
from compress.errors import SourceError
from compress.evaluation.agreement import compare_metrics
from compress.evaluation.by_task import evaluator_for
from compress.evaluation.classification import (
    ClassificationEvaluator,
    accuracies,
    closeness,
    per_class,
)
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, ModelRef
from safetensors.torch import save_file

EVALUATE = EvaluateSettings.model_validate(
    {"fidelity": {"samples": 16}, "quality": {"samples": 40, "batch_size": 20}}
)
QUIET = SilentProgress()


def _open(name="builtin:vit"):
    return open_model(ModelRef(id=str(name)), progress=QUIET)


@pytest.fixture(scope="module")
def vit():
    return _open()


@pytest.fixture(scope="module")
def recorded(vit, tmp_path_factory):
    evaluator = evaluator_for(vit, EVALUATE, 0, CalibrationSettings())
    cache = tmp_path_factory.mktemp("references")
    return evaluator, cache, evaluator.reference(vit, cache, QUIET)


def test_closeness_by_hand():
    before = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    after = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    found = closeness(before, after)
    assert found["top1_agreement"] == 0.5
    assert found["kl"] == pytest.approx(0.5 * (0.75 * math.log(3) - 0.25 * math.log(3)), abs=1e-6)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(0.5), abs=1e-3)


def test_accuracies_by_hand():
    labels = torch.tensor([0, 0, 1, 2])
    before = torch.eye(3)[[0, 0, 1, 0]]
    after = torch.eye(3)[[0, 1, 1, 0]]
    assert accuracies(before, after, labels) == {
        "accuracy_original": 0.75, "accuracy": 0.5, "accuracy_drop": 0.25
    }  # fmt: skip
    rows = per_class(before, after, labels, ["a", "b", "c", "never"])
    assert rows == [
        {"class": "a", "images": 2, "original": 1.0, "compressed": 0.5},
        {"class": "b", "images": 1, "original": 1.0, "compressed": 1.0},
        {"class": "c", "images": 1, "original": 0.0, "compressed": 0.0},
    ]


def test_the_original_is_equal_to_itself_and_right_as_often_as_counted(vit, recorded):
    evaluator, _, reference = recorded
    result = evaluator.compare(vit, reference, QUIET)
    assert result.metrics["sqnr_db"] == 200.0 and result.metrics["kl"] == 0.0
    assert result.metrics["top1_agreement"] == 1.0 and result.metrics["accuracy_drop"] == 0.0
    images = pools_of(vit, CalibrationSettings(), 0).held_out.first(40)
    with torch.no_grad():
        answers = vit.module(images.pixels(range(40)).to(torch.bfloat16)).logits.argmax(dim=1)
    assert result.metrics["accuracy"] == pytest.approx(
        float((answers == images.labels).float().mean()), abs=1e-5
    )
    assert result.metrics["accuracy"] > 0.5, "it is trained"
    assert sum(row["images"] for row in result.details["quality"]["per_class"]) == 40
    assert result.details["images"]["held_out"] == len(pools_of(vit, CalibrationSettings(), 0).held_out.order)
    assert not result.images


def test_a_worse_model_is_told_apart_and_where(recorded):
    evaluator, _, reference = recorded
    model = _open()
    with torch.no_grad():
        model.module.vit.layers[2].mlp.fc1.weight.mul_(-1.0)
    result = evaluator.compare(model, reference, QUIET)
    assert result.metrics["sqnr_db"] < 30 and result.metrics["kl"] > 0
    assert result.metrics["accuracy_original"] > 0.5
    rows = {row["name"]: row for row in result.details["layers"]}
    assert rows["vit.layers.2.mlp.fc2"]["sqnr_db"] < 10 and rows["vit.layers.2"]["role"] == "block"
    assert all(row["sqnr_db"] == 200.0 for name, row in rows.items() if ".layers.2" not in name)
    between = evaluator.between(model, reference, QUIET).metrics
    assert between == {name: result.metrics[name] for name in between} and "accuracy" in between


@pytest.mark.parametrize("class_name", ["ConvNextForImageClassification", "SwinForImageClassification"])
def test_other_classifiers_and_layers_that_lost_outputs(make_vit, shared_data, class_name):
    """A narrowed layer cannot be compared with the original's, and its block can."""
    folder = make_vit(class_name)
    settings = EvaluateSettings.model_validate({"fidelity": {"samples": 1}})
    evaluator = evaluator_for(
        _open(folder), settings, 0, CalibrationSettings(images=shared_data / "data" / "images")
    )
    reference = evaluator.reference(_open(folder), None, QUIET)
    model = _open(folder)
    block, inner, outer = {
        "ConvNextForImageClassification": ("convnext.encoder.stages.2.layers.1", "pwconv1", "pwconv2"),
        "SwinForImageClassification": ("swin.encoder.layers.1.blocks.0", "mlp.fc1", "mlp.fc2"),
    }[class_name]
    if not any(name == block for name, _ in model.family.blocks(model.module)):
        block = model.family.blocks(model.module)[-2][0]
    first, second = (model.module.get_submodule(f"{block}.{name}") for name in (inner, outer))
    first.weight.data, first.bias.data = first.weight[:-8].clone(), first.bias[:-8].clone()
    second.weight.data = second.weight[:, :-8].clone()
    result = evaluator.compare(model, reference, QUIET)
    rows = {row["name"]: row["sqnr_db"] for row in result.details["layers"]}
    assert f"{block}.{inner}" not in rows and 0 < rows[block] < 200
    others = [value for name, value in rows.items() if not name.startswith(block)]
    assert others and min(others) > 100, "equal but for what other memory does to a convolution's rounding"
    assert result.metrics["top1_agreement"] in (0.0, 1.0) and "accuracy" not in result.metrics


def test_a_narrower_stream_has_no_figures_by_layer(recorded, vit):
    evaluator, _, reference = recorded
    model = _open()
    smaller = {**model.config, "hidden_size": 48, "num_attention_heads": 2, "pooler_output_size": 48}
    model.module = model.family.build(smaller).to(torch.bfloat16).eval()
    result = evaluator.compare(model, reference, QUIET)
    assert "layers" not in result.details
    assert result.metrics["top1_agreement"] < 1


def test_a_recording_is_found_again_and_made_again(vit, recorded):
    evaluator, cache, reference = recorded
    before = reference.folder.stat().st_mtime_ns
    again = ClassificationEvaluator(EVALUATE, 0, CalibrationSettings()).reference(vit, cache, QUIET)
    assert again.folder == reference.folder and again.folder.stat().st_mtime_ns == before
    other = ClassificationEvaluator(EVALUATE, 1, CalibrationSettings()).reference(vit, cache, QUIET)
    assert other.folder != reference.folder


def test_nothing_is_measured_where_all_is_off(vit):
    settings = EvaluateSettings.model_validate({"fidelity": None})
    evaluator = ClassificationEvaluator(settings, 0, CalibrationSettings())
    reference = evaluator.reference(vit, None, QUIET)
    result = evaluator.compare(vit, reference, QUIET)
    assert result.metrics == {} and evaluator.between(vit, reference, QUIET).metrics == {}


def test_accuracy_needs_labels_and_enough_images(make_vit, shared_data):
    model = _open(make_vit())
    photographs = CalibrationSettings(images=shared_data / "data" / "images")
    for quality, message in (
        ({"samples": 2}, "held out for measuring; 2 are asked"),
        (None, "16 are asked for"),
    ):
        settings = EvaluateSettings.model_validate({"quality": quality, "fidelity": None if quality else {}})
        with pytest.raises(SourceError, match=message):
            ClassificationEvaluator(settings, 0, photographs).reference(model, None, QUIET)


def test_accuracy_without_labels_is_refused(make_vit, tmp_path, shared_data):
    photographs = sorted(find_images(shared_data / "data" / "images").train.paths)
    for part, chosen in (("train", photographs[:4]), ("test", photographs[4:])):
        (tmp_path / "photographs" / part).mkdir(parents=True)
        for path in chosen:
            shutil.copy(path, tmp_path / "photographs" / part)
    settings = EvaluateSettings.model_validate({"fidelity": None, "quality": {"samples": 2}})
    evaluator = ClassificationEvaluator(settings, 0, CalibrationSettings(images=tmp_path / "photographs"))
    with pytest.raises(SourceError, match="have no labels, so accuracy cannot be measured"):
        evaluator.reference(_open(make_vit()), None, QUIET)


@pytest.mark.parametrize(
    ("name", "measured", "agrees"),
    [
        ("accuracy", 0.82, True), ("accuracy", 0.85, False), ("accuracy_drop", 0.85, True),
        ("top1_agreement", 0.66, True), ("top1_agreement", 0.6, False),
    ],
)  # fmt: skip
def test_how_far_figures_may_move_on_another_machine(name, measured, agrees):
    found = compare_metrics({name: 0.8}, {name: measured}, quality_samples=120, fidelity_samples=20)
    assert found.holds == agrees


class _Told(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def test_classes_without_a_held_out_image_are_told(vit, tmp_path):
    """Accuracy says nothing of them, and must not seem to."""
    generator = torch.Generator().manual_seed(0)
    for part, labels in (("train", range(10)), ("test", (0, 1, 2, 3, 4, 5, 6, 9, 9))):
        pixels = torch.randint(0, 256, (len(labels), 28, 28), generator=generator, dtype=torch.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        tensors = {"pixels": pixels, "labels": torch.tensor(labels)}
        save_file(tensors, tmp_path / "images" / f"{part}.safetensors")
    images = CalibrationSettings(images=tmp_path / "images")
    settings = EvaluateSettings.model_validate({"fidelity": None, "quality": {"samples": 4}})
    evaluator, told = evaluator_for(vit, settings, 0, images), _Told()
    reference = evaluator.reference(vit, None, told)
    names = class_names(vit.config)[7:9]
    assert told.notes == [
        f"accuracy: 2 classes have no held-out image ({names[0]!r}, {names[1]!r}), so it says nothing of them"
    ]
    assert evaluator.compare(vit, reference, QUIET).details["quality"]["absent_classes"] == names
    told = _Told()
    evaluator_for(vit, EVALUATE, 0, CalibrationSettings()).reference(vit, None, told)
    assert told.notes == []


def test_copies_of_held_out_images_are_counted(vit, tmp_path):
    pixels = torch.arange(12)[:, None, None].expand(12, 28, 28).byte().contiguous()
    (tmp_path / "images").mkdir()
    save_file({"pixels": pixels}, tmp_path / "images" / "train.safetensors")
    save_file({"pixels": pixels[[3, 5]].contiguous()}, tmp_path / "images" / "test.safetensors")
    settings = EvaluateSettings.model_validate({"fidelity": {"samples": 2}})
    evaluator = evaluator_for(vit, settings, 0, CalibrationSettings(images=tmp_path / "images"))
    result = evaluator.compare(vit, evaluator.reference(vit, None, QUIET), QUIET)
    assert result.details["images"] == {"held_out": 2, "skipped": 0, "copies": 2, "seed": 0}
