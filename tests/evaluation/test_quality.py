"""The scorer's verdicts on real images and on noise."""

from pathlib import Path

import pytest
import torch
from compress.evaluation.quality import balanced_classes, judge, why_not
from compress.models.builtin.classifier import load_scorer
from compress.models.builtin.data import load_split

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "fashion-mnist"


def test_classes_take_turns():
    assert balanced_classes(5, 3).tolist() == [0, 1, 2, 0, 1]


def test_what_the_scorer_cannot_judge(open_tiny, pixel_dit):
    scorer = load_scorer()
    assert why_not(pixel_dit, scorer) is None
    assert "(4, 8, 8)" in why_not(open_tiny(name="latent"), scorer)
    pixel_dit.config["num_embeds_ada_norm"] = 1000
    assert "1000" in why_not(pixel_dit, scorer)


def test_a_class_that_was_not_asked_for_has_no_share():
    scores = judge(load_scorer(), torch.zeros(4, 1, 28, 28), torch.tensor([0, 0, 3, 3]))
    assert [share is None for share in scores.per_class] == [label not in (0, 3) for label in range(10)]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs shared/data/fashion-mnist")
def test_real_images_agree_and_noise_does_not():
    scorer = load_scorer()
    images, labels = load_split(DATA, "t10k")
    real = judge(scorer, images[:1000], labels[:1000])
    noise = torch.randn(1000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    nonsense = judge(scorer, noise, labels[:1000])
    assert real.agreement > 0.9
    assert nonsense.agreement < 0.3
    assert scorer.fid_floor < real.fid < 5
    assert nonsense.fid > 20 * real.fid
