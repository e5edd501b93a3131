"""What a whole search measures, and on which items."""

from __future__ import annotations

import json
from functools import partial
from statistics import fmean
from types import SimpleNamespace

import pytest
from compress.calibration.answer_scores import Scorer
from compress.calibration.answers import splits_of
from compress.calibration.text import NoText
from compress.compressors.base import Workspace
from compress.compressors.pruning.eep import Eep
from compress.compressors.pruning.experts.archive import Archive
from compress.compressors.pruning.experts.baselines import measure, random_choices
from compress.compressors.pruning.experts.candidate import Candidates
from compress.compressors.pruning.experts.field import Field
from compress.compressors.pruning.experts.genome import given_choice
from compress.compressors.pruning.experts.judging import Judge, JudgingJob
from compress.compressors.pruning.experts.selection import best
from compress.compressors.pruning.experts.skipping import skipping, thresholds
from compress.errors import StageError
from compress.models.open import open_model
from compress.recipes.experts import EepSettings
from compress.recipes.schema import ModelRef

from ....tiny_items import make_asked_moe, write_items
from .opened_moe import QUIET

RULES = ("frequency", "soft_activation", "naee")


def _settings(**changes):
    values = {
        "keep_experts": 3, "init_random": 12, "prune_evals": 24, "total_evals": 32, "random_draws": 14,
        "seed_heuristics": False, "fitness": {"by": "loss"}, "splits": {"train": 12, "dev": 12, "test": 12},
        "dev_top": 10, **changes,
    }  # fmt: skip
    return EepSettings.model_validate(values)


def _searched(folder, work, settings):
    return _left(folder, work, settings)[1]


def _left(folder, work, settings):
    """Return the model that is left, and the details."""
    work.mkdir(exist_ok=True)
    model = open_model(ModelRef(id=str(folder)), progress=QUIET)
    return model, Eep().apply(model, settings, NoText(0), Workspace(work, work / "shared"), QUIET)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search with a dev split, and everything to measure it again."""
    folder = make_asked_moe(tmp_path_factory.mktemp("moe"))
    work, settings = tmp_path_factory.mktemp("work"), _settings()
    details = _searched(folder, work, settings)
    model = open_model(ModelRef(id=str(folder)), progress=QUIET)
    field = Field.of(model.config, settings)
    splits = splits_of(settings, folder, 0)
    candidates = Candidates(model, field.groups, field.active)
    judges = {
        name: Judge(Scorer(model, getattr(splits, name), settings.fitness), candidates)
        for name in ("train", "dev", "test")
    }
    key = json.loads(_about(work / "archive"))["key"]
    return SimpleNamespace(
        folder=folder, work=work, settings=settings, details=details, model=model, field=field,
        splits=splits, judges=judges, archive=Archive(work / "archive", key, field.space),
        rows={row["name"]: row for row in details["scores"]},
    )  # fmt: skip


def _about(archive):
    from safetensors import safe_open

    with safe_open(archive / "000000.safetensors", framework="np") as file:
        return file.metadata()["evaluation"]


def test_the_best_of_the_fittest_on_the_dev_items_ships(searched):
    records = searched.archive.first(32)
    top = best(records, 10)
    again = [searched.judges["dev"](record.individual) for record in top]
    wanted = top[again.index(max(again))]
    assert wanted is not top[0], "the dev items decide otherwise than the train items"
    assert searched.details["search"]["best"] == wanted.index
    row = searched.rows["eep"]
    assert row["train"] == pytest.approx(wanted.fitness, abs=1e-3)
    assert row["score"] == pytest.approx(searched.judges["test"](wanted.individual), abs=1e-3)


def test_every_evaluation_is_of_the_train_items(searched):
    for record in searched.archive.first(32)[::5]:
        assert searched.judges["train"](record.individual) == pytest.approx(record.fitness, abs=1e-3)


def test_rules_are_measured_on_train_and_scored_on_both(searched):
    calls = searched.judges["train"].scorer.prompts()
    chosen = measure(
        searched.model, calls, searched.field.groups, 3, active=None, seed=0, progress=QUIET, items=12
    ).shared
    for name in RULES:
        individual = given_choice(searched.field.space, chosen[name], name)
        row = searched.rows[name]
        assert row["train"] == pytest.approx(searched.judges["train"](individual), abs=1e-3)
        assert row["score"] == pytest.approx(searched.judges["test"](individual), abs=1e-3)
    assert len({searched.rows[name]["train"] for name in (*RULES, "eep")}) > 1


@pytest.mark.parametrize("seeded", [True, False])
def test_the_rules_are_among_the_first_if_that_is_set(searched, tmp_path, seeded):
    settings = _settings(
        seed_heuristics=seeded, init_random=4, prune_evals=7, total_evals=7, random_draws=0,
        splits={"train": 12, "test": 12}, dev_top=20,
    )  # fmt: skip
    details = _searched(searched.folder, tmp_path / "work", settings)
    rows = {row["name"]: row for row in details["scores"]}
    first = [row for row in details["search"]["history"] if row["kind"] == "given"]
    # Rules that choose alike are evaluated once, so fitness is compared and not names alone.
    assert {round(row["fitness"], 3) for row in first} == (
        {round(rows[name]["train"], 3) for name in RULES} if seeded else set()
    )
    assert [row["index"] for row in first] == list(range(4, 4 + len(first)))
    assert not seeded or rows["eep"]["train"] >= max(rows[name]["train"] for name in RULES)


def test_random_choices_are_those_it_began_with_and_two_more_on_both(searched):
    drawn = [record.individual for record in searched.archive.first(12)]
    drawn += random_choices(searched.field.space, 2, 0)
    row = searched.rows["random"]
    assert row["draws"] == 14 and row["failed"] == 0
    for split, key in (("train", "train"), ("test", "score")):
        points = fmean(searched.judges[split](individual) for individual in drawn)
        assert row[key] == pytest.approx(points, abs=1e-2)


def test_the_original_is_scored_as_it_is(searched):
    for split, key in (("train", "train"), ("test", "score")):
        points = searched.judges[split].scorer.score().points
        assert searched.rows["original"][key] == pytest.approx(points, abs=1e-3)


def test_skipping_has_medians_of_train_and_is_scored_on_test(searched):
    medians = thresholds(searched.model, searched.judges["train"].scorer.prompts(), progress=QUIET)
    with skipping(searched.model, medians) as skipped:
        points = searched.judges["test"].scorer.score().points
    found = searched.details["skipping"]
    assert found["score"] == pytest.approx(points, abs=1e-3)
    assert found["experts_per_token"] == pytest.approx(skipped.experts_per_token, abs=1e-3)


def test_fewer_experts_per_token_are_scored_as_such(searched, tmp_path):
    settings = _settings(active_experts=1, random_draws=0, splits={"train": 12, "test": 12}, dev_top=20)
    model, details = _left(searched.folder, tmp_path / "work", settings)
    rows = {row["name"]: row for row in details["scores"]}
    for split, key in (("train", "train"), ("test", "score")):
        items = getattr(splits_of(settings, searched.folder, 0), split)
        points = Scorer(model, items, settings.fitness).score().points
        assert rows["eep"][key] == pytest.approx(points, abs=1e-3)
    groups, train = searched.field.groups, splits_of(settings, searched.folder, 0).train
    scorer = Scorer(searched.model, train, settings.fitness)
    one, two = (
        measure(
            searched.model, scorer.prompts(), groups, 3, active=active, seed=0, progress=QUIET, items=12
        ).shared
        for active in (1, None)
    )
    assert one["naee"] != two["naee"]
    judge = Judge(scorer, Candidates(searched.model, groups, 1))
    wanted = judge(given_choice(searched.field.space, one["naee"], "naee"))
    assert rows["naee"]["train"] == pytest.approx(wanted, abs=1e-3)


def test_a_free_router_ships_with_as_many_experts_per_token_as_it_was_scored_with(searched, tmp_path):
    settings = _settings(
        active_experts=1, random_draws=0, splits={"train": 12, "test": 12}, dev_top=20, groups=1,
        router="free", export="custom", total_evals=60, mut_sigma=0.5, mut_entry=1.0, norm_prob=0.0,
    )  # fmt: skip
    model, details = _left(searched.folder, tmp_path / "work", settings)
    assert details["router"] == "free" and details["active_after"] == 1
    train = splits_of(settings, searched.folder, 0).train
    points = Scorer(model, train, settings.fitness).score().points
    row = next(row for row in details["scores"] if row["name"] == "eep")
    assert row["train"] == pytest.approx(points, abs=1e-3)


def test_an_archive_of_other_items_or_weights_is_refused(tmp_path):
    settings = _settings(total_evals=13, prune_evals=13, dev_top=2, random_draws=0)
    folder, work = make_asked_moe(tmp_path / "a"), tmp_path / "work"
    _searched(folder, work, settings)
    other = make_asked_moe(tmp_path / "b", seed=1)
    with pytest.raises(StageError, match="an evaluation of another search"):
        _searched(other, work, settings)
    write_items(folder / "answers" / "train.jsonl", 40, seed=5)
    with pytest.raises(StageError, match="an evaluation of another search"):
        _searched(folder, work, settings)


def test_a_worker_refuses_a_model_with_other_weights(searched):
    opener = partial(open_model, ModelRef(id=str(searched.folder)), progress=QUIET)
    job = JudgingJob(
        opener, "0" * 64, searched.field.groups, None, searched.splits.train, searched.settings.fitness
    )
    with pytest.raises(StageError, match="its weights differ"):
        job.open()
