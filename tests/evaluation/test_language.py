"""Figures of a language model: worked by hand, against the stock loss, and on a run's own recording."""

from __future__ import annotations

import math

import pytest
import torch
from compress.calibration.tokens import sequences_of
from compress.errors import SourceError
from compress.evaluation.agreement import compare_metrics
from compress.evaluation.by_task import evaluator_for
from compress.evaluation.evaluator import Evaluator
from compress.evaluation.language import LanguageEvaluator, Likelihoods
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.gates import LANGUAGE_ONLY
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, ModelRef

CALIBRATION = CalibrationSettings(samples=3, length=48)
EVALUATE = EvaluateSettings.model_validate({"fidelity": {"samples": 5, "batch_size": 2}})


def _open():
    return open_model(ModelRef(id="builtin:stories"), progress=SilentProgress())


@pytest.fixture(scope="module")
def stories():
    return _open()


@pytest.fixture(scope="module")
def recorded(stories, tmp_path_factory):
    """The evaluator, the folder that keeps its recordings, and the recording."""
    evaluator = evaluator_for(stories, EVALUATE, 0, CALIBRATION)
    cache = tmp_path_factory.mktemp("references")
    return evaluator, cache, evaluator.reference(stories, cache, SilentProgress())


def test_likelihoods_by_hand():
    """Two tokens of a vocabulary of two, of which the first is a mark: one of them is scored."""
    found = Likelihoods()
    even, sure = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 0.0]])
    found.add(torch.tensor([1, 1, 0]), even, sure, prefix=2)
    assert found.tokens == 1
    metrics = found.metrics()
    assert metrics["perplexity_original"] == pytest.approx(2.0)
    assert metrics["perplexity"] == pytest.approx(4 / 3, abs=1e-5)
    assert metrics["perplexity_increase"] == pytest.approx(-1 / 3, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6)
    found.add(torch.tensor([1, 1, 0]), even, sure, prefix=0)
    assert found.tokens == 3, "without marks all but the first are scored"


def test_a_model_that_is_certain_and_wrong_has_an_infinite_perplexity():
    found = Likelihoods()
    found.add(torch.tensor([0, 0]), torch.zeros(2, 2), torch.tensor([[-1e6, 1e6], [0, 0]]), prefix=1)
    assert found.metrics()["perplexity"] == math.inf


def test_the_original_is_equal_to_itself(stories, recorded):
    evaluator, _, reference = recorded
    result = evaluator.compare(stories, reference, SilentProgress())
    assert result.metrics["sqnr_db"] == 200.0 and result.metrics["kl"] == 0.0
    assert result.metrics["perplexity_increase"] == 0.0
    perplexities = {name for name in LANGUAGE_ONLY if name.startswith("perplexity")}
    assert not result.images and perplexities < set(result.metrics)
    ids = sequences_of(stories, CALIBRATION, 0).last(5, apart_from=3)
    with torch.no_grad():
        stock = stories.module(input_ids=ids, labels=ids).loss
    assert result.metrics["perplexity"] == pytest.approx(math.exp(stock), rel=1e-4)
    assert result.details["text"] == {"samples": 5, "length": 48, "tokens": 5 * 47, "seed": 0}


def test_a_worse_model_is_told_apart_and_where(recorded):
    evaluator, _, reference = recorded
    model = _open()
    with torch.no_grad():
        weight = model.module.model.layers[2].mlp.down_proj.weight
        weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    result = evaluator.compare(model, reference, SilentProgress())
    assert 5 < result.metrics["sqnr_db"] < 60
    assert result.metrics["kl"] > 0 and result.metrics["perplexity"] > result.metrics["perplexity_original"]
    rows = {row["name"]: row for row in result.details["layers"]}
    assert rows["model.layers.2.mlp.down_proj"]["sqnr_db"] < 25
    assert rows["model.layers.2"]["sqnr_db"] < 40 and rows["model.layers.2"]["role"] == "block"
    # Every block is fed the original's input, so the others are as they were.
    assert all(row["sqnr_db"] == 200.0 for name, row in rows.items() if ".layers.2" not in name)
    absorbing = [name for name in rows if name.endswith((".up_proj", ".v_proj"))]
    assert not absorbing and "model.layers.0.mlp.gate_proj" in rows


def test_folding_scales_changes_no_layers_figure(recorded):
    evaluator, _, reference = recorded
    model = _open()
    for group in model.family.folds(model.module):
        columns = model.module.get_submodule(group.targets[0]).weight.shape[1]
        factor = torch.full((columns,), 2.0)
        group.absorb(model.module, factor)
        for name in group.targets:
            model.module.get_submodule(name).weight.data /= factor
    result = evaluator.compare(model, reference, SilentProgress())
    assert min(row["sqnr_db"] for row in result.details["layers"]) == 200.0  # powers of two: exact


def test_a_recording_is_found_again_and_made_again(stories, recorded):
    evaluator, cache, reference = recorded
    before = reference.folder.stat().st_mtime_ns
    again = LanguageEvaluator(EVALUATE, 0, CALIBRATION).reference(stories, cache, SilentProgress())
    assert again.folder == reference.folder and again.folder.stat().st_mtime_ns == before
    other = LanguageEvaluator(EVALUATE, 1, CALIBRATION).reference(stories, cache, SilentProgress())
    assert other.folder != reference.folder
    longer = CALIBRATION.model_copy(update={"samples": 4})
    more = LanguageEvaluator(EVALUATE, 0, longer).reference(stories, cache, SilentProgress())
    assert more.folder not in (reference.folder, other.folder)


def test_nothing_is_measured_where_fidelity_is_off(stories):
    settings = EvaluateSettings.model_validate({"fidelity": None})
    evaluator = LanguageEvaluator(settings, 0, CALIBRATION)
    result = evaluator.compare(
        stories, evaluator.reference(stories, None, SilentProgress()), SilentProgress()
    )
    assert result.metrics == {} and len(result.details["linears"]) == 36


def test_a_text_too_short_for_both_is_refused(stories):
    settings = EvaluateSettings.model_validate({"fidelity": {"samples": 10000}})
    with pytest.raises(SourceError, match="10000 sequences besides the 3 of calibration"):
        LanguageEvaluator(settings, 0, CALIBRATION).reference(stories, None, SilentProgress())


def test_denoisers_keep_their_own_evaluation(tiny_dit):
    model = open_model(ModelRef(id=str(tiny_dit)), progress=SilentProgress())
    assert isinstance(evaluator_for(model, EVALUATE, 0, CalibrationSettings()), Evaluator)


@pytest.mark.parametrize(
    ("name", "recorded_value", "measured", "agrees"),
    [
        ("perplexity", 4.8, 4.84, True),
        ("perplexity", 4.8, 4.9, False),
        ("perplexity_increase", 0.1, 0.115, True),
        ("perplexity_increase", 0.1, 0.13, False),
        ("kl", 0.1, 0.102, True),
        ("kl", 0.1, 0.11, False),
    ],
)
def test_how_far_figures_may_move_on_another_machine(name, recorded_value, measured, agrees):
    rows = compare_metrics({name: recorded_value}, {name: measured}, quality_samples=None)
    assert rows.holds == agrees
