"""The choice images: against the original's output, and against true masks."""

import copy

import numpy as np
import pytest
import torch
from compress.calibration.scene_files import find_scenes
from compress.calibration.scene_sets import divide
from compress.calibration.segmenting import best_masks, embeddings
from compress.compressors.pruning.sam import judging
from compress.compressors.pruning.sam.judging import Choice
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef

from ....tiny_sam import save_tiny_sam
from ....tiny_scenes import write_scenes
from .learners import narrower


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return a tiny model."""
    folder = save_tiny_sam(tmp_path_factory.mktemp("judging") / "model")
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


@pytest.fixture(scope="module")
def scenes(opened, tmp_path_factory):
    """Return `scenes(masks)`: the images that are learned from, 8 of 10, with two masks each or none."""
    made = {}
    for masks in (True, False):
        folder = tmp_path_factory.mktemp("scenes") / f"masks-{masks}"
        write_scenes(folder, 10, masks=masks, objects=2, suffix=".png")
        made[masks] = divide(opened, find_scenes(folder), False, 0).train.all()
    return made.__getitem__


def _spread(module, pixels):
    with torch.no_grad():
        return module.vision_encoder(pixels).last_hidden_state


def test_without_masks_the_output_decides(opened, scenes):
    images = scenes(False)
    choice, student = Choice(images, opened.module), narrower(opened.module)
    assert (choice.by, choice.images, choice.masks, choice.key) == (
        "output_error",
        len(images),
        None,
        images.key,
    )
    assert choice.measure(opened.module) == 0.0 and choice.miou(opened.module) is None
    pixels = images.pixels(range(len(images)))
    wanted = (_spread(student, pixels) - _spread(opened.module, pixels)).square().mean().item()
    assert choice.measure(student) == choice.output_error(student) == pytest.approx(wanted, rel=1e-4)
    verdict = choice.judge(student)
    assert verdict.output_error == choice.measure(student) > 0.01 and verdict.miou is None
    assert choice.better(1.0, 2.0) and not choice.better(1.0, 1.0) and not choice.better(float("nan"), 1.0)


def test_with_masks_they_decide(opened, scenes):
    images = scenes(True)
    choice, student = Choice(images, opened.module), narrower(opened.module)
    assert (choice.by, choice.images, choice.masks) == ("miou", len(images), 2 * len(images))
    overlaps = []
    for index in range(len(images)):
        scene = images.scene(index)
        embedding = embeddings(student, scene.pixels[None])[0]
        for item in images.annotations(index):
            mask = best_masks(student, embedding, scene, torch.tensor([item.point]))[0][0].numpy()
            overlaps.append((mask & item.mask).sum() / (mask | item.mask).sum())
    verdict = choice.judge(student)
    assert choice.measure(student) == choice.miou(student) == verdict.miou
    assert verdict.miou == pytest.approx(float(np.mean(overlaps)), abs=1e-6)
    assert verdict.output_error == choice.output_error(student) > 0.01
    assert choice.better(0.5, 0.4) and not choice.better(0.5, 0.5) and not choice.better(float("nan"), 0.5)


def test_true_masks_are_worth_1_and_their_opposites_0(opened, scenes, monkeypatch):
    images, truth = scenes(True), []
    monkeypatch.setattr(judging, "best_masks", lambda *_: (truth.pop(0), torch.zeros(2)))
    for right, wanted in ((True, 1.0), (False, 0.0)):
        for index in range(len(images)):
            masks = torch.stack([torch.from_numpy(item.mask) for item in images.annotations(index)])
            truth.append(masks if right else ~masks)
        assert Choice(images, opened.module).measure(opened.module) == wanted


@pytest.mark.parametrize(("room", "kept"), [(None, True), (3 * 32 * 8 * 8 * 4, False)])
def test_the_original_answers_once_where_there_is_room(room, kept, opened, scenes):
    """An embedding has 32 channels of 8 x 8 here; there may be room for three of them."""
    images, original, asked = scenes(False), copy.deepcopy(opened.module), []
    original.vision_encoder.register_forward_hook(lambda *_: asked.append(None))
    given = {} if room is None else {"kept_bytes": room}
    choice, student = Choice(images, original, **given), narrower(opened.module)
    first = choice.output_error(student)
    assert len(asked) == len(images)
    assert choice.output_error(student) == first
    assert len(asked) == (len(images) if kept else 2 * len(images) - 3)


def test_models_in_half_precision_are_judged(opened, scenes):
    """As in a training of such a checkpoint: the encoder in float32 meanwhile, the rest as it is stored."""
    images, original = scenes(True), copy.deepcopy(opened.module).to(torch.bfloat16)
    student = copy.deepcopy(original)
    student.vision_encoder.float()
    choice = Choice(images, original)
    assert 0 < choice.judge(student).output_error < 0.05
    assert 0 <= choice.measure(student) <= 1
