"""Depth pruning that cannot be, as a user meets it: exit code, place, hint, and nothing exported."""

from pathlib import Path

import compress
import pytest
import torch
from compress.compressors.pruning.block_groups import groups_of
from compress.errors import CompressError, PlanError
from safetensors.torch import load_file

from ..small_dits import equal_embedders

DATA = {"generate": 8, "steps": 2}
SEARCH = {"groups": "1:2", "steps": 6, "batch_size": 4, "checkpoint_every": 2}


@pytest.fixture
def refused(tmp_path):
    """Return `refused(model, stages, data=DATA) -> the error of a run`, which has written no result."""

    def run(model: Path, stages: list, data: dict | None = DATA, **calibration: object) -> CompressError:
        given = {"samples": 2, "steps": 2, "guidance_scale": 1.0, **calibration}
        recipe = {
            "model": str(model),
            "calibration": given if data is None else {**given, "data": data},
            "stages": stages,
            "evaluate": {"fidelity": None},
            "export": {"path": str(tmp_path / "out")},
        }
        with pytest.raises(CompressError) as caught:
            compress.run(recipe, work_dir=tmp_path / "work")
        assert not (tmp_path / "out").exists()
        return caught.value

    return run


@pytest.fixture
def four(make_tiny):
    """A DiT of four blocks, each with an embedder of its own."""
    return make_tiny(num_layers=4, name="four")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("2:3", "2:3 repeated does not fill them"),
        (["2:4", "2:4"], "has 4 blocks, and the groups have 8 together"),
        ("3:2", "3:2 keeps more blocks than it has"),
        ("4:4", "every block stays"),
    ],
)
def test_groups_that_do_not_fit_the_depth(groups, message, refused, four):
    error = refused(four, [{"tinyfusion": {**SEARCH, "groups": groups}}, {"distill": {"steps": 2}}])
    assert error.exit_code == PlanError.exit_code and message in error.message
    assert not (four.parent / "work").exists() or not list((four.parent / "work").rglob("*.safetensors"))


def test_a_model_with_skips_and_an_odd_depth():
    config = {"_class_name": "HunyuanDiT2DModel", "num_layers": 7}
    with pytest.raises(PlanError, match="no block can go from an odd depth of 7: its skips are not pairs"):
        groups_of(config, "1:2")
    assert [group.members for group in groups_of({**config, "num_layers": 10}, "1:2")] == [
        (0, 1, 8, 9),
        (2, 3, 6, 7),
    ]


def test_block_0_of_a_model_whose_embedders_differ(refused, four):
    error = refused(four, [{"depth": {"by": "indices", "keep": [1, 3]}}], data=None)
    assert error.exit_code == 5 and "transformer_blocks.0.norm1.emb" in error.message
    assert "keep block 0" in error.hint


def test_no_data_and_a_model_that_cannot_sample(refused, four, make_tiny):
    nothing = refused(four, [{"tinyfusion": SEARCH}], data=None)
    assert nothing.exit_code == 2 and "names no data to train on" in nothing.message
    assert "generate" in nothing.hint
    text = make_tiny("PixArtTransformer2DModel", num_layers=4, name="text")
    mute = refused(text, [{"tinyfusion": SEARCH}])
    assert mute.exit_code == 4 and "needs prompts to sample from" in mute.message
    assert "calibration.prompts" in mute.hint


def test_a_loss_that_is_not_finite_ends_the_search_with_its_step(refused, four):
    wild = {**SEARCH, "mode": "full", "lr": 10.0, "clip_norm": None, "steps": 200, "checkpoint_every": 1}
    error = refused(equal_embedders(four), [{"tinyfusion": wild}])
    assert error.exit_code == 5 and "of 200 is not finite" in error.message
    assert "lower lr (10)" in error.hint
    steps = int(error.message.split(" step ")[1].split()[0])
    assert 1 <= steps < 200
    kept = list((four.parent / "work").rglob("training.safetensors"))
    assert len(kept) == (steps > 1), "a state of the steps before stays on disk"
    for file in kept:
        assert all(bool(torch.isfinite(item).all()) for item in load_file(file).values())
