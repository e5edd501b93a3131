"""A state on disk is gone on from by the very training that wrote it, and by no other."""

from dataclasses import replace

import pytest
from compress.compressors.base import Workspace
from compress.compressors.recovery.distill import Distill
from compress.models.shallower import keep_blocks
from compress.progress import SilentProgress
from compress.recipes.recovery import MaskedDistillSettings

from ...small_dits import Told, equal_embedders, opened, recorded

SETTINGS = {"steps": 12, "batch_size": 8, "checkpoint_every": 5, "ema": 0.9}


@pytest.fixture
def distill(make_tiny, tmp_path):
    """Return `distill(progress, generate, kept, seed, **settings)`: of a DiT that has lost two blocks."""
    folder = equal_embedders(make_tiny(num_layers=4, name="four"))
    (tmp_path / "stage").mkdir()

    def run(progress, generate=24, kept=(0, 3), seed=0, **settings):
        model = opened(folder)
        calibration = recorded(model, tmp_path / "cache", {"generate": generate, "steps": 1})
        calibration.training(model, None, SilentProgress())
        keep_blocks(model, {"transformer_blocks": kept}, {"method": "test", "groups": "1:2"})
        Distill().apply(
            model, MaskedDistillSettings.model_validate({**SETTINGS, **settings}),
            replace(calibration, seed=seed),
            Workspace(tmp_path / "stage", tmp_path, original=lambda: opened(folder)), progress,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        ({}, True),
        ({"lr": 3e-4}, False),
        ({"steps": 13}, False),
        ({"generate": 25}, False),
        ({"kept": (1, 2)}, False),
        ({"seed": 1}, False),
    ],
)
def test_another_distillation_starts_over(distill, changes, goes_on):
    with pytest.raises(KeyboardInterrupt):
        distill(Told(stop_at=8))
    distill(told := Told(), **changes)
    assert any("goes on after step 5" in note for note in told.notes) == goes_on
