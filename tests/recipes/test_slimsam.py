"""The settings of SlimSAM: published defaults, and what has no effect or no meaning is refused."""

import pytest
from compress.recipes.slimsam import SlimSamSettings
from pydantic import ValidationError


def test_defaults_are_the_published_ones():
    settings = SlimSamSettings(ratio=0.5)
    published = {
        "sigma": 0.01, "gradients": "summed", "normalizer": "gaussian", "feature_weight": 0.5,
        "feature_epochs": 10, "batch_size": 4, "parts": 4, "lr": 1e-4, "patience": 4, "choice_images": 50,
        "length": (None, 20.0),
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in published} == published
    assert SlimSamSettings(ratio=0.5, steps=7).length == (7, None)
    assert SlimSamSettings(ratio=0.5, batch_size=4, accumulate=2).parts == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sigma": 0}, "without noise the gradient of every weight is 0"),
        ({"sigma": 0.0}, "without noise"),
        ({"sigma": 1e-7}, "equal to 0.000001"),
        ({"sigma": -0.01}, "equal to 0.000001"),
        ({"ratio": 0.0}, "greater than 0"),
        ({"ratio": 1.0}, "less than 1"),
        ({"steps": 5, "epochs": 2.0}, "either steps or epochs"),
        ({"batch_size": 4, "accumulate": 3}, "does not divide"),
        ({"normalizer": "mean"}, "no effect with ranking: uniform"),
        ({"features": False, "feature_weight": 0.3}, "no effect with features: false"),
        ({"slimming": "one_step", "feature_epochs": 3}, "no effect with slimming: one_step"),
        ({"slimming": "one_step", "features": False}, "features has no effect"),
    ],
)
def test_what_means_nothing_is_refused(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        SlimSamSettings(**{"ratio": 0.5, **changes})


def test_what_has_an_effect_is_taken():
    SlimSamSettings(ratio=0.5, ranking="global", normalizer="mean")
    SlimSamSettings(ratio=0.77, sigma=1e-6, slimming="one_step")
