"""Images that no training can use are refused before a run computes anything; images are hashed once."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from compress import pipeline
from compress.calibration import image_files
from compress.errors import SourceError
from compress.images_ahead import images_of
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from safetensors.torch import save_file

from .calibration.image_folders import by_class

CLASSES = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}


@pytest.fixture
def vit(make_vit):
    return make_vit(num_labels=2, **CLASSES)


@pytest.fixture
def images(tmp_path):
    """8 images to calibrate on, and 4 that are held out."""
    folder = by_class(tmp_path / "images" / "train", ["cat", "dog"], 4).parent
    by_class(folder / "test", ["cat", "dog"], 2, seed=1)
    return folder


def _recipe(model, images, more, tmp_path, **parts):
    stages = [
        {"isomorphic": {"ratios": {"width": 0.5}}},
        {"finetune": {"steps": 1, "batch_size": 2, "images": str(more)}},
    ]
    return {
        "model": str(model), "stages": stages, "export": {"path": str(tmp_path / "out")},
        "calibration": {"images": str(images), "samples": 2}, "evaluate": {"fidelity": {"samples": 2}},
        **parts,
    }  # fmt: skip


def _rows(path, labels, *shape):
    pixels = torch.arange(6 * 16 * 16 * 3).reshape(6, 16, 16, 3)[..., : shape[0] if shape else 3]
    save_file({"pixels": pixels.byte().contiguous(), "labels": torch.tensor(labels)}, path)
    return path


def _wrong_labels(images, tmp_path):
    return _rows(tmp_path / "more.safetensors", [0, 1, 0, 1, 0, 2])


def _unreadable(images, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "more" / name).mkdir(parents=True)
        (tmp_path / "more" / name / "0.png").write_bytes(b"broken")
    return tmp_path / "more"


def _copies(images, tmp_path):
    shutil.copytree(images / "test", tmp_path / "more")
    return tmp_path / "more"


def _nothing_done(tmp_path):
    """No stage has a folder, finished or begun, and the original's answers were not recorded."""
    found = [path for path in tmp_path.glob("work/**/*") if "isomorphic" in path.name]
    return not found and not list(tmp_path.glob("work/**/logits.safetensors"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_wrong_labels, r"more\.safetensors: the label 2 is out of range; the model has 2 classes"),
        (_unreadable, r"stages\[1\]\.finetune\.images: .*none of its 2 images can be read; the first is "),
        (_copies, r"stages\[1\]\.finetune\.images: .*all of its 4 images are also held out for measuring"),
    ],
)
def test_images_that_cannot_be_trained_on_stop_a_run_at_its_start(vit, images, tmp_path, make, message):
    recipe = _recipe(vit, images, make(images, tmp_path), tmp_path)
    with pytest.raises(SourceError, match=message) as found:
        pipeline.run(recipe, work_dir=tmp_path / "work")
    assert found.value.hint
    assert _nothing_done(tmp_path)


def test_and_so_do_coloured_ones_for_a_grey_model(make_vit, images, tmp_path):
    model = make_vit(num_labels=2, num_channels=1, **CLASSES)
    more = _rows(tmp_path / "more.safetensors", [0, 1] * 3)
    with pytest.raises(SourceError, match="the images have 3 channels, the model takes 1") as found:
        pipeline.run(_recipe(model, images, more, tmp_path), work_dir=tmp_path / "work")
    assert found.value.hint
    assert _nothing_done(tmp_path)


def test_labels_of_a_tensor_are_looked_at_by_a_plan(vit, images, tmp_path):
    recipe = _recipe(vit, images, _wrong_labels(images, tmp_path), tmp_path)
    with pytest.raises(SourceError, match="the label 2 is out of range"):
        pipeline.plan(recipe)
    pipeline.plan(_recipe(vit, images, _rows(tmp_path / "more.safetensors", [0, 1] * 3), tmp_path))


def test_a_changed_image_is_another_stage(vit, images, tmp_path):
    more = by_class(tmp_path / "more", ["cat", "dog"], 2, seed=2)
    recipe = load_recipe(_recipe(vit, images, more, tmp_path)).recipe
    model = open_model(recipe.model, progress=SilentProgress())
    before = images_of(model, recipe).data
    assert set(before) == {1} and images_of(model, recipe).data == before
    by_class(more, ["cat"], 1, seed=3)
    assert images_of(model, recipe).data != before


@pytest.mark.slow
def test_images_are_hashed_once_a_run(vit, images, tmp_path, monkeypatch):
    counts: Counter[str] = Counter()
    hashed = image_files.file_sha256

    def counting(path):
        counts[path.relative_to(tmp_path).as_posix()] += 1
        return hashed(path)

    monkeypatch.setattr(image_files, "file_sha256", counting)
    more = by_class(tmp_path / "more", ["cat", "dog"], 2, seed=2)
    report = pipeline.run(_recipe(vit, images, more, tmp_path), work_dir=tmp_path / "work")
    assert report["stages"][1]["details"]["images"] == 4
    hashed_images = {name: count for name, count in counts.items() if name.endswith(".png")}
    assert len(hashed_images) == 16 and set(hashed_images.values()) == {1}
