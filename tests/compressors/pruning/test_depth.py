"""The stage that removes whole blocks by a rule, on small denoisers with blocks that do nothing."""

import pytest
import torch
from compress.calibration.objectives import objective_for
from compress.calibration.recording import record
from compress.compressors import registry
from compress.compressors.base import Workspace
from compress.compressors.pruning.block_scores import change_scores, choice_losses, sensitivities
from compress.compressors.pruning.measuring import mean_loss
from compress.errors import PlanError
from compress.models.open import open_model
from compress.models.origins import NAME, kept_blocks
from compress.models.shallower import keep_blocks
from compress.progress import SilentProgress
from compress.recipes.depth import DepthSettings
from compress.recipes.schema import CalibrationSettings, ModelRef
from safetensors.torch import load_file, save_file

from ...small_dits import DIT, LIST, WEIGHTS, Told, make_embedders_equal

QUIET = SilentProgress()
IDLE = (1, 2, 4)


def _quieten(folder, share=0.02):
    """Give all blocks one embedder, and let some of them add next to nothing."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    make_embedders_equal(tensors)
    for block in IDLE:
        for part in ("weight", "bias"):
            rows = tensors[f"{LIST}.{block}.norm1.linear.{part}"]
            gates = rows.chunk(6)
            gates[2].mul_(share)
            gates[5].mul_(share)
    save_file(tensors, path)
    return folder


@pytest.fixture(scope="module")
def place(tiny_cache, tmp_path_factory):
    import shutil

    source = tiny_cache(DIT, 0, "float32", (("num_layers", 6),))
    folder = tmp_path_factory.mktemp("quiet") / "model"
    shutil.copytree(source, folder)
    return _quieten(folder)


@pytest.fixture(scope="module")
def calibration(place, tmp_path_factory):
    model = open_model(ModelRef(id=str(place)), progress=QUIET)
    settings = CalibrationSettings(samples=4, steps=3, batch_size=2)
    return record(model, settings, seed=1, cache=tmp_path_factory.mktemp("cache"), progress=QUIET)


@pytest.fixture
def opened(place):
    return open_model(ModelRef(id=str(place)), progress=QUIET)


def _apply(model, calibration, tmp_path, progress=QUIET, **keys):
    (tmp_path / "stage").mkdir(exist_ok=True)
    (tmp_path / "shared").mkdir(exist_ok=True)
    settings = DepthSettings.model_validate(keys)
    plan = registry.get("depth").plan(model.spec, settings)
    details = registry.get("depth").apply(
        model, settings, calibration, Workspace(tmp_path / "stage", tmp_path / "shared"), progress
    )
    assert plan.after == model.size() and plan.before == model.spec.size()
    return details


@pytest.mark.parametrize("by", ["shortgpt", "flux_lite"])
def test_blocks_that_do_nothing_go_first(by, opened, calibration, tmp_path):
    details = _apply(opened, calibration, tmp_path, by=by, keep=3)
    assert details["blocks"] == {LIST: {"of": 6, "kept": [0, 3, 5]}}
    assert kept_blocks(opened.attachments[NAME]) == {LIST: (0, 3, 5)}
    scores = details["scores"][LIST]
    assert max(scores[place] for place in IDLE) < min(scores[place] for place in (0, 3, 5))


def test_blocks_that_the_loss_needs_least_go_first(opened, calibration, tmp_path):
    """A block of random weights may even hurt; one that does nothing changes the loss least."""
    details = _apply(opened, calibration, tmp_path, by="sensitivity", keep=2)
    scores = details["scores"][LIST]
    assert max(abs(scores[place]) for place in IDLE) < min(abs(scores[place]) for place in (0, 3, 5))
    order = sorted(range(6), key=lambda place: scores[place])
    assert details["blocks"][LIST]["kept"] == sorted(order[4:])


def test_shortgpt_never_removes_the_last_block(opened, calibration, tmp_path):
    last = opened.module.transformer_blocks[5].norm1.linear
    with torch.no_grad():  # the last block alone adds nothing at all
        for part in (2, 5):
            last.weight.chunk(6)[part].zero_()
            last.bias.chunk(6)[part].zero_()
    details = _apply(opened, calibration, tmp_path, by="shortgpt", keep=3)
    scores = details["scores"][LIST]
    assert scores[5] < min(scores[:5])
    assert details["blocks"][LIST]["kept"] == [0, 3, 5]


def test_random_choices_by_their_loss(place, calibration, tmp_path):
    found = {}
    for pick in ("least", "middle", "largest"):
        model = open_model(ModelRef(id=str(place)), progress=QUIET)
        details = _apply(model, calibration, tmp_path, by="random", keep=3, draws=7, pick=pick)
        told = details["random"]
        measured = mean_loss(model, objective_for(model, calibration, None), QUIET)
        assert measured == pytest.approx(told["loss"], rel=1e-5)
        found[pick] = told["loss"]
        assert (
            told["drawn"] == 7 and told["possible"] == 20 and told["least"] <= told["loss"] <= told["largest"]
        )
    assert found["least"] == told["least"] and found["largest"] == told["largest"]
    assert found["least"] < found["middle"] < found["largest"]


def test_of_few_choices_all_are_measured_once(opened, calibration, tmp_path):
    told = Told()
    found = _apply(opened, calibration, tmp_path, told, by="random", keep=5, draws=100)["random"]
    assert found["drawn"] == found["possible"] == 6
    assert any("there are 6 choices, and all of them are measured" in note for note in told.notes)


def test_scores_are_those_of_the_formulas(opened, calibration):
    objective = objective_for(opened, calibration, None)
    before = {name: value.clone() for name, value in opened.module.state_dict().items()}
    seen = {place: [] for place in range(6)}
    handles = [
        block.register_forward_hook(
            lambda _, args, output, place=place: seen[place].append((args[0], output))
        )
        for place, block in enumerate(opened.module.transformer_blocks)
    ]
    with torch.no_grad():
        losses = [float(loss) for loss, _ in objective.losses(opened)]
    for handle in handles:
        handle.remove()
    pairs = [[torch.cat(part) for part in zip(*seen[place], strict=True)] for place in range(6)]
    cosine = [1 - float(torch.cosine_similarity(x, y, dim=-1).mean()) for x, y in pairs]
    square = [float((y - x).square().mean()) for x, y in pairs]
    assert change_scores(opened, objective, "shortgpt", QUIET)[LIST] == pytest.approx(
        cosine, rel=1e-4, abs=1e-7
    )
    assert change_scores(opened, objective, "flux_lite", QUIET)[LIST] == pytest.approx(square, rel=1e-4)
    rises = sensitivities(opened, objective, QUIET)[LIST]
    kept = {LIST: (0, 1, 2, 4, 5)}
    (alone,) = choice_losses(opened, objective, [kept], QUIET)
    assert rises[3] == pytest.approx(alone - sum(losses) / objective.samples, abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in opened.module.state_dict().items())
    keep_blocks(opened, kept, {"method": "test"})
    assert mean_loss(opened, objective, QUIET) == pytest.approx(alone, rel=1e-6)


def test_embedders_that_differ_keep_block_0(place, calibration, tmp_path):
    model = open_model(ModelRef(id=str(place)), progress=QUIET)
    with torch.no_grad():
        model.module.transformer_blocks[4].norm1.emb.timestep_embedder.linear_1.bias[3] += 1
        for part in (model.module.transformer_blocks[0].norm1.linear.weight.chunk(6)[i] for i in (2, 5)):
            part.zero_()
    details = _apply(model, calibration, tmp_path, by="flux_lite", keep=2)
    assert details["blocks"][LIST]["kept"][0] == 0


def test_refusals_come_before_anything_is_computed(opened, tmp_path):
    settings = DepthSettings.model_validate({"by": "sensitivity", "keep": 6})
    with pytest.raises(PlanError, match="every block stays"):
        registry.get("depth").apply(opened, settings, None, Workspace(tmp_path, tmp_path), QUIET)
    with pytest.raises(PlanError, match="every block stays"):
        registry.get("depth").plan(opened.spec, settings)
