"""The shipped classifier is what its folder says it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compress.errors import SourceError
from compress.models.builtin.classifier import FOLDER, STATISTICS_FILE, Classifier, load_scorer
from compress.models.builtin.data import load_split
from compress.models.builtin.frechet import frechet_distance, moments
from compress.models.builtin.train_classifier import augment

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "fashion-mnist"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs shared/data/fashion-mnist")


def test_the_folder_is_small_and_its_readme_quotes_its_config():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 250_000
    figures = json.loads((FOLDER / "config.json").read_text())["figures"]
    readme = (FOLDER / "README.md").read_text()
    assert f"{figures['test_accuracy']:.2%}" in readme
    assert f"{figures['fid_train_test']:.3f}" in readme
    assert f"{sum(p.numel() for p in Classifier().parameters()):,} parameters" in readme
    assert figures["test_accuracy"] >= 0.91


@needs_data
def test_accuracy_and_floor_are_those_that_were_written_down():
    scorer = load_scorer()
    images, labels = load_split(DATA, "t10k")
    predicted, features = scorer.score(images)
    assert float((predicted == labels).double().mean()) == pytest.approx(scorer.test_accuracy, abs=5e-4)
    floor = frechet_distance(scorer.mean, scorer.covariance, *moments(features))
    assert floor == pytest.approx(scorer.fid_floor, abs=2e-3)


def test_scores_do_not_depend_on_the_batch():
    scorer = load_scorer()
    images = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels, features = scorer.score(images)
    one_by_one = scorer.score(images, batch_size=1)
    assert torch.equal(labels, one_by_one[0])
    assert torch.allclose(features, one_by_one[1], atol=1e-5)


def test_samples_are_judged_as_they_would_be_saved():
    scorer = load_scorer()
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[:, :, :3] = -1
    beyond = images.clone()
    beyond[:, :, :3] = -1.7
    assert torch.equal(scorer.score(images)[1], scorer.score(beyond)[1])


def test_a_damaged_installation_is_named(tmp_path):
    folder = tmp_path / "classifier"
    shutil.copytree(FOLDER, folder)
    (folder / STATISTICS_FILE).unlink()
    with pytest.raises(SourceError, match="classifier"):
        load_scorer(folder)


def test_a_shift_brings_in_background():
    images = torch.ones(3, 1, 28, 28)
    shifted = augment(images, torch.Generator().manual_seed(1))
    assert shifted.shape == images.shape
    assert set(shifted.unique().tolist()) <= {-1.0, 1.0}
