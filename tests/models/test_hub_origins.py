"""What a checkpoint on the Hub says of blocks that it has lost, through a real server."""

import shutil

import pytest
from compress.compressors.recovery.distill import Distill
from compress.compressors.recovery.teacher import pairs_with, teacher_config
from compress.models.open import open_model, read_spec
from compress.models.origins import NAME, blocks_of_first
from compress.models.shallower import keep_blocks
from compress.progress import SilentProgress
from compress.recipes.recovery import MaskedDistillSettings
from compress.recipes.schema import ModelRef

from ..small_dits import LIST, opened

PIPELINE = b'{"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}'


def files_of(folder, prefix):
    """Return the files of a component, as they lie in a repository."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")
             if path.is_file()}  # fmt: skip
    if not prefix:
        return found
    placed = {name if name.startswith("scheduler/") else prefix + name: data for name, data in found.items()}
    return {**placed, "model_index.json": PIPELINE}


@pytest.mark.parametrize("prefix", ["", "transformer/"])
def test_origins_are_fetched_beside_a_model_and_its_teacher(prefix, at_hub, make_tiny, tmp_path):
    source = opened(make_tiny(num_layers=4, name="four"))
    keep_blocks(source, {LIST: (0, 2, 3)}, {"method": "test"})
    middle = written(source, tmp_path / "three")
    at_hub.create("org/three", files_of(middle, prefix))
    student = opened(middle)
    keep_blocks(student, {LIST: (0, 2)}, {"method": "test"})
    at_hub.create("org/two", files_of(written(student, tmp_path / "two"), prefix))

    settings = MaskedDistillSettings.model_validate({"steps": 2, "teacher": "org/three"})
    spec = read_spec(ModelRef(id="org/three"))
    assert blocks_of_first(spec.source.origins) == {LIST: {"of": 4, "kept": [0, 2, 3]}}
    assert not list(spec.source.folder.glob("*.safetensors")), "a plan needs no weights"
    model = open_model(ModelRef(id="org/three"), progress=SilentProgress())
    assert model.attachments[NAME] == spec.source.origins and not model.changed
    keep_blocks(model, {LIST: (0, 2)}, {"method": "test"})
    assert pairs_with(model, teacher_config(model, settings), settings) == {LIST: [(0, 1), (1, 2)]}

    four = MaskedDistillSettings.model_validate({"steps": 2, "teacher": str(tmp_path / "four")})
    again = open_model(ModelRef(id="org/two"), progress=SilentProgress())
    assert blocks_of_first(again.attachments[NAME]) == {LIST: {"of": 4, "kept": [0, 3]}}
    assert pairs_with(again, teacher_config(again, four), four) == {LIST: [(0, 2), (1, 3)]}
    assert Distill().plan(read_spec(ModelRef(id="org/two")), four).notes


def written(model, folder):
    """Write a model, its scheduler and the file of its origins."""
    model.module.save_pretrained(folder)
    shutil.copytree(model.source.folder / "scheduler", folder / "scheduler")
    (folder / NAME).write_text(model.attachments[NAME])
    return folder
