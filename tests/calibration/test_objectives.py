"""Losses over calibration samples: sums, independent of how samples are divided, with their graph."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.objectives import ClassificationObjective, objective_for
from compress.calibration.recording import record
from compress.errors import StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from torch.nn import functional as F

from .image_folders import by_class, write_images

SAMPLES = 5


def _open(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


@pytest.fixture
def labelled(tmp_path):
    return by_class(tmp_path / "images", [str(number) for number in range(10)], 2)


def _images(model, folder, batch_size=2):
    settings = CalibrationSettings(images=folder, samples=SAMPLES, batch_size=batch_size)
    return record(model, settings, seed=0, cache=None, progress=SilentProgress())


def _total(objective, model):
    return sum(loss.double() for loss, _ in objective.losses(model))


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_classification_losses_by_hand(make_vit, labelled, class_name):
    model = _open(make_vit(class_name))
    calibration = _images(model, labelled)
    with torch.no_grad():
        logits = model.module(calibration.images.pixels(range(SAMPLES))).logits
    wanted = {
        None: F.cross_entropy(logits, calibration.labels, reduction="sum"),
        "cross_entropy": F.cross_entropy(logits, calibration.labels, reduction="sum"),
        "pseudo_labels": -logits.log_softmax(dim=1).amax(dim=1).sum(),
        "output_norm": logits.square().sum() / 10,
    }
    for loss, value in wanted.items():
        objective = objective_for(model, calibration, loss)
        assert (objective.samples, objective.parts) == (SAMPLES, 3)
        assert [count for _, count in objective.losses(model)] == [2, 2, 1]
        assert float(_total(objective, model).detach()) == pytest.approx(float(value), rel=1e-5)


def test_sums_do_not_depend_on_the_parts(make_vit, labelled):
    model = _open(make_vit())
    model.module.requires_grad_(True)
    gradients = []
    for batch_size in (1, 2, 5):
        model.module.zero_grad()
        objective = objective_for(model, _images(model, labelled, batch_size), None)
        for loss, _ in objective.losses(model):
            loss.backward()
        gradients.append(model.module.vit.layers[0].mlp.fc1.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    for other in gradients[1:]:
        assert torch.allclose(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_going_on_from_a_part(make_vit, labelled):
    model = _open(make_vit())
    objective = objective_for(model, _images(model, labelled), None)
    every = [float(loss) for loss, _ in objective.losses(model)]
    assert [float(loss) for loss, _ in objective.losses(model, 1)] == every[1:]
    assert list(objective.losses(model, 3)) == []


def test_pseudo_labels_are_the_original_ones(make_vit, labelled):
    """They stay when the model changes: what it says after pruning does not count as right."""
    model = _open(make_vit())
    objective = objective_for(model, _images(model, labelled), "pseudo_labels")
    before = _total(objective, model)
    with torch.no_grad():
        model.module.classifier.weight.neg_()
        model.module.classifier.bias.neg_()
    assert _total(objective, model) > before + 1e-3


def test_images_without_labels(make_vit, tmp_path):
    model = _open(make_vit())
    folder = write_images(tmp_path / "images", [f"{number}.png" for number in range(8)])
    calibration = _images(model, folder)
    for loss in (None, "cross_entropy"):
        with pytest.raises(StageError, match="the images have no labels") as found:
            objective_for(model, calibration, loss)
        assert all(word in str(found.value.hint) for word in ("pseudo_labels", "output_norm", "magnitude"))
    for loss in ("pseudo_labels", "output_norm"):
        assert float(_total(objective_for(model, calibration, loss), model)) > 0


def test_keys_follow_images_and_losses(make_vit, labelled):
    model = _open(make_vit())
    calibration = _images(model, labelled)
    keys = {objective_for(model, calibration, loss).key for loss in (None, "pseudo_labels", "output_norm")}
    assert len(keys) == 3 and objective_for(model, calibration, "cross_entropy").key in keys


def test_a_key_without_labels(make_vit, tmp_path):
    model = _open(make_vit())
    folder = write_images(tmp_path / "images", [f"{number}.png" for number in range(8)])
    calibration = _images(model, folder)
    found = objective_for(model, calibration, "output_norm")
    assert found.labels is None and found.key == objective_for(model, calibration, "output_norm").key
    given = [
        ClassificationObjective(calibration, "output_norm", labels)
        for labels in (None, torch.zeros(5).long())
    ]
    others = [
        ClassificationObjective(calibration, "cross_entropy", None),
        objective_for(model, calibration, "pseudo_labels"),
    ]
    assert given[0].key == found.key
    assert len({objective.key for objective in (*given, *others)}) == 4


@pytest.mark.parametrize("loss", ["denoising", "nonsense"])
def test_a_loss_of_others_is_refused(make_vit, labelled, loss):
    model = _open(make_vit())
    with pytest.raises(StageError, match=f"loss {loss}: is not for classifiers"):
        objective_for(model, _images(model, labelled), loss)


def test_nothing_to_take_a_loss_of(make_vit):
    model = _open(make_vit())
    calibration = record(model, CalibrationSettings(), seed=0, cache=None, progress=SilentProgress())
    with pytest.raises(StageError, match="no images to take a loss of"):
        objective_for(model, calibration, "output_norm")


def test_language_models_have_none():
    model = open_model(ModelRef(id="builtin:stories"), progress=SilentProgress())
    settings = CalibrationSettings(samples=1, length=16)
    calibration = record(model, settings, seed=0, cache=None, progress=SilentProgress())
    with pytest.raises(StageError, match="no loss is known for the family llm"):
        objective_for(model, calibration, None)
