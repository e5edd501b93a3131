"""recipe.yaml and the report of a folder say the same, or the folder is refused by all who read it."""

from __future__ import annotations

import json

import pytest
from compress.errors import VerifyError
from compress.exporters import hub_bundle
from compress.exporters.recorded_recipe import RECIPE_NAME, check_recipe
from compress.exporters.verify import FolderError, verify_folder
from compress.recipes.loader import load_recipe
from compress.reproduction import read_origin
from compress.runtime.hashes import file_sha256

TEXT = """
model: org/name
calibration: {embeddings: data/words.safetensors, samples: 2}
stages:
  - rtn: {weight_bits: 8}
require: {sqnr_db: '>= 9'}
export: {path: out}
"""


@pytest.fixture
def made(tmp_path):
    """Return `made(text, **options)` -> (folder, report) as a run writes both."""

    def make(text, **options):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "words.safetensors").touch()
        (tmp_path / "mine.yaml").write_text(text)
        loaded = load_recipe(tmp_path / "mine.yaml", **options)
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / RECIPE_NAME).write_text(loaded.text)
        return folder, {"recipe": json.loads(json.dumps(loaded.recipe.model_dump(mode="json")))}

    return make


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (TEXT, {}),
        (TEXT, {"overrides": ["seed=3"], "output": "elsewhere", "push": "org/name@v1"}),
        (TEXT.replace("org/name", "${PLACE}"), {}),
        (TEXT.replace("{path: out}", "[{path: a}, {path: b, format: dequantized}]"), {}),
    ],
    ids=["as written", "with options", "from the environment", "several exports"],
)
def test_what_a_run_writes_agrees(made, monkeypatch, text, options):
    monkeypatch.setenv("PLACE", "org/named-by-it")
    folder, document = made(text, **options)
    monkeypatch.setenv("PLACE", "org/another")
    assert check_recipe(folder, document) == "recipe.yaml is the recipe of the report"


@pytest.mark.parametrize("given", ["images: {}", "data: {{latents: {}}}"])
def test_folders_that_were_found_beside_the_recipe_agree(made, given):
    def text(name):
        return TEXT.replace("embeddings: data/words.safetensors", given.format(name))

    folder, document = made(text("data"))
    assert check_recipe(folder, document) == "recipe.yaml is the recipe of the report"
    (folder / RECIPE_NAME).write_text(text("others"))
    with pytest.raises(VerifyError, match="calibration differ"):
        check_recipe(folder, document)


def test_nothing_of_the_environment_is_read(made, monkeypatch):
    folder, document = made(TEXT)
    monkeypatch.setenv("PLACE", "org/name")
    (folder / RECIPE_NAME).write_text(TEXT.replace("org/name", "${PLACE}"))
    with pytest.raises(VerifyError, match=r"not the recipe of the report: model differ"):
        check_recipe(folder, document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT.replace("8", "4").replace("9", "8"), "stages, require differ"),
        (TEXT.replace("words", "others"), "calibration differ"),
        ("model: [", "cannot be read"),
        ("x" * (4 * 2**20 + 1), "at most 4194304 are read"),
    ],
    ids=["settings", "data", "damaged", "too long"],
)
def test_another_text_is_refused(made, text, words):
    folder, document = made(TEXT)
    (folder / RECIPE_NAME).write_text(text)
    with pytest.raises(VerifyError, match=words):
        check_recipe(folder, document)


def test_a_recipe_of_another_version_is_not_compared(made):
    folder, document = made(TEXT)
    document["recipe"]["stages"] = [{"method_of_tomorrow": {}}]
    assert check_recipe(folder, document).startswith("not compared: this version does not know")


def test_verify_reproduce_and_push_refuse_another_text(exported):
    text = (exported / RECIPE_NAME).read_text().replace('"weight_bits": 8', '"weight_bits": 4')
    (exported / RECIPE_NAME).write_text(text)
    report = json.loads((exported / "report.json").read_text())
    (row,) = (row for row in report["export"]["files"] if row["name"] == RECIPE_NAME)
    row |= {"bytes": len(text), "sha256": file_sha256(exported / RECIPE_NAME)}
    (exported / "report.json").write_text(json.dumps(report))
    with pytest.raises(FolderError, match="recipe: recipe.yaml is not the recipe of the report: stages"):
        verify_folder(exported)
    for read in (read_origin, hub_bundle.read_report):
        with pytest.raises(VerifyError, match="not the recipe of the report: stages differ"):
            read(exported)
