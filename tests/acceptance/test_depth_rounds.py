"""Depth pruning in runs of their own: what the second leaves is told in blocks of the very first model."""

import json
import shutil
import subprocess
import sys

import compress
import pytest
from compress.compressors.recovery.teacher import pairs_with
from compress.errors import SourceError
from compress.exporters.inspection import inspect
from compress.models.open import open_model
from compress.models.origins import NAME, all_removals, blocks_of_first
from compress.models.shallower import keep_blocks
from compress.progress import SilentProgress
from compress.recipes.recovery import MaskedDistillSettings
from compress.recipes.schema import ModelRef
from safetensors.torch import load_file

from ..small_dits import DIT, LIST, WEIGHTS, equal_embedders, opened

SECOND = {"depth": {"by": "indices", "keep": [1, 3]}}, {"distill": {"steps": 2, "batch_size": 4}}


class Stopped(SilentProgress):
    """Ends a run when the stage that trains begins."""

    def start(self, label, total):
        if "distill" in label:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def run(root):
    """Return `run(model, *stages, name)` -> (report, folder) of a real run."""

    def make(model, *stages, name, progress=None):
        calibration = {"samples": 1, "steps": 1, "guidance_scale": 1.0}
        if any("distill" in stage for stage in stages):
            calibration["data"] = {"generate": 8, "steps": 1}
        recipe = {
            "model": str(model),
            "calibration": calibration,
            "stages": list(stages),
            "evaluate": {"fidelity": {"samples": 1, "steps": 1}, "layers": False},
            "export": {"path": str(root / name)},
        }
        report = compress.run(recipe, work_dir=root / f"work-{name}", progress=progress or SilentProgress())
        return report, root / name

    return make


@pytest.fixture(scope="module")
def original(root, tiny_cache):
    folder = root / "six"
    shutil.copytree(tiny_cache(DIT, 0, "float32", (("num_layers", 6),)), folder)
    return equal_embedders(folder)


@pytest.fixture(scope="module")
def first(original, run):
    """Blocks 0, 2, 3 and 5 of six."""
    return run(original, {"depth": {"by": "indices", "keep": [0, 2, 3, 5]}}, name="first")[1]


@pytest.fixture(scope="module")
def second(first, run):
    """(report, folder) of a run on that: its blocks 1 and 3, trained a little."""
    return run(first, *SECOND, name="second")


def origins(folder):
    return json.loads((folder / NAME).read_text())


@pytest.mark.slow
def test_the_second_folder_tells_of_the_original_and_of_both_parents(original, first, second):
    report, folder = second
    found = origins(folder)
    assert found["blocks"] == {LIST: {"of": 4, "kept": [1, 3]}}, "counted from what the run began with"
    assert found["original"] == {LIST: {"of": 6, "kept": [2, 5]}}
    assert [one["parent"] for one in found["earlier"]["removals"]] == [str(original)]
    assert [one["parent"] for one in found["removals"]] == [str(first)]
    assert report["model"]["depth"]["blocks"] == {LIST: {"of": 6, "kept": [0, 2, 3, 5]}}
    assert report["stages"][1]["details"]["matched"] == {LIST: [[0, 2], [1, 3]]}, (
        "with what the run began with"
    )
    assert inspect(folder)["depth"] == {LIST: {"of": 6, "kept": [2, 5]}}
    card = (folder / "README.md").read_text()
    assert "`first` had lost blocks already, in earlier runs: `depth` on `six`." in card
    assert "| `transformer_blocks` | 6 | 2 | 2, 5 |" in card
    section = card.split("## What was removed\n")[1].split("\n## ")[0]
    assert str(original.parent) not in section
    checked = subprocess.run(
        [sys.executable, "-m", "compress", "verify", str(folder)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_a_second_round_that_was_stopped_goes_on_to_the_same_files(first, second, run):
    with pytest.raises(KeyboardInterrupt):
        run(first, *SECOND, name="cut", progress=Stopped())
    report, cut = run(first, *SECOND, name="cut")
    assert [stage["resumed"] for stage in report["stages"]] == [True, False]
    for name in (NAME, "config.json", WEIGHTS):
        assert (cut / name).read_bytes() == (second[1] / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_that_removes_nothing_hands_the_file_on(first, run):
    _, folder = run(first, {"rtn": {"weight_bits": 8}}, name="quantized")
    found = origins(folder)
    assert found["blocks"] == {} and found["removals"] == []
    assert found["original"] == inspect(folder)["depth"] == {LIST: {"of": 6, "kept": [0, 2, 3, 5]}}
    assert "| `transformer_blocks` | 6 | 4 | 0, 2, 3, 5 |" in (folder / "README.md").read_text()


def written(model, folder):
    """Write what a stage left, as far as it is needed here."""
    model.module.save_pretrained(folder)
    (folder / NAME).write_text(model.attachments[NAME])
    return folder


@pytest.fixture
def three(original, tmp_path):
    """Folders of three rounds of removal, one after the other: places 0, 2, 3, 5, then 1, 3, then 1."""
    folders, parent = [], original
    for number, places in enumerate([(0, 2, 3, 5), (1, 3), (1,)]):
        model = opened(parent)
        keep_blocks(model, {LIST: places}, {"method": "depth"})
        folders.append(written(model, tmp_path / f"round-{number}"))
        parent = folders[-1]
    return folders


def test_every_round_adds_to_what_is_told(original, three):
    assert origins(three[0]).keys() == {"format", "blocks", "removals"}
    lasts = [blocks_of_first((folder / NAME).read_text())[LIST]["kept"] for folder in three]
    assert lasts == [[0, 2, 3, 5], [2, 5], [5]]
    parents = [one["parent"] for one in all_removals((three[2] / NAME).read_text())]
    assert parents == [str(original), str(three[0]), str(three[1])]
    name = f"{LIST}.{{}}.attn1.to_q.weight"
    assert load_file(three[2] / WEIGHTS)[name.format(0)].equal(load_file(original / WEIGHTS)[name.format(5)])


def test_what_earlier_runs_removed_is_no_change_of_this_one(three):
    model = opened(three[0])
    assert not model.changed and model.original_name(f"{LIST}.1.ff") == f"{LIST}.1.ff"
    keep_blocks(model, {LIST: (1, 3)}, {"method": "depth"})
    assert model.changed and model.original_name(f"{LIST}.1.ff") == f"{LIST}.3.ff"


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (1, 0, [(0, 2), (1, 3)]),  # of the parent
        (1, None, [(0, 4), (1, 5)]),  # of the original
        (0, None, [(0, 1), (1, 2), (2, 4), (3, 5)]),
        (2, None, [(0, 5)]),
    ],
)
def test_blocks_are_matched_with_those_that_they_come_from(student, teacher, pairs, three, original):
    of = original if teacher is None else three[teacher]
    settings = MaskedDistillSettings.model_validate({"steps": 2, "teacher": str(of)})
    place = three[student]
    model = opened(place)
    if teacher is not None:  # the parent: the run itself has removed the blocks
        model = opened(of)
        keep_blocks(model, {LIST: (1, 3)}, {"method": "depth"})
    assert pairs_with(model, opened(of).config, settings) == {LIST: pairs}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": {LIST: {"of": 6, "kept": [0, 2]}}}, r"says that 2 blocks of transformer_blocks are left"),
        ({"blocks": {"blocks": {"of": 6, "kept": [0]}}}, "the config has no such list"),
        ({"blocks": {"\x1b[31m": {"of": 6, "kept": [0]}}}, r"blocks of '\\x1b\[31m' are left"),
        ({"format": 7}, "does not say which blocks are left"),
        ({"removals": [{"groups": "2000000:4000000"}]}, "does not say which blocks are left"),
        ({"earlier": {"blocks": {LIST: {"of": 9, "kept": [0, 2]}}, "removals": []}}, "does not say which"),
        ({"earlier": {"blocks": {LIST: {"of": 9, "kept": list(range(6))}}, "removals": []},
          "original": {LIST: {"of": 9, "kept": [0, 1, 2, 3]}}}, "does not say which"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_models_is_refused(change, message, three):
    (three[0] / NAME).write_text(json.dumps({**origins(three[0]), **change}))
    with pytest.raises(SourceError, match=message) as caught:
        open_model(ModelRef(id=str(three[0])), progress=SilentProgress())
    assert str(three[0] / NAME) in caught.value.message
