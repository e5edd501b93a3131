"""The shipped Segment Anything model is what its folder says it is, and its script makes it."""

import argparse
import json
import tarfile

import numpy as np
import pytest
import torch
from compress.models.builtin.course import Course
from compress.models.builtin.scenes import SOURCES, Photographs, decoded
from compress.models.builtin.train_sam import (
    OTHERS,
    build_model,
    draw_batch,
    measured,
    pixel_values,
    step_loss,
    train,
)
from compress.models.builtin.write_scenes import FOLDER
from PIL import Image

from .test_scenes import unpacked

SAM = FOLDER.parent


@pytest.fixture
def photographs(tmp_path):
    """Smooth photographs under the names of the real ones."""
    rows, columns = np.mgrid[0:512, 0:640]
    for number, (name, (_, _, right, bottom)) in enumerate(SOURCES.items()):
        waves = [128 + 60 * np.sin(rows / (20 + 9 * number) + columns / (30 + turn)) for turn in range(3)]
        Image.fromarray(np.stack(waves, axis=-1)[:bottom, :right].astype(np.uint8)).save(tmp_path / name)
    return Photographs(tmp_path, "train")


def shipped(part: str, count: int):
    """Yield images, masks and points of an archive."""
    with tarfile.open(FOLDER / f"{part}.tar") as archive:
        for number in range(1, count + 1):
            name = f"{part}_{number:04d}"
            notes = json.loads(archive.extractfile(f"{name}.json").read())["annotations"]
            masks = [
                unpacked(note["segmentation"]["counts"], *note["segmentation"]["size"]) for note in notes
            ]
            points = np.array([note["point_coords"][0] for note in notes])
            yield decoded(archive.extractfile(f"{name}.jpg").read()), np.stack(masks), points


def test_the_folder_is_small_and_its_readme_quotes_its_record():
    assert sum(path.stat().st_size for path in SAM.rglob("*") if path.is_file()) < 6_500_000
    assert (SAM / "model.safetensors").stat().st_size < 4_100_000
    record = json.loads((SAM / "training.json").read_text())
    readme = (SAM / "README.md").read_text()
    assert f"| {record['miou']:.4f} |" in readme and f"| {record['best_miou']:.4f} |" in readme
    assert f"--steps {record['steps']} --seed {record['seed']}" in readme
    assert all(name in readme for name in SOURCES)
    assert record["miou"] >= 0.7


def test_it_opens_with_the_stock_class_and_segments_as_well_as_was_written_down():
    from transformers import SamModel

    model, notes = SamModel.from_pretrained(SAM, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    record = json.loads((SAM / "training.json").read_text())
    found = measured(model.eval(), shipped("validation", 64))
    assert found["masks"] == record["masks"]
    assert found["miou"] == pytest.approx(record["miou"], abs=2e-3)
    assert found["best_miou"] == pytest.approx(record["best_miou"], abs=2e-3)


def test_the_processor_prepares_what_the_training_saw():
    from transformers import SamImageProcessorPil

    processor = SamImageProcessorPil.from_pretrained(SAM)
    for image, _, _ in shipped("validation", 6):
        prepared = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        assert torch.allclose(prepared, pixel_values([image]), atol=1e-5)


def test_every_layer_is_alive_before_training():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(hidden=32, layers=2, heads=2)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std() > 1e-3, name
    table = model.shared_image_embedding.positional_embedding
    assert 0.5 < float(table.std()) < 2.0 and not table.requires_grad
    assert table is model.prompt_encoder.shared_embedding.positional_embedding


def test_points_lie_on_what_they_ask_for(photographs):
    batch = draw_batch(photographs, np.random.default_rng(0), 12, 5)
    assert batch.pixels.shape == (12, 3, 128, 128) and batch.truth.shape == (12, 5, 64, 64)
    places = (batch.points[:, :, 0] / 2).long()
    at = batch.truth.flatten(0, 1)[torch.arange(60), places[..., 1].flatten(), places[..., 0].flatten()]
    assert (at > 0).all() and (at == 1).float().mean() > 0.8
    assert (batch.truth * (1 - batch.valid[:, :]) == 0).all()
    assert batch.valid.mean(dim=(1, 2, 3)).unique().tolist() == [0.75, 1.0]


def test_training_learns_and_follows_its_seed(photographs):
    def trained(steps: int) -> torch.nn.Module:
        torch.manual_seed(0)
        model = build_model(hidden=32, layers=2, heads=2).train()
        args = argparse.Namespace(seed=0, lr=4e-3, batch=4, points=2, ema=0.9)
        return train(model, photographs, Course(limit_steps=steps, limit_seconds=0.0), args)

    with torch.random.fork_rng():
        first, learned = trained(1), trained(40)
        one, other = trained(3).state_dict(), trained(3).state_dict()
    batch = draw_batch(photographs, np.random.default_rng(7), 8, 3)
    with torch.no_grad():
        before, after = (step_loss(model, batch, several=True)[0] for model in (first, learned))
    assert after < 0.9 * before
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_that_of_the_best_mask_and_of_all_rated_ones():
    """Three masks of which one is right: it costs nothing, the others half; ratings are held against IoU."""
    truth = torch.zeros(1, 1, 64, 64)
    truth[..., :32] = 1.0
    logits = torch.full((1, 1, 3, 64, 64), -20.0)
    logits[:, :, 1] = 40 * truth - 20

    class Answers(torch.nn.Module):
        def __init__(self, scores: list[float]) -> None:
            super().__init__()
            self.scores = torch.tensor(scores)[None, None]

        def forward(self, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
            return self.scores, logits

    batch = draw_of(truth)
    right, iou = step_loss(Answers([0.0, 1.0, 0.0]), batch, several=True)
    wrong, _ = step_loss(Answers([1.0, 0.0, 0.0]), batch, several=True)
    assert float(iou) == 1.0 and float(wrong - right) == pytest.approx(2 / 3, abs=1e-4)
    # Two masks see nothing of the half that is there: focal 20 * 0.5 * 20, dice 1, of three masks, by OTHERS.
    assert float(right) == pytest.approx(OTHERS * 2 / 3 * (20 * 10 + 1), rel=1e-3)


def draw_of(truth: torch.Tensor):
    """Return prompts for one image whose mask is known."""
    from compress.models.builtin.train_sam import Prompts

    return Prompts(torch.zeros(1, 3, 128, 128), torch.zeros(1, 1, 1, 2), truth, torch.ones(1, 1, 64, 64))


def test_masks_are_measured_in_pixels_of_the_image():
    class Half(torch.nn.Module):
        """Answers with the left half of the padded input, rated best, and with nothing."""

        def forward(self, pixel_values: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
            logits = torch.full((1, 1, 2, 64, 64), -1.0)
            logits[:, :, 0, :, :32] = 1.0
            return torch.tensor([[[0.9, 0.1]]]), logits

    mask = np.zeros((1, 96, 128), dtype=bool)
    mask[:, :48, :64] = True
    image, point = np.zeros((96, 128, 3), dtype=np.uint8), np.array([[3.0, 3.0]])
    assert measured(Half(), [(image, mask, point)]) == {"miou": 0.5, "best_miou": 0.5, "masks": 1}
