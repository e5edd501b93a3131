"""In which form a compressed cache leaves: what is taken where nothing is said, and what is refused."""

from __future__ import annotations

import pytest
from compress.errors import RecipeError
from compress.recipes.kv_export import kv_form
from compress.recipes.loader import load_recipe

CSKV = "{cskv: {}}"


@pytest.fixture
def load(tmp_path):
    def load(stages: str, export: str):
        text = f"model: builtin:stories\nstages: [{stages}]\nexport: {export}\n"
        (tmp_path / "r.yaml").write_text(text)
        return load_recipe(tmp_path / "r.yaml").recipe

    return load


@pytest.mark.parametrize(
    ("stages", "export", "form"),
    [
        (CSKV, "{path: a}", "adapter"),
        (CSKV, "{path: a, kv_cache: null}", "adapter"),
        (CSKV, "{path: a, kv_cache: checkpoint}", "checkpoint"),
        (CSKV, "{path: a, kv_cache: custom}", "custom"),
        (CSKV, "{path: a, format: dequantized}", "checkpoint"),
        (CSKV, "{path: a, format: dequantized, kv_cache: checkpoint}", "checkpoint"),
        (f"{{rtn: {{}}}}, {CSKV}", "{path: a}", "checkpoint"),
        ("{rtn: {}}", "{path: a}", None),
    ],
)
def test_the_form_follows_from_stages_and_export(load, stages, export, form):
    recipe = load(stages, export)
    assert kv_form([stage.method for stage in recipe.stages], recipe.export[0]) == form


@pytest.mark.parametrize(
    ("stages", "export", "place", "words", "hint"),
    [
        (
            "{rtn: {}}",
            "{path: a, kv_cache: adapter}",
            (3, 19),
            "no stage compresses a cache",
            "add the stage",
        ),
        (
            "{rtn: {}}",
            "{path: a, kv_cache: checkpoint}",
            (3, 19),
            "no stage compresses",
            "add the stage cskv",
        ),
        (f"{{rtn: {{}}}}, {CSKV}", "{path: a, kv_cache: adapter}", (3, 19), "rtn changes them", "checkpoint"),
        (
            f"{{isomorphic: {{ratios: {{width: 0.2}}}}}}, {{rtn: {{}}}}, {CSKV}",
            "[{path: b}, {path: a, kv_cache: adapter}]",
            (3, 31),
            "isomorphic, rtn change them",
            "use checkpoint",
        ),
        (CSKV, "{path: a, format: dequantized, kv_cache: custom}", (3, 40), "not in dequantized", "leave"),
        (CSKV, "{path: a, format: dequantized, kv_cache: adapter}", (3, 40), "not in dequantized", "leave"),
        (CSKV, "{path: a, kv_cache: peft}", (3, 29), "adapter", ""),
    ],
)
def test_what_cannot_be_written_is_refused_at_its_place(load, stages, export, place, words, hint):
    with pytest.raises(RecipeError) as told:
        load(stages, export)
    text = str(told.value)
    assert words in text and f":{place[0]}:{place[1]}:" in text, text
    assert hint in f"{told.value.hint}{text}"
