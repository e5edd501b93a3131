"""What README.md shows is what the repository has."""

from __future__ import annotations

import ast
import re

import pytest
from compress import errors
from compress.recipes.loader import load_recipe
from compress.recipes.shipped import shipped


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_recipe_explained_is_the_shipped_one(readme, repository, tmp_path):
    block = _blocks(readme, "yaml")[0]
    copy = tmp_path / "readme.yaml"
    copy.write_text(block, encoding="utf-8")
    shown = load_recipe(copy).recipe
    assert shown.model_dump() == load_recipe(repository / "recipes" / "dit_w4a8.yaml").recipe.model_dump()


def test_parts_of_recipes_are_valid(readme, tmp_path):
    parts = _blocks(readme, "yaml")[1:]
    assert parts
    for part in parts:
        copy = tmp_path / "readme.yaml"
        copy.write_text(f"model: builtin:dit\nexport: {{path: out}}\n{part}", encoding="utf-8")
        assert load_recipe(copy).recipe.stages


def test_the_page_on_pruning_shows_valid_recipes(repository, tmp_path):
    blocks = _blocks((repository / "docs" / "pruning.md").read_text(encoding="utf-8"), "yaml")
    methods = []
    for block in blocks:
        copy = tmp_path / "page.yaml"
        copy.write_text(block, encoding="utf-8")
        methods.append([stage.method for stage in load_recipe(copy).recipe.stages])
    assert ["isomorphic", "finetune"] in methods and ["isomorphic", "distill"] in methods


def test_the_page_on_experts_shows_valid_recipes(repository, tmp_path):
    blocks = _blocks((repository / "docs" / "experts.md").read_text(encoding="utf-8"), "yaml")
    assert len(blocks) == 2
    for block in blocks:
        copy = tmp_path / "page.yaml"
        copy.write_text(block, encoding="utf-8")
        assert [stage.method for stage in load_recipe(copy).recipe.stages] == ["eep"]


def test_the_page_on_slimming_shows_a_valid_recipe(repository, tmp_path):
    text = (repository / "docs" / "sam.md").read_text(encoding="utf-8")
    (block,) = _blocks(text, "yaml")
    copy = tmp_path / "page.yaml"
    copy.write_text(block, encoding="utf-8")
    (stage,) = load_recipe(copy).recipe.stages
    assert stage.method == "slimsam"
    named = set(re.findall(r"`(\w+)(?:: \w+)?`", text)) & {
        "epochs", "ranking", "rel_pos", "attn_scale", "slimming", "features", "gradients", "choice_images",
        "sigma", "recompute", "accumulate", "precision",
    }  # fmt: skip
    assert len(named) >= 10 and named <= set(type(stage.settings).model_fields)


def test_recipe_names_exist(readme):
    names = {recipe.name for recipe in shipped()}
    mentioned = set(re.findall(r"\b(?:dit|pixart|sd3)_\w*w\d+a\d+\w*", readme))
    assert mentioned and mentioned <= names


def test_overrides_in_commands_are_valid(readme):
    commands = re.findall(r"compress run (\w+) --set (\S+)", readme)
    assert commands
    for recipe, override in commands:
        load_recipe(recipe, overrides=[override])


def test_python_examples_parse(readme):
    blocks = _blocks(readme, "python")
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_exit_codes_are_all_told(readme):
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", readme, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert told == {kind.exit_code for kind in kinds} | {0, 130}


def test_links_lead_somewhere(readme, repository):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert targets
    assert not [target for target in targets if not (repository / target).exists()]


def test_make_targets_exist(readme, repository):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)\b", readme.replace("make and", ""))) <= targets
