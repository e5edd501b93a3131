"""Exports and pushes in a recipe: one or several, shorthands, what is refused, and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from compress.errors import RecipeError
from compress.recipes.loader import load_recipe

BASE = "model: builtin:dit\nstages: [{rtn: {}}]\n"


@pytest.fixture
def load(tmp_path):
    def load(text: str, **options):
        (tmp_path / "r.yaml").write_text(BASE + text)
        return load_recipe(tmp_path / "r.yaml", **options)

    return load


def test_one_export_is_a_tuple_of_one_and_dumps_as_a_mapping(load):
    recipe = load("export: {path: out/x, push: org/name@v1}\n").recipe
    (export,) = recipe.export
    assert export.push is not None
    assert (export.push.repo, export.push.revision, export.push.private) == ("org/name", "v1", True)
    dumped = recipe.model_dump(mode="json")["export"]
    assert dumped["path"] == "out/x" and dumped["push"]["repo"] == "org/name"


def test_several_exports_dump_as_a_list_that_loads_again(load):
    recipe = load("export:\n  - {path: a}\n  - {path: b, format: torchao, push: {repo: o/n}}\n").recipe
    assert [(str(item.path), item.format) for item in recipe.export] == [("a", "compress"), ("b", "torchao")]
    dumped = recipe.model_dump(mode="json")
    assert isinstance(dumped["export"], list)
    assert load_recipe(dumped).recipe == recipe


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("export: []\n", (3, 1), "at least 1"),
        ("export: [{format: torchao}]\n", (3, 10), "export[0].path: this key is required"),
        ("export: {path: a, push: xx}\n", (3, 25), "'xx' is not a repository"),
        ("export: {path: a, push: {private: true}}\n", (3, 19), "export.push.repo: this key is required"),
        ("export: {path: a, push: {repo: a/b, tag: 'x y'}}\n", (3, 42), "name of a branch or tag"),
        ("export: {path: a, push: {repo: a/b, revision: refs/pr/1}}\n", (3, 47), "name of a branch"),
        ("export: {path: a, push: {repo: ../b}}\n", (3, 32), "is not a repository"),
        ("export:\n  - {path: a}\n  - {path: ./a}\n", (5, 6), "lie within each other"),
        ("export:\n  - {path: a/b}\n  - {path: a}\n", (5, 6), "lie within each other"),
        ("export:\n  - {path: a, push: o/n}\n  - {path: b, push: o/n}\n", (5, 15), "already the repository"),
        ("export:\n  - {path: a, push: o/n}\n  - {path: b, push: o/n@main}\n", (5, 15), "already the repo"),
        ("export:\n  - {path: a, push: O/n@x}\n  - {path: b, push: o/N@x}\n", (5, 15), "already the repo"),
        (
            "export:\n  - {path: a, push: {repo: o/n, tag: v1}}\n"
            "  - {path: b, push: {repo: o/n, revision: x, tag: v1}}\n",
            (5, 46),
            "v1 is already the tag of another export to o/n",
        ),
        (
            "export:\n  - {path: a, push: {repo: o/n, tag: v1}}\n"
            "  - {path: b, push: {repo: O/n, create_pr: true, tag: v1}}\n",
            (5, 50),
            "v1 is already the tag of another export to O/n",
        ),
    ],
)
def test_refused(load, text, place, words):
    with pytest.raises(RecipeError, match=".*") as caught:
        load(text)
    error = caught.value
    assert (error.line, error.column) == place and words in error.message


def test_two_branches_or_two_pull_requests_of_one_repository(load):
    load("export:\n  - {path: a, push: o/n}\n  - {path: b, push: o/n@torchao}\n")
    load("export:\n  - {path: a, push: o/n}\n  - {path: b, push: {repo: o/n, create_pr: true}}\n")
    load("export:\n  - {path: a, push: o/n@x}\n  - {path: b, push: o/n@X}\n")  # branches do differ by case
    load("export:\n  - {path: a, push: {repo: o/n, tag: v1}}\n  - {path: b, push: {repo: o/m, tag: v1}}\n")


def test_push_option_keeps_the_other_keys(load):
    loaded = load("export: {path: a, push: {repo: o/n, tag: v1}}\n", push="my/own@next", verify_remote=False)
    push = loaded.recipe.export[0].push
    assert push is not None
    assert (push.repo, push.revision, push.tag, push.verify_remote) == ("my/own", "next", "v1", False)
    assert "--push my/own@next" in loaded.text and "--no-verify-remote" in loaded.text
    again = load("export: {path: a}\n", push="my/own").recipe.export[0].push
    assert again is not None and again.repo == "my/own"
    short = load("export: {path: a, push: o/n}\n", overrides=["export.push.tag=v2"]).recipe.export[0].push
    assert short is not None and (short.repo, short.tag) == ("o/n", "v2")


@pytest.mark.parametrize(
    "push", ["org/a@b", "{repo: org/a@b}", "{repo: org/a, revision: b}", "{repo: org/a, revision: '-'}"]
)
def test_push_option_drops_the_branch_of_the_old_repository(load, push):
    for option, revision in (("my/own", None), ("my/own@next", "next")):
        (export,) = load(f"export: {{path: a, push: {push}}}\n", push=option).recipe.export
        assert export.push is not None
        assert (export.push.repo, export.push.revision) == ("my/own", revision)


def test_push_option_without_a_branch_behind_the_at_sign(load):
    with pytest.raises(RecipeError, match="is not the name of a branch"):
        load("export: {path: a}\n", push="my/own@")


def test_options_for_one_export_are_refused_for_several(load):
    several = "export:\n  - {path: a}\n  - {path: b}\n"
    with pytest.raises(RecipeError, match="list of 2 exports") as caught:
        load(several, push="o/n")
    assert "--set export.0.push=org/name" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="list of 2 exports"):
        load(several, output="x")
    exports = load(several, overrides=["export.1.push=o/n"], verify_remote=False).recipe.export
    assert exports[0].push is None and exports[1].push is not None and not exports[1].push.verify_remote


def test_no_verify_remote_without_a_push(load):
    with pytest.raises(RecipeError, match="pushes nothing"):
        load("export: {path: a}\n", verify_remote=False)


def test_a_python_value_may_hold_paths(tmp_path):
    export = {"path": tmp_path / "x", "push": {"repo": "o/n"}}
    recipe = load_recipe({"model": "builtin:dit", "stages": [{"rtn": {}}], "export": export}).recipe
    assert recipe.export[0].path == Path(tmp_path / "x")
