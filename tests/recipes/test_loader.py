"""Recipes that load, and a corpus of broken ones: the place, the sentence and the hint of each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from compress.errors import RecipeError
from compress.recipes.loader import load_recipe
from compress.recipes.schema import Recipe
from hypothesis import given, settings
from hypothesis import strategies as st

GOOD = """\
model: builtin:dit
stages:
  - vidit_q:
      weight_bits: 4
      keep: [a.b, "c.*"]
export: {path: out/x}
"""


def load(folder: Path, text: str, **options):
    file = folder / "x.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, **options)


def refusal(folder: Path, text: str, **options) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, **options)
    return caught.value


def test_a_good_recipe(tmp_path):
    loaded = load(tmp_path, GOOD)
    assert loaded.text == GOOD
    assert loaded.file == tmp_path / "x.yaml"
    recipe = loaded.recipe
    assert (recipe.model.id, recipe.seed, recipe.device) == ("builtin:dit", 0, "auto")
    assert recipe.stages[0].method == "vidit_q"
    assert recipe.stages[0].settings.weight_bits == 4
    assert recipe.stages[0].settings.keep == ("a.b", "c.*")
    assert recipe.export[0].path == Path("out/x")
    assert recipe.evaluate.fidelity is not None and recipe.evaluate.quality is None


def test_places_of_locations(tmp_path):
    loaded = load(tmp_path, GOOD)
    error = loaded.error(("stages", 0, "vidit_q", "keep", 1), "matches nothing", hint="look again")
    assert (error.line, error.column, error.hint) == (5, 19, "look again")
    assert str(error).endswith("x.yaml:5:19: stages[0].vidit_q.keep[1]: matches nothing")
    assert loaded.error(("stages", 0, "vidit_q"), "m").line == 3
    assert loaded.error(("stages", 0, "vidit_q", "rounding"), "default").line == 3  # not written: its parent


def test_a_stage_without_settings_has_defaults(tmp_path):
    recipe = load(tmp_path, "model: m\nstages: [rtn: , smoothquant: {}]\nexport: {path: o}\n").recipe
    assert [stage.method for stage in recipe.stages] == ["rtn", "smoothquant"]
    assert recipe.stages[0].settings.weight_bits == 8


HEAD = "model: builtin:dit\nexport: {path: o}\n"
STAGES = "stages: [{rtn: {}}]\n"

# text, line, column, what the message says, what the hint says (None: nothing is asked of it)
BROKEN = {
    "bits not offered": (
        HEAD + "stages:\n  - vidit_q:\n      weight_bits: 5\n",
        (5, 20),
        "stages[0].vidit_q.weight_bits: 5 is not one of 2, 3, 4, 6, 8",
        None,
    ),
    "unknown key at the root": (HEAD + STAGES + "sed: 1\n", (4, 1), "sed: unknown key 'sed'", "'seed'"),
    "unknown key of a method": (
        HEAD + "stages:\n  - rtn: {weight_bts: 8}\n",
        (4, 11),
        "stages[0].rtn.weight_bts: unknown key 'weight_bts'",
        "did you mean 'weight_bits'?",
    ),
    "unknown key in evaluate.fidelity": (
        HEAD + STAGES + "evaluate:\n  fidelity:\n    sample: 3\n",
        (6, 5),
        "evaluate.fidelity.sample: unknown key",
        "'samples'",
    ),
    "unknown key in export": (
        "model: m\nexport: {path: o, formt: compress}\n" + STAGES,
        (2, 19),
        "export.formt",
        "'format'",
    ),
    "unknown key in push": (
        "model: m\nexport: {path: o, push: {repo: a/b, privat: true}}\n" + STAGES,
        (2, 37),
        "export.push.privat: unknown key 'privat'",
        "'private'",
    ),
    "unknown key in a list of exports": (
        "model: m\nexport:\n  - {path: o}\n  - {path: p, formt: compress}\n" + STAGES,
        (4, 15),
        "export[1].formt: unknown key",
        "'format'",
    ),
    "misspelt method": (
        HEAD + "stages:\n  - vidt_q: {}\n",
        (4, 5),
        "stages[0].vidt_q: unknown method 'vidt_q'",
        "did you mean 'vidit_q'?",
    ),
    "unknown metric": (
        HEAD + STAGES + "require: {sqnr: '>= 3'}\n",
        (4, 11),
        "require.sqnr: unknown metric 'sqnr'",
        "'sqnr_db'",
    ),
    "a gate that is never measured": (
        HEAD + STAGES + "require: {fid: '<= 3'}\n",
        (4, 11),
        "require.fid: fid is not measured, because evaluate.quality is off",
        "quality: {}",
    ),
    "a gate without comparison": (
        HEAD + STAGES + "require: {size_ratio: 0.35}\n",
        (4, 23),
        "require.size_ratio: 0.35 is not a comparison; write one such as '<= 0.35'",
        None,
    ),
    "a gate without quotes": (
        HEAD + STAGES + "require: {sqnr_db: >= 12}\n",
        (4, 20),
        "not valid YAML",
        "in quotes",
    ),
    "wrong type": (
        HEAD + STAGES + "seed: many\n",
        (4, 7),
        "seed: 'many' is not a whole number",
        None,
    ),
    "a truth value is no number": (
        HEAD + STAGES + "seed: true\n",
        (4, 7),
        "true is not a whole number",
        None,
    ),
    "a quoted number is text": (HEAD + STAGES + "seed: '1'\n", (4, 7), "'1' is not a whole number", None),
    "out of range": (HEAD + STAGES + "seed: -1\n", (4, 7), "seed: -1 is not at least 0", None),
    "a list where a mapping belongs": (
        HEAD + STAGES + "calibration: [1]\n",
        (4, 1),
        "calibration: [1] is not a mapping",
        None,
    ),
    "an empty section": (
        HEAD + STAGES + "calibration:\n",
        (4, 1),
        "calibration: null is not a mapping",
        "remove the key",
    ),
    "either a number or a word": (
        HEAD + "stages: [{vidit_q: {act_exponent: often}}]\n",
        (3, 35),
        "stages[0].vidit_q.act_exponent: 'often' is not a number or 'sweep'",
        None,
    ),
    "a rule of the settings": (
        HEAD + "stages: [{vidit_q: {act_exponent: 1.5}}]\n",
        (3, 11),
        "act_exponent 1.5 is not between 0 and 1",
        None,
    ),
    "an element of a list": (
        HEAD + "stages:\n  - rtn:\n      keep:\n        - a\n        - 3\n",
        (7, 11),
        "stages[0].rtn.keep[1]: 3 is not text",
        None,
    ),
    "a device that is none": (HEAD + STAGES + "device: gpu\n", (4, 9), "'gpu' is not auto, cpu, cuda", None),
    "a group of blocks that is none": (
        HEAD + "stages: [{tinyfusion: {groups: '0:2'}}]\n",
        (3, 32),
        "stages[0].tinyfusion.groups: '0:2' is not two counts as in \"1:2\"",
        None,
    ),
    "one of several groups that is none": (
        HEAD + "stages: [{tinyfusion: {groups: ['1:2', 1-2]}}]\n",
        (3, 40),
        "stages[0].tinyfusion.groups[1]: '1-2' is not two counts",
        None,
    ),
    "no groups at all": (
        HEAD + "stages: [{tinyfusion: {groups: []}}]\n",
        (3, 24),
        "stages[0].tinyfusion.groups: [] is not a list of at least 1 entry",
        None,
    ),
    "one end of two": (
        HEAD + "stages: [{tinyfusion: {tau: [0.1]}}]\n",
        (3, 24),
        "stages[0].tinyfusion.tau: [0.1] is not a list of 2 entries",
        None,
    ),
    "a name of layers that is none": (
        HEAD + "stages: [{mixdq: {budget: {mean_bits: 4}, groups: {a b: {layers: [x]}}}}]\n",
        (3, 52),
        "stages[0].mixdq.groups.a b: 'a b' is not letters, digits, - and _",
        None,
    ),
    "two keys in a stage": (
        HEAD + "stages:\n  - {rtn: , vidit_q: }\n",
        (4, 5),
        "stages[0]: a stage is a mapping with one key, its method; found 2 keys",
        None,
    ),
    "a stage that is a word": (HEAD + "stages: [rtn]\n", (3, 10), 'found "rtn"', "- rtn: {}"),
    "no stages": (HEAD + "stages: []\n", (3, 1), "stages: [] is not a list of at least 1", None),
    "missing key": (
        "stages: [{rtn: {}}]\nexport: {path: o}\n",
        (1, 1),
        "model: this key is required",
        "model: ",
    ),
    "missing path": (
        "model: m\nexport: {}\n" + STAGES,
        (2, 1),
        "export.path: this key is required",
        "path: ",
    ),
    "duplicate key": (
        HEAD + STAGES + "seed: 1\nseed: 2\n",
        (5, 1),
        "seed: duplicate key; the first one is at line 4",
        "keep one",
    ),
    "duplicate key deep inside": (
        HEAD + "stages:\n  - rtn:\n      weight_bits: 8\n      weight_bits: 4\n",
        (6, 7),
        "stages[0].rtn.weight_bits: duplicate key",
        None,
    ),
    "a tab": (HEAD + "stages:\n\t- rtn: {}\n", (4, 1), "a TAB in the indentation", "spaces"),
    "a tab after spaces": (HEAD + "stages:\n  \t- rtn: {}\n", (4, 3), "a TAB", "space"),
    "a tab after a colon": ("model:\tbuiltin:dit\n", (1, 7), "a TAB", "space"),
    "an empty file": ("", (1, 1), "the recipe is empty", "compress recipes"),
    "only comments": ("# nothing\n", (1, 1), "the recipe is empty", None),
    "a list": ("- a\n", (1, 1), "a recipe is a mapping", None),
    "an unset variable": (
        HEAD + STAGES + "seed: ${COMPRESS_TEST_UNSET}\n",
        (4, 7),
        "seed: the environment variable COMPRESS_TEST_UNSET is not set",
        "${COMPRESS_TEST_UNSET:-value}",
    ),
    "a broken variable": (
        HEAD + STAGES + "seed: ${1}\n",
        (4, 7),
        "seed: not an environment variable",
        "${NAME}",
    ),
    "a python object": (
        HEAD + STAGES + "seed: !!python/object/apply:os.system [ls]\n",
        (4, 7),
        "the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
        None,
    ),
    "an unclosed bracket": (HEAD + "stages: [{rtn: {}}\n", (4, 1), "not valid YAML", None),
    "an unknown alias": (HEAD + "stages: *x\n", (3, 9), "undefined alias", None),
    "a merge key": (HEAD + STAGES + "calibration: {<<: {samples: 1}}\n", (4, 15), "merge keys", None),
    "an alias inside itself": ("model: &a [*a]\n", (1, 8), "nested too deeply", None),
    "two documents": (HEAD + STAGES + "---\nseed: 1\n", (4, 1), "another document", None),
    "a control character": ("model: \x01\n", (1, 8), "U+0001", None),
    "very deep": ("model: " + "[" * 4000, (1, 1), "nested too deeply", None),
    "conditions that exclude each other": (
        HEAD + STAGES + "calibration: {classes: [1], prompts: p.txt}\n",
        (4, 1),
        "calibration: classes and prompts exclude each other",
        None,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_recipes(tmp_path, case):
    text, place, message, hint = BROKEN[case]
    error = refusal(tmp_path, text)
    assert (error.line, error.column) == place, error.message
    assert error.exit_code == 2
    assert message in error.message
    assert error.message.startswith(f"{tmp_path / 'x.yaml'}:{place[0]}:{place[1]}: ")
    if hint is not None:
        assert hint in (error.hint or "")
    for jargon in ("Input should", "pydantic", "validation error", "https://", "type="):
        assert jargon not in error.message


def test_all_findings_are_told_with_their_places(tmp_path):
    error = refusal(tmp_path, HEAD + "stages:\n  - rtn: {weight_bits: 5}\n  - rtm: {}\nsed: 1\n")
    lines = error.message.split("\n")
    assert [re.search(r":(\d+):\d+: ", line)[1] for line in lines] == ["4", "5", "6"]
    assert "did you mean 'rtn'?" in lines[1] and "did you mean 'seed'?" in lines[2]


class TestOrder:
    """The registered methods are all quantizers, so another phase is added for the test."""

    @pytest.fixture(autouse=True)
    def prune(self, monkeypatch):
        from compress.recipes import schema, stages

        class Prune(stages.StageSettings):
            method = "prune_test"
            phase = "prune"
            families = frozenset({"dit"})

        monkeypatch.setitem(stages.STAGES, "prune_test", Prune)
        assert schema.settings_class("prune_test") is Prune

    def test_wrong_order_is_refused_at_the_stage(self, tmp_path):
        error = refusal(tmp_path, HEAD + "stages:\n  - rtn: {}\n  - prune_test: {}\n")
        assert (error.line, error.column) == (5, 5)
        assert "stages[1].prune_test: a prune stage cannot follow a quantize stage (rtn)" in error.message
        assert "prune -> recover -> quantize -> plan" in error.hint

    def test_right_order(self, tmp_path):
        assert len(load(tmp_path, HEAD + "stages:\n  - prune_test: {}\n  - rtn: {}\n").recipe.stages) == 2


class TestEnvironment:
    def test_values_take_the_type_that_fits(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BITS", "4")
        monkeypatch.setenv("COMMIT", "1234567")
        text = (
            "model: {id: 'org/${NAME:-dit}', revision: '${COMMIT}'}\nseed: ${SEED:-7}\n"
            "stages:\n  - rtn:\n      weight_bits: ${BITS}\nexport: {path: 'out/${BITS}'}\n"
        )
        loaded = load(tmp_path, text)
        recipe = loaded.recipe
        assert (recipe.model.id, recipe.model.revision) == ("org/dit", "1234567")
        assert recipe.seed == 7 and recipe.stages[0].settings.weight_bits == 4
        assert recipe.export[0].path == Path("out/4")

    def test_the_text_of_a_recipe_without_stages_says_so(self, tmp_path):
        export = {"path": "o", "format": "bitsandbytes-nf4"}
        found = load_recipe({"model": "m", "stages": [], "export": export})
        (tmp_path / "again.yaml").write_text(found.text)
        assert load_recipe(tmp_path / "again.yaml").recipe == found.recipe
        assert found.recipe.stages == ()

    def test_the_text_of_an_expanded_recipe_needs_no_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("COMPRESS_TEST_ID", "builtin:dit")
        loaded = load(tmp_path, "model: ${COMPRESS_TEST_ID}\n" + STAGES + "export: {path: o}\n")
        monkeypatch.delenv("COMPRESS_TEST_ID")
        assert load(tmp_path, loaded.text).recipe == loaded.recipe
        assert "environment: model" in loaded.text

    def test_an_expanded_value_of_a_wrong_type(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SEED", "many")
        error = refusal(tmp_path, HEAD + STAGES + "seed: ${SEED}\n")
        assert (error.line, error.column) == (4, 7) and "'many' is not a whole number" in error.message

    def test_empty_counts_as_unset_for_a_default(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SEED", "")
        assert load(tmp_path, HEAD + STAGES + "seed: ${SEED:-3}\n").recipe.seed == 3


def test_sizes(tmp_path):
    for written, count in (
        ("5GB", 5 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("5e9", 5 * 10**9),
        ("2000000", 2 * 10**6),
    ):
        text = f"model: m\nexport: {{path: o, max_shard_size: {written}}}\n" + STAGES
        assert load(tmp_path, text).recipe.export[0].max_shard_size == count
    error = refusal(tmp_path, "model: m\nexport: {path: o, max_shard_size: 5 GBit}\n" + STAGES)
    assert (error.line, error.column) == (2, 35) and "'5 GBit' is not a size" in error.message


def test_prompts_are_found_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "p.txt").write_text("a cat\n")
    text = HEAD + STAGES + "calibration: {prompts: p.txt}\n"
    assert load(tmp_path, text).recipe.calibration.prompts == tmp_path / "p.txt"
    Path("p.txt").write_text("a dog\n")
    assert load(tmp_path, text).recipe.calibration.prompts == Path("p.txt")


@pytest.mark.parametrize("key", ["prompts", "embeddings"])
@pytest.mark.parametrize("path", ["../data/p.txt", "/nowhere/data/p.txt"])
def test_a_copied_recipe_finds_the_files_that_were_copied_with_it(tmp_path, key, path):
    text = HEAD + STAGES + f"calibration: {{{key}: {path}}}\n"
    assert getattr(load(tmp_path, text).recipe.calibration, key) == Path(path)
    (tmp_path / "p.txt").write_text("a cat\n")
    assert getattr(load(tmp_path, text).recipe.calibration, key) == tmp_path / "p.txt"


def test_a_python_value():
    value = {"model": "builtin:dit", "stages": [{"rtn": {}}], "export": {"path": Path("o")}}
    loaded = load_recipe(value)
    assert loaded.file is None and loaded.recipe.export[0].path == Path("o")
    with pytest.raises(RecipeError) as caught:
        load_recipe({**value, "sed": 1})
    assert caught.value.message == "sed: unknown key 'sed'" and caught.value.line is None


def test_not_utf8(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"model: a\nseed: \xff\n")
    with pytest.raises(RecipeError, match=r"x\.yaml:2:1: not UTF-8"):
        load_recipe(file)


bits = st.sampled_from([2, 3, 4, 6, 8])
stages = st.lists(
    st.one_of(
        st.builds(
            lambda b, c: {"rtn": {"weight_bits": b, "clip": c}},
            bits,
            st.sampled_from(["minmax", "mse", None]),
        ),
        st.builds(
            lambda b, e: {"vidit_q": {"weight_bits": b, "act_exponent": e}},
            bits,
            st.sampled_from(["sweep", 0.5, 1]),
        ),
        st.builds(lambda keep: {"smoothquant": {"keep": keep}}, st.lists(st.text(max_size=5), max_size=3)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=25, deadline=None)
@given(
    stages=stages,
    seed=st.integers(0, 2**63 - 1),
    gate=st.sampled_from(["<= 0.35", ">= 1e-3", "== 4", "< .5"]),
    name=st.text(min_size=1).filter(str.isprintable),
)
def test_a_dumped_recipe_loads_to_itself(tmp_path_factory, stages, seed, gate, name):
    value = {
        "model": name,
        "seed": seed,
        "stages": stages,
        "require": {"size_ratio": gate},
        "export": {"path": "o"},
    }
    first = load_recipe(value)
    dumped = first.recipe.model_dump(mode="json")
    assert load_recipe(json.loads(json.dumps(dumped))).recipe == first.recipe
    if "${" not in name:
        again = load(tmp_path_factory.mktemp("r"), first.text)
        assert again.recipe == first.recipe


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(
        alphabet=st.sampled_from(list("abms:-[]{},&*!|>'\"#%@` \n\t\\0123456789.$~<=?")), max_size=60
    )
)
def test_garbage_ends_in_a_recipe_error(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("g")
    with pytest.raises(RecipeError):
        load(folder, text)


def test_recipe_is_frozen():
    recipe = load_recipe({"model": "m", "stages": [{"rtn": None}], "export": {"path": "o"}}).recipe
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
