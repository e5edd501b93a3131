"""The files that a recipe's conditions come from."""

import subprocess
import sys

import pytest
from compress.calibration.inputs import by_content, condition_files, image_place, missing_files
from compress.errors import SourceError
from compress.recipes.schema import CalibrationSettings


@pytest.mark.parametrize("key", ["prompts", "embeddings"])
def test_files_are_listed_and_missed(tmp_path, key):
    path = tmp_path / "conditions"
    settings = CalibrationSettings.model_validate({key: path})
    assert condition_files(settings) == missing_files(settings) == [path]
    with pytest.raises(SourceError, match="cannot be read"):
        by_content(settings)
    path.write_text("a cat")
    assert condition_files(settings) == [path]
    assert missing_files(settings) == []


def test_classes_need_no_file():
    settings = CalibrationSettings(classes=(1, 2))
    assert condition_files(settings) == missing_files(settings) == []
    assert by_content(settings) == settings.model_dump(mode="json", exclude={"data"})


def test_the_check_needs_no_torch():
    code = "import sys, compress.calibration.inputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_images_are_the_recipes_or_the_models_own(tmp_path):
    settings = CalibrationSettings()
    assert image_place(settings, tmp_path) is None
    (tmp_path / "images").mkdir()
    assert image_place(settings, tmp_path) == tmp_path / "images"
    named = CalibrationSettings(images=tmp_path / "others")
    assert image_place(named, tmp_path) == tmp_path / "others" and condition_files(named) == []
    assert missing_files(named) == [tmp_path / "others"]
    (tmp_path / "others").mkdir()
    assert missing_files(named) == []
