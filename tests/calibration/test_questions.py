"""The questions of an evaluation: which items they are, and how answers are judged."""

from __future__ import annotations

import json

import pytest
from compress.calibration.answers import splits_of
from compress.calibration.questions import questions_of
from compress.errors import SourceError
from compress.recipes.schema import Recipe

SEED = 3


def _items(path, count, *, first=0, task="a"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"q{index}", "answer": "x", "task": task} for index in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _recipe(answers, data=None, **search):
    fitness = {"by": "tokens", "task": "a", **({} if data is None else {"data": str(data)})}
    eep = {"keep_experts": 4, "fitness": fitness, "splits": {"train": 12, "dev": 6, "test": 9}, **search}
    return Recipe.model_validate({
        "model": "org/name", "seed": SEED, "stages": [{"eep": eep}],
        "evaluate": {"fidelity": None, "answers": answers}, "export": {"path": "out"},
    })  # fmt: skip


def _prompts(items):
    return {item.prompt for item in items}


@pytest.mark.parametrize("own_seed", [None, 8])
def test_they_are_the_test_items_of_the_search_and_none_that_it_learned_from(tmp_path, own_seed):
    recipe = _recipe({}, _items(tmp_path / "a.jsonl", 30), seed=own_seed)
    settings = recipe.stages[0].settings
    found = questions_of(recipe, tmp_path)
    splits = splits_of(settings, tmp_path, SEED)
    assert found.items == splits.test and len(found.items) == 9
    assert not _prompts(found.items) & _prompts((*splits.train, *splits.dev))
    assert (found.settings.by, found.settings.task, found.settings.tie_break) == ("tokens", "a", 0.0)


def test_some_of_them_are_drawn(tmp_path):
    data = _items(tmp_path / "a.jsonl", 30)
    some = questions_of(_recipe({"samples": 5}, data), tmp_path)
    every = questions_of(_recipe({}, data), tmp_path)
    assert len(some.items) == 5 and _prompts(some.items) < _prompts(every.items)
    assert some.key != every.key
    with pytest.raises(SourceError, match="10 items, but there are 9 different ones"):
        questions_of(_recipe({"samples": 10}, data), tmp_path)


def test_a_file_of_their_own(tmp_path):
    other = _items(tmp_path / "other.jsonl", 4, first=100)
    found = questions_of(_recipe({"data": str(other)}, _items(tmp_path / "a.jsonl", 30)), tmp_path)
    assert _prompts(found.items) == {f"q{index}" for index in range(100, 104)}
    assert (found.settings.by, found.settings.task) == ("tokens", "a")


def test_items_of_a_search_are_judged_as_they_were_read(tmp_path):
    data = _items(tmp_path / "a.jsonl", 30)
    with pytest.raises(SourceError, match="by: choices, task: a; the items of the search are of by: tokens"):
        questions_of(_recipe({"by": "choices"}, data), tmp_path)


def test_where_no_answers_are_asked_for_there_are_none(tmp_path):
    assert questions_of(_recipe(None), tmp_path) is None


def test_answers_are_as_long_as_those_of_the_search_unless_another_length_is_asked_for(tmp_path):
    data = _items(tmp_path / "a.jsonl", 30)
    fitness = {"by": "exact_match", "data": str(data), "new_tokens": 3, "batch_size": 5}
    found = questions_of(_recipe({}, fitness=fitness), tmp_path).settings
    assert (found.new_tokens, found.batch_size) == (3, 5)
    found = questions_of(_recipe({"new_tokens": 9, "batch_size": 2}, fitness=fitness), tmp_path).settings
    assert (found.new_tokens, found.batch_size) == (9, 2)


def test_items_of_a_search_by_loss_have_no_right_answers(tmp_path):
    fitness = {"by": "loss", "data": str(_items(tmp_path / "a.jsonl", 30))}
    with pytest.raises(SourceError, match="judged by their loss, and have no right answers"):
        questions_of(_recipe({}, fitness=fitness), tmp_path)
    other = _items(tmp_path / "other.jsonl", 4, first=100)
    found = questions_of(_recipe({"data": str(other)}, fitness=fitness), tmp_path)
    assert found.settings.by == "exact_match" and found.settings.new_tokens == 32
