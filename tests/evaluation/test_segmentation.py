"""Figures of a model that segments: by hand, on held-out images, at points of the seed, image by image."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from compress.calibration.seeds import generator_for
from compress.calibration.segmentation import scene_pools_of
from compress.calibration.segmenting import best_masks, embeddings, iou, random_points
from compress.errors import SourceError
from compress.evaluation import segmentation
from compress.evaluation.by_task import evaluator_for
from compress.evaluation.mask_examples import COUNT, pack, unpack
from compress.evaluation.mask_metrics import agreement_details, size_rows
from compress.evaluation.segmentation import SegmentationEvaluator, images_together
from compress.evaluation.speed import measure_speed, recorded_speed
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, ModelRef, SpeedSettings
from safetensors.torch import load_file

from ..tiny_sam import save_tiny_sam
from ..tiny_scenes import write_parts, write_scenes

QUIET = SilentProgress()
EVALUATE = EvaluateSettings.model_validate(
    {"fidelity": {"samples": 8, "points": 3, "batch_size": 1}, "quality": {"samples": 10, "batch_size": 1}}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_sam(tmp_path_factory.mktemp("sam") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images with two masks each are held out, and four others without."""
    place = write_parts(tmp_path_factory.mktemp("scenes"), 6, 12, objects=2)
    write_scenes(place / "validation" / "plain", 4, masks=False, seed=5, height=40, width=70)
    return place


@pytest.fixture(scope="module")
def opened(folder):
    return partial(open_model, ModelRef(id=str(folder)), progress=QUIET)


@pytest.fixture(scope="module")
def recorded(opened, images, tmp_path_factory):
    evaluator = evaluator_for(opened(), EVALUATE, 0, CalibrationSettings(images=images))
    cache = tmp_path_factory.mktemp("references")
    return evaluator, cache, evaluator.reference(opened(), cache, QUIET)


def _worse(model):
    """Disturb the last layer of an encoder."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = model.module.vision_encoder.layers[-1].mlp.lin2.weight
        weight.add_(torch.randn(weight.shape, generator=generator))
    return model


def test_agreement_by_hand():
    found = agreement_details(["a", "b"], [torch.tensor([1.0, 0.9]), torch.tensor([0.5, 0.1])])
    assert found["prompts"] == 4 and found["good"] == 0.5
    assert found["worst"] == [
        {"image": "b", "mean": 0.3, "lowest": 0.1}, {"image": "a", "mean": 0.95, "lowest": 0.9}
    ]  # fmt: skip
    many = agreement_details([str(index) for index in range(9)], [torch.tensor([0.5])] * 9)
    assert [row["image"] for row in many["worst"]] == ["0", "1", "2", "3", "4"]


def test_sizes_by_hand():
    shares = torch.tensor([0.005, 0.01, 0.5, 1.0])
    rows = size_rows(shares, torch.tensor([0.5, 1.0, 0.25, 0.75]), torch.tensor([0.0, 0.5, 1.0, 0.0]))
    assert [(row["size"], row["masks"], row["original"], row["result"]) for row in rows] == [
        ("small", 1, 0.5, 0.0), ("medium", 1, 1.0, 0.5), ("large", 2, 0.5, 0.5)
    ]  # fmt: skip
    assert [row["size"] for row in size_rows(shares[3:], shares[3:], shares[3:])] == ["large"]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (7, 9)])
def test_masks_survive_as_bits(size):
    masks = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) > 0.5
    masks[1] = False
    bits = pack(masks)
    assert bits.dtype == torch.uint8 and bits.shape == (3, -(-size[0] * size[1] // 8))
    assert torch.equal(unpack(bits, size), masks)


def test_the_original_agrees_with_itself(opened, recorded):
    evaluator, _, reference = recorded
    result = evaluator.compare(opened(), reference, QUIET)
    assert result.metrics["sqnr_db"] == 200.0 and result.metrics["mask_agreement"] == 1.0
    assert result.metrics["miou"] == result.metrics["miou_original"] and result.metrics["miou_drop"] == 0.0
    found = result.details["segmentation"]
    assert (found["held_out"], found["skipped"], found["copies"], found["seed"]) == (16, 0, 0, 0)
    assert found["fidelity"]["prompts"] == 24 and found["fidelity"]["good"] == 1.0
    assert found["quality"]["masks"] == 20 == sum(row["masks"] for row in found["quality"]["sizes"])
    json.dumps(result.details)


def test_figures_are_those_of_the_images_one_by_one(opened, images, recorded):
    """Measured again without the evaluator: embeddings, masks at the seed's points, true masks."""
    evaluator, _, reference = recorded
    worse = _worse(opened())
    result = evaluator.compare(worse, reference, QUIET)
    before, held_out = opened(), scene_pools_of(opened(), CalibrationSettings(images=images), 0).held_out
    signal = error = 0.0
    agreement, fits = [], {"miou_original": [], "miou": []}
    for index in range(8):
        scenes = held_out.first(8)
        scene = scenes.scene(index)
        pair = [embeddings(model.module, scene.pixels[None])[0] for model in (before, worse)]
        signal += float(pair[0].double().square().sum())
        error += float((pair[1].double() - pair[0].double()).square().sum())
        points = random_points(scene, 3, generator_for(0, "prompts", scenes.names[index]))
        masks = [best_masks(before.module, embedding, scene, points)[0] for embedding in pair[:1]]
        masks.append(best_masks(worse.module, pair[1], scene, points)[0])
        agreement.append(iou(*masks))
    scenes = held_out.first(10, annotated=True)
    for index in range(10):
        scene, annotations = scenes.scene(index), scenes.annotations(index)
        points = torch.tensor([annotation.point for annotation in annotations])
        wanted = torch.from_numpy(np.stack([annotation.mask for annotation in annotations]))
        for name, model in (("miou_original", before), ("miou", worse)):
            embedding = embeddings(model.module, scene.pixels[None])[0]
            fits[name].append(iou(best_masks(model.module, embedding, scene, points)[0], wanted))
    metrics = result.metrics
    assert metrics["sqnr_db"] == pytest.approx(10 * np.log10(signal / error), abs=1e-3)
    assert metrics["mask_agreement"] == pytest.approx(float(torch.cat(agreement).mean()), abs=2e-5)
    assert 0.05 < metrics["mask_agreement"] < 0.999
    for name, overlaps in fits.items():
        assert metrics[name] == pytest.approx(float(torch.cat(overlaps).mean()), abs=2e-5)
    assert abs(metrics["miou_drop"]) > 5e-4, "else one model's could stand for the other's"
    assert metrics["miou_drop"] == pytest.approx(metrics["miou_original"] - metrics["miou"], abs=1e-5)
    worst = result.details["segmentation"]["fidelity"]["worst"]
    assert worst[0]["mean"] == pytest.approx(min(float(one.mean()) for one in agreement), abs=2e-5)
    between = evaluator.between(worse, reference, QUIET)
    assert between.metrics == metrics and between.masks == ()


def test_a_recording_is_found_again(opened, images, recorded):
    evaluator, cache, reference = recorded
    before = reference.folder.stat().st_mtime_ns
    settings = CalibrationSettings(images=images)
    again = SegmentationEvaluator(EVALUATE, 0, settings).reference(opened(), cache, QUIET)
    assert again.folder == reference.folder and again.folder.stat().st_mtime_ns == before
    fewer = EvaluateSettings.model_validate({"fidelity": {"samples": 8, "points": 2}})
    timed = EVALUATE.model_copy(update={"speed": SpeedSettings()})
    for seed, changed, same in ((1, EVALUATE, False), (0, fewer, False), (0, timed, True)):
        other = SegmentationEvaluator(changed, seed, settings).reference(opened(), cache, QUIET)
        assert (other.folder == reference.folder) is same


def test_two_recordings_and_two_comparisons_are_equal(opened, images, recorded, tmp_path):
    evaluator, _, reference = recorded
    other = SegmentationEvaluator(EVALUATE, 0, CalibrationSettings(images=images))
    again = other.reference(opened(), tmp_path, QUIET)
    names = sorted(path.name for path in reference.folder.iterdir())
    held_out = scene_pools_of(opened(), CalibrationSettings(images=images), 0).held_out
    rows = {*held_out.first(8).rows, *held_out.first(10, annotated=True).rows}
    assert 10 < len(rows) < 16 and len(names) == len(rows) + 1, "a file an image, and the index"
    for name in names:
        assert (again.folder / name).read_bytes() == (reference.folder / name).read_bytes()
    first, second = (
        one.compare(_worse(opened()), ref, QUIET) for one, ref in ((evaluator, reference), (other, again))
    )
    assert first.metrics == second.metrics and first.details == second.details
    assert all((a.image == b.image).all() for a, b in zip(first.masks, second.masks, strict=True))


def test_points_belong_to_an_image_and_not_to_its_place(opened, images, tmp_path):
    """More images, or others before it, leave an image its points."""
    points = {}
    for samples in (4, 9):
        settings = EvaluateSettings.model_validate({"fidelity": {"samples": samples}})
        evaluator = SegmentationEvaluator(settings, 0, CalibrationSettings(images=images))
        reference = evaluator.reference(opened(), tmp_path, QUIET)
        files = sorted(reference.folder.glob("*.safetensors"))
        assert len(files) == samples
        points[samples] = [load_file(path)["points"] for path in files]
    assert all(torch.equal(a, b) for a, b in zip(points[4], points[9], strict=False))
    assert not torch.equal(points[9][0], points[9][1])
    held_out = scene_pools_of(opened(), CalibrationSettings(images=images), 0).held_out.first(9)
    for index, found in enumerate(points[9]):
        height, width = held_out.scene(index).size
        assert found.shape == (4, 2) and bool((found >= 0).all())
        assert bool((found[:, 0] <= width).all() and (found[:, 1] <= height).all())


def test_an_image_is_embedded_once_and_few_are_in_memory(opened, images, monkeypatch):
    """Those of both parts are the same; a forward takes no more than is asked for."""
    seen = []

    def watched(module, pixels):
        seen.append(len(pixels))
        return embeddings(module, pixels)

    monkeypatch.setattr(segmentation, "embeddings", watched)
    settings = EvaluateSettings.model_validate(
        {"fidelity": {"samples": 7, "batch_size": 2}, "quality": {"samples": 10, "batch_size": 3}}
    )
    evaluator = SegmentationEvaluator(settings, 0, CalibrationSettings(images=images))
    evaluator.compare(opened(), evaluator.reference(opened(), None, QUIET), QUIET)
    held_out = scene_pools_of(opened(), CalibrationSettings(images=images), 0).held_out
    count = len({*held_out.first(7).rows, *held_out.first(10, annotated=True).rows})
    assert 10 < count < 17 and sum(seen) == 2 * count
    assert set(seen[: -(-count // 3) - 1]) == {3}
    monkeypatch.setattr(segmentation, "images_together", lambda config, asked: 1)
    seen.clear()
    evaluator.reference(opened(), None, QUIET)
    assert seen == [1] * count


def test_large_images_are_taken_one_by_one():
    base = {"vision_config": {"image_size": 1024}}
    assert images_together(base, 8) == 1
    assert images_together({"vision_config": {"image_size": 256}}, 8) == 8
    assert 1 < images_together({"vision_config": {"image_size": 512}}, 100) < 10
    no_global = {"vision_config": {"global_attn_indexes": []}}
    assert images_together(no_global, 100) > 1, "windows have small scores"


def test_examples_are_those_of_which_the_original_is_surest(opened, recorded, images):
    evaluator, _, reference = recorded
    worse = _worse(opened())
    found = evaluator.compare(worse, reference, QUIET).masks
    scenes = scene_pools_of(opened(), CalibrationSettings(images=images), 0).held_out.first(
        10, annotated=True
    )
    assert len(found) == COUNT and sorted(one.name for one in found) == sorted(scenes.names[:COUNT])
    for one in found:
        index = scenes.names.index(one.name)
        scene, annotations = scenes.scene(index), scenes.annotations(index)
        points = torch.tensor([annotation.point for annotation in annotations])
        embedding = embeddings(opened().module, scene.pixels[None])[0]
        masks, scores = best_masks(opened().module, embedding, scene, points)
        best = int(scores.argmax())
        assert one.point == pytest.approx(annotations[best].point)
        assert (one.truth == annotations[best].mask).all()
        assert (one.original == masks[best].numpy()).all()
        assert one.image.shape == (48, 64, 3) and (one.image == scenes.image(index)).all()
        wanted = torch.from_numpy(one.truth)[None]
        assert one.result_iou == pytest.approx(
            float(iou(torch.from_numpy(one.result)[None], wanted)), abs=1e-6
        )
        assert one.agreement == pytest.approx(
            float(iou(torch.from_numpy(one.result)[None], torch.from_numpy(one.original)[None])), abs=1e-6
        )


def test_images_without_masks_and_of_any_shape_give_agreement_alone(opened, tmp_path):
    write_scenes(tmp_path / "images" / "train", 4, masks=False, seed=3)
    write_scenes(tmp_path / "images" / "validation", 3, masks=False, height=90, width=50)
    write_scenes(tmp_path / "images" / "validation" / "wide", 3, masks=False, height=20, width=200, seed=5)
    settings = EvaluateSettings.model_validate({"fidelity": {"samples": 6, "points": 9}})
    evaluator = SegmentationEvaluator(settings, 0, CalibrationSettings(images=tmp_path / "images"))
    reference = evaluator.reference(opened(), None, QUIET)
    result = evaluator.compare(_worse(opened()), reference, QUIET)
    assert set(result.metrics) == {"sqnr_db", "mask_agreement"}
    assert "quality" not in result.details["segmentation"]
    assert len(result.masks) == 6 and all(one.truth is None for one in result.masks)
    assert {one.image.shape for one in result.masks} == {(90, 50, 3), (20, 200, 3)}
    wanted = EvaluateSettings.model_validate({"fidelity": None, "quality": {"samples": 2}})
    evaluator = SegmentationEvaluator(wanted, 0, CalibrationSettings(images=tmp_path / "images"))
    with pytest.raises(SourceError, match="0 images with masks are held out for measuring; 2 are asked"):
        evaluator.reference(opened(), None, QUIET)


def test_quality_alone_needs_no_random_points(opened, images):
    settings = EvaluateSettings.model_validate({"fidelity": None, "quality": {"samples": 3}})
    evaluator = SegmentationEvaluator(settings, 0, CalibrationSettings(images=images))
    reference = evaluator.reference(opened(), None, QUIET)
    assert all("embedding" not in load_file(path) for path in reference.folder.glob("*.safetensors"))
    result = evaluator.compare(opened(), reference, QUIET)
    assert set(result.metrics) == {"miou", "miou_original", "miou_drop"}
    assert len(result.masks) == 3


def test_masks_of_nothing_agree(opened, images, monkeypatch):
    """A model that finds nothing at a point: the masks are empty, equal, and no division by zero."""

    def nothing(module, embedding, scene, points):
        return torch.zeros(len(points), *scene.size, dtype=torch.bool), torch.zeros(len(points))

    monkeypatch.setattr(segmentation, "best_masks", nothing)
    evaluator = SegmentationEvaluator(EVALUATE, 0, CalibrationSettings(images=images))
    result = evaluator.compare(opened(), evaluator.reference(opened(), None, QUIET), QUIET)
    assert result.metrics["mask_agreement"] == 1.0 and result.metrics["miou"] == 0.0


def test_nothing_is_measured_where_all_is_off(opened):
    settings = EvaluateSettings.model_validate({"fidelity": None})
    evaluator = SegmentationEvaluator(settings, 0, CalibrationSettings())
    reference = evaluator.reference(opened(), None, QUIET)
    assert evaluator.compare(opened(), reference, QUIET).metrics == {}
    assert evaluator.between(opened(), reference, QUIET).metrics == {}


def test_the_encoder_is_timed_beside_the_whole_model(opened):
    model, settings = opened(), SpeedSettings(batch_size=1, rounds=2)
    module, calls = opened().module, []
    for name in ("vision_encoder", "mask_decoder"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    found = json.loads(json.dumps(measure_speed(model, module, settings, 0, QUIET)))
    assert calls == ["vision_encoder", "mask_decoder"] * 4 + ["vision_encoder"] * 4, "two rounds warm up"
    times = found["encoder"]
    assert times["speedup"] == pytest.approx(times["original_seconds"] / times["seconds"], rel=0.01)
    assert recorded_speed({"speed": found}) == found
    for damage in (3, {}, {**found["encoder"], "speedup": 0}, {**found["encoder"], "more": 1.0}):
        assert recorded_speed({"speed": {**found, "encoder": damage}}) is None
