"""Files with questions and answers: found beside the recipe, and again beside what was made by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compress.errors import VerifyError
from compress.exporters.recorded_recipe import check_recipe, with_copies
from compress.recipes.answer_files import answer_copies, answer_files, with_answer_files
from compress.recipes.loader import load_recipe

TEXT = """
model: org/name
stages:
  - eep:
      keep_experts: 4
      fitness: {data: items/ask.jsonl}
      splits: {train: 16, dev: items/dev.jsonl, test: 10}
evaluate: {answers: {data: items/more.jsonl}}
export: {path: out}
"""
PLACES = {
    ("stages", 0, "fitness", "data"): "ask.jsonl",
    ("stages", 0, "splits", "dev"): "dev.jsonl",
    ("evaluate", "answers", "data"): "more.jsonl",
}


def _recipe(folder, text=TEXT):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(path)


def _touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_where_a_recipe_names_files(tmp_path):
    recipe = _recipe(tmp_path).recipe
    assert answer_files(recipe) == {place: Path("items") / name for place, name in PLACES.items()}
    moved = with_answer_files(recipe, {("stages", 0, "splits", "dev"): tmp_path / "x"})
    assert moved.stages[0].settings.splits.dev == tmp_path / "x"
    assert moved.stages[0].settings.splits.train == 16 and moved.stages[0].method == "eep"
    assert recipe.stages[0].settings.splits.dev == Path("items/dev.jsonl")
    assert with_answer_files(recipe, {}) == recipe
    copies = {place: tmp_path / name for place, name in PLACES.items()}
    assert answer_copies(recipe, tmp_path) == copies == answer_files(with_copies(recipe, tmp_path))


def test_files_are_found_where_they_are_then_beside_the_recipe(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    _touch(tmp_path / "r" / "items" / "ask.jsonl", tmp_path / "r" / "dev.jsonl")
    found = answer_files(_recipe(tmp_path / "r").recipe)
    assert list(found.values()) == [
        tmp_path / "r" / "items" / "ask.jsonl", tmp_path / "r" / "dev.jsonl", Path("items/more.jsonl"),
    ]  # fmt: skip
    _touch(here / "items" / "ask.jsonl")
    assert answer_files(_recipe(tmp_path / "r").recipe)["stages", 0, "fitness", "data"] == Path(
        "items/ask.jsonl"
    )


def _made(tmp_path, monkeypatch):
    """Return the folder that a run would leave, with its report."""
    monkeypatch.chdir(tmp_path)
    _touch(*(tmp_path / "items" / name for name in PLACES.values()))
    loaded = _recipe(tmp_path)
    folder = tmp_path / "out"
    _touch(*(folder / name for name in PLACES.values()))
    (folder / "recipe.yaml").write_text(loaded.text)
    document = {
        "recipe": json.loads(json.dumps(loaded.recipe.model_dump(mode="json"))),
        "model": {"revision": None},
        "environment": {"device": "cpu", "platform": "x", "threads": 1, "versions": {}},
        "export": {"path": "out", "format": "compress", "files": []},
    }
    return folder, document


def test_a_made_folder_is_read_with_its_copies(tmp_path, monkeypatch):
    folder, document = _made(tmp_path, monkeypatch)
    assert check_recipe(folder, document) == "recipe.yaml is the recipe of the report"
    other = document["recipe"]["stages"][0]["eep"]["fitness"]
    other["data"] = "elsewhere/ask.jsonl"
    assert check_recipe(folder, document) == "recipe.yaml is the recipe of the report"
    other["data"] = "items/others.jsonl"
    with pytest.raises(VerifyError, match="stages differ"):
        check_recipe(folder, document)
