"""Embeddings and masks of a model that segments, held against the library's own way to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress.calibration import segmenting
from compress.calibration.scene_preprocessing import preprocessor_in
from compress.calibration.seeds import generator_for
from compress.calibration.segmenting import best_masks, embeddings, iou, random_points

from ..tiny_sam import save_tiny_sam, tiny_sam
from ..tiny_scenes import drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_sam(tmp_path_factory.mktemp("sam") / "model")


def _prompted(folder, size, count=5):
    image = drawn(1, *size)[0][0]
    scene = preprocessor_in(folder, 64, "sam")(image)
    return image, scene, random_points(scene, count, generator_for(0, "points"))


@pytest.mark.parametrize("size", [(48, 64), (100, 40), (31, 200)])
@pytest.mark.parametrize("at_once", [(64, 2**25), (2, 1)])
def test_masks_are_those_of_the_librarys_processor(folder, size, at_once, monkeypatch):
    """From points of the stored image to masks of its size; in parts it is the same."""
    from transformers import SamImageProcessorPil, SamProcessor

    monkeypatch.setattr(segmenting, "MOST_POINTS", at_once[0])
    monkeypatch.setattr(segmenting, "_ELEMENTS", at_once[1])
    module = tiny_sam()
    image, scene, points = _prompted(folder, size)
    masks, scores = best_masks(module, embeddings(module, scene.pixels[None])[0], scene, points)
    processor = SamProcessor(SamImageProcessorPil.from_pretrained(folder))
    asked = processor(image, input_points=[[[point] for point in points.tolist()]], return_tensors="pt")
    with torch.no_grad():
        output = module(pixel_values=asked["pixel_values"], input_points=asked["input_points"].float())
    (wanted,) = processor.image_processor.post_process_masks(
        output.pred_masks, asked["original_sizes"], asked["reshaped_input_sizes"]
    )
    rated, best = output.iou_scores[0].max(dim=-1)
    assert masks.shape == (5, *size) and masks.dtype == torch.bool and scores.dtype == torch.float32
    assert torch.allclose(scores, rated, atol=1e-5)
    assert (masks == wanted[torch.arange(5), best]).float().mean() > 0.9999
    assert 0.05 < masks.float().mean() < 0.95, "neither all nor nothing"


def test_the_best_of_three_is_by_rating_and_not_the_first(folder):
    module = tiny_sam()
    chosen = set()
    for seed in range(4):
        scene = preprocessor_in(folder, 64, "sam")(drawn(1, seed=seed)[0][0])
        points = random_points(scene, 8, generator_for(seed, "points"))
        with torch.no_grad():
            output = module(pixel_values=scene.pixels[None], input_points=scene.points(points)[None, :, None])
        chosen.update(output.iou_scores[0].argmax(dim=-1).tolist())
        found = best_masks(module, embeddings(module, scene.pixels[None])[0], scene, points)[1]
        assert torch.allclose(found, output.iou_scores[0].amax(dim=-1), atol=1e-5)
    assert chosen - {0}, "this model prefers others, too"


def test_embeddings_are_the_encoders_in_float32(folder):
    module = tiny_sam()
    pixels = torch.stack([_prompted(folder, size)[1].pixels for size in ((48, 64), (64, 48))])
    found = embeddings(module, pixels)
    with torch.no_grad():
        assert torch.equal(found, module.vision_encoder(pixels).last_hidden_state)
    assert found.shape == (2, 32, 8, 8) and not found.requires_grad
    half = embeddings(tiny_sam().to(torch.bfloat16), pixels)
    assert half.dtype == torch.float32 and 0 < (half - found).abs().max() < 0.5


def test_points_keep_their_places_in_half_precision(folder):
    """1,000 pixels do not fit the eight bits of bfloat16; of 64 x 64 some do not, either."""
    module = tiny_sam().to(torch.bfloat16)
    _, scene, _ = _prompted(folder, (100, 130))
    seen = []
    handle = module.prompt_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_points"]), with_kwargs=True
    )
    point = torch.tensor([[101.0, 77.0]])
    masks, _ = best_masks(module, embeddings(module, scene.pixels[None])[0], scene, point)
    handle.remove()
    assert torch.equal(seen[0].flatten(), scene.points(point).flatten()) and masks.shape == (1, 100, 130)


def test_no_points_give_no_masks(folder):
    module = tiny_sam()
    _, scene, _ = _prompted(folder, (48, 64))
    masks, scores = best_masks(module, embeddings(module, scene.pixels[None])[0], scene, torch.zeros(0, 2))
    assert masks.shape == (0, 48, 64) and scores.shape == (0,)


def test_intersection_over_union_by_hand():
    a, b = np.zeros((4, 2, 3), dtype=bool), np.zeros((4, 2, 3), dtype=bool)
    a[0, 0], b[0, :, 0] = True, True  # 3 and 2 pixels, one of them common
    a[1], b[1] = True, True
    a[2, 0, 0], b[2, 1, 1] = True, True
    found = iou(torch.from_numpy(a), torch.from_numpy(b))
    assert found.tolist() == [0.25, 1.0, 0.0, 1.0] and found.dtype == torch.float32


def test_random_points_reach_every_pixel_and_no_other(folder):
    _, scene, _ = _prompted(folder, (31, 200))
    points = random_points(scene, 20_000, generator_for(1, "points"))
    assert points.shape == (20_000, 2) and points.dtype == torch.float32
    assert points.amin(dim=0).tolist() == [0, 0] and points.amax(dim=0).tolist() == [199, 30]
    again = random_points(scene, 20_000, generator_for(1, "points"))
    assert torch.equal(points, again)
    assert not torch.equal(points, random_points(scene, 20_000, generator_for(2, "points")))
