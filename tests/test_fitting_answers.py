"""Items of a search, from the recipe's file to the copy beside what was made, and what is refused before."""

from __future__ import annotations

import json

import compress
import pytest
from compress.errors import SourceError
from compress.fitting_answers import answer_keys, check_answers
from compress.models.checkpoint import locate
from compress.preflight import check_stages
from compress.recipes.loader import load_recipe
from compress.recipes.schema import ModelRef

from .tiny_items import make_asked_moe, write_items
from .tiny_moe import moe_config

EEP = {
    "keep_experts": 4, "init_random": 3, "seed_heuristics": False, "prune_evals": 4, "total_evals": 6,
    "fitness": {"by": "tokens"}, "splits": {"train": 10, "dev": None, "test": 10},
}  # fmt: skip


def _recipe(folder, **changes):
    """Write a recipe beside nothing else, and return its path."""
    recipe = {
        "model": str(folder / "model"),
        "stages": [{"eep": {**EEP, **changes}}],
        "evaluate": {"fidelity": None, "layers": False},
        "export": {"path": str(folder / "out")},
    }
    path = folder / "recipes" / "r.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture
def configured(tmp_path):
    """A folder with the config of a model, and nothing else."""
    (tmp_path / "model").mkdir()
    config = moe_config("MixtralForCausalLM")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path


def _checkpoint(folder):
    return locate(ModelRef(id=str(folder / "model")), weights=False)


@pytest.mark.parametrize("fitness", [{"by": "tokens"}, {"by": "tokens", "data": "absent.jsonl"}])
def test_a_plan_needs_no_items_but_a_run_does(configured, fitness):
    loaded = load_recipe(_recipe(configured, fitness=fitness))
    check_stages(loaded, _checkpoint(configured), planned=True)
    with pytest.raises(SourceError, match=r"absent\.jsonl: cannot be read|comes with no items of its own"):
        check_stages(loaded, _checkpoint(configured))


def test_items_that_are_there_are_read_for_a_plan_too(configured):
    write_items(configured / "recipes" / "items.jsonl", 20)
    path = _recipe(configured, fitness={"by": "tokens", "data": "items.jsonl"})
    check_answers(load_recipe(path), _checkpoint(configured), planned=True)
    with (configured / "recipes" / "items.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(SourceError, match=r"items\.jsonl:21: no key 'prompt'"):
        check_answers(load_recipe(path), _checkpoint(configured), planned=True)


def test_two_files_of_one_name_are_refused(configured):
    """A result would keep one copy of both."""
    for name in ("a", "b"):
        write_items(configured / "recipes" / name / "items.jsonl", 20, seed=ord(name))
    files = {"train": "a/items.jsonl", "dev": None, "test": "b/items.jsonl"}
    loaded = load_recipe(_recipe(configured, splits=files))
    with pytest.raises(SourceError, match="a result keeps a copy of both, and they have one name"):
        check_stages(loaded, _checkpoint(configured), planned=True)


def test_a_key_is_of_what_the_items_say(configured):
    items = write_items(configured / "recipes" / "items.jsonl", 20)
    recipe = load_recipe(_recipe(configured, fitness={"by": "tokens", "data": "items.jsonl"})).recipe
    before = answer_keys(recipe, configured)
    items.write_text("".join(reversed(items.read_text().splitlines(keepends=True))))
    assert answer_keys(recipe, configured) == before and list(before) == [0]
    write_items(items, 20, seed=9)
    assert answer_keys(recipe, configured) != before


@pytest.mark.slow
def test_what_was_made_is_made_again_from_its_copies(tmp_path, monkeypatch):
    make_asked_moe(tmp_path / "model")
    data = write_items(tmp_path / "recipes" / "ask" / "items.jsonl", 12)
    report_on = write_items(tmp_path / "recipes" / "ask" / "others.jsonl", 12, seed=5)
    splits = {"train": 10, "dev": None, "test": "ask/others.jsonl"}
    path = _recipe(tmp_path, fitness={"by": "tokens", "data": "ask/items.jsonl"}, splits=splits)
    monkeypatch.chdir(tmp_path)
    compress.run(path, work_dir=tmp_path / "work")
    assert (tmp_path / "out" / "items.jsonl").read_bytes() == data.read_bytes()
    assert (tmp_path / "out" / "others.jsonl").read_bytes() == report_on.read_bytes()
    data.unlink()
    report_on.unlink()
    from compress.pipeline import reproduce

    found = reproduce(tmp_path / "out", work_dir=tmp_path / "work")
    assert found["reproduced"] and {"items.jsonl", "others.jsonl"} <= {row["name"] for row in found["files"]}


def test_what_a_search_chooses_by_is_not_asked_about(configured):
    (configured / "items").mkdir()
    data = write_items(configured / "items" / "items.jsonl", 40)
    splits = {"train": 12, "dev": 5, "test": 12}
    path = _recipe(configured, fitness={"by": "tokens", "data": str(data)}, splits=splits)
    recipe = json.loads(path.read_text())
    recipe["evaluate"]["answers"] = {"data": str(data)}
    path.write_text(json.dumps(recipe))
    with pytest.raises(
        SourceError, match=r"an item of evaluate\.answers is one of stages\[0\]\.eep\.splits\.train"
    ):
        check_answers(load_recipe(path), _checkpoint(configured))
    recipe["evaluate"]["answers"] = {}
    path.write_text(json.dumps(recipe))
    check_answers(load_recipe(path), _checkpoint(configured))


def test_a_later_search_does_not_report_on_what_an_earlier_one_chose_by(configured):
    data = write_items(configured / "items.jsonl", 40)
    fitness = {"by": "tokens", "data": str(data)}
    path = _recipe(configured, fitness=fitness, splits={"train": 20, "dev": None, "test": 12})
    recipe = json.loads(path.read_text())
    later = {**EEP, "keep_experts": 3, "fitness": fitness, "splits": {"train": 8, "dev": None, "test": 12}}
    recipe["stages"].append({"eep": later})
    path.write_text(json.dumps(recipe))
    check_answers(load_recipe(path), _checkpoint(configured))
    recipe["stages"][1]["eep"] = {**later, "seed": 5}
    path.write_text(json.dumps(recipe))
    with pytest.raises(SourceError, match=r"one of stages\[\d\]\.eep\.splits\.train"):
        check_answers(load_recipe(path), _checkpoint(configured))
