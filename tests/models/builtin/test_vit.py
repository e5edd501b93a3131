"""The shipped vision transformer is what its folder says it is, and its scripts make it."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from compress.models.builtin.course import Course
from compress.models.builtin.data import CLASS_NAMES, load_split
from compress.models.builtin.train_vit import build_model, hits, shifted, shipped_accuracy, train
from compress.models.builtin.write_images import FOLDER, balanced, write
from safetensors.torch import load_file

VIT = FOLDER.parent
DATA = Path(__file__).parents[3].parent / "shared" / "data" / "fashion-mnist"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs shared/data/fashion-mnist")


def test_the_folder_is_small_and_its_readme_quotes_its_record():
    assert sum(path.stat().st_size for path in VIT.rglob("*") if path.is_file()) < 7_500_000
    record = json.loads((VIT / "training.json").read_text())
    readme = (VIT / "README.md").read_text()
    assert f"{record['test_accuracy']:.2%}" in readme and f"{record['shipped_accuracy']:.2%}" in readme
    assert f"`--steps {record['steps']}`" in readme and f"--seed {record['seed']}" in readme
    assert record["test_accuracy"] >= 0.89


def test_it_opens_with_the_stock_class_and_names_as_much_as_was_written_down():
    from transformers import ViTForImageClassification

    model, notes = ViTForImageClassification.from_pretrained(
        VIT, dtype=torch.float32, output_loading_info=True
    )
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tuple(model.config.id2label.values()) == CLASS_NAMES
    record = json.loads((VIT / "training.json").read_text())
    measured = shipped_accuracy(model, FOLDER / "test.safetensors")
    assert measured == pytest.approx(record["shipped_accuracy"], abs=1e-3)


@pytest.mark.parametrize(("file", "per_class"), [("train", 500), ("test", 200)])
def test_images_are_bytes_and_every_class_is_there_equally_often(file, per_class):
    tensors = load_file(FOLDER / f"{file}.safetensors")
    assert tensors["pixels"].dtype == tensors["labels"].dtype == torch.uint8
    assert tensors["pixels"].shape == (10 * per_class, 28, 28)
    assert torch.bincount(tensors["labels"].long()).tolist() == [per_class] * 10
    assert len(set(tensors["labels"][:20].tolist())) > 4  # in random order


@needs_data
def test_images_are_those_that_the_script_draws(tmp_path):
    write(DATA, tmp_path / "test.safetensors", "t10k", 200, seed=0)
    assert (tmp_path / "test.safetensors").read_bytes() == (FOLDER / "test.safetensors").read_bytes()
    images, labels = load_split(DATA, "t10k")
    tensors = load_file(FOLDER / "test.safetensors")
    known = {image.tobytes() for image in images.add(1).mul(127.5).round().to(torch.uint8).numpy()}
    assert all(image.tobytes() in known for image in tensors["pixels"].numpy())


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="3 images of 'trouser' are wanted and 2 are there"):
        labels = torch.tensor([0, 0, 0, 1, 1])
        balanced(labels, 3, torch.Generator().manual_seed(0))


def test_every_image_is_shifted_by_itself_and_loses_nothing_inside():
    images = torch.full((64, 1, 28, 28), -1.0)
    images[:, :, 14, 14] = 1.0
    moved = shifted(images, torch.Generator().manual_seed(0))
    places = {tuple(image[0].nonzero().flatten().tolist()) for image in moved > 0}
    assert len(places) > 15 and all(12 <= row <= 16 and 12 <= column <= 16 for row, column in places)
    assert torch.equal(moved.sum(dim=(1, 2, 3)), images.sum(dim=(1, 2, 3)))


def test_training_learns_and_follows_its_seed():
    def trained(steps: int) -> torch.nn.Module:
        torch.manual_seed(0)
        model = build_model(hidden=32, layers=1, heads=2, patch=7).train()
        args = argparse.Namespace(seed=0, lr=3e-2, batch=16, ema=0.9)
        return train(model, images, labels, Course(limit_steps=steps, limit_seconds=0.0), args)

    tensors = load_file(FOLDER / "train.safetensors")
    images = tensors["pixels"][:64, None].float().div(127.5).sub(1.0)
    labels = tensors["labels"][:64].long()
    with torch.random.fork_rng():
        learned = trained(160)
        one, other = trained(5).state_dict(), trained(5).state_dict()
    assert float(hits(learned, images, labels).float().mean()) > 0.4  # of ten classes
    assert all(torch.equal(one[name], other[name]) for name in one)
