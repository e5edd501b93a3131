"""A folder's recipe gives the folder again, byte for byte; what differs is found and explained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compress.errors import SourceError, VerifyError
from compress.pipeline import reproduce, run
from compress.runtime.hashes import file_sha256
from safetensors.torch import load_file, save_file


def _embeddings(path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "prompt_embeds": torch.randn(2, 6, 32, generator=generator),
        "prompt_attention_mask": torch.ones(2, 6, dtype=torch.int64),
    }
    save_file(tensors | {f"negative_{name}": value[:1].clone() for name, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def result(tiny_cache, tmp_path_factory):
    """A folder with two variants of a text-conditional model, made from relative paths."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_cache("PixArtTransformer2DModel", 0, "float32", ()), root / "tiny")
    (root / "tiny" / "LICENSE").write_text("Do what you like.\n")
    (root / "data").mkdir()
    _embeddings(root / "data" / "words.safetensors")
    (root / "recipe.yaml").write_text(
        "model: tiny  # beside the recipe\n"
        "seed: 5\n"
        "calibration: {samples: 2, steps: 2, embeddings: data/words.safetensors}\n"
        "stages:\n  - vidit_q: {weight_bits: 4, activation_bits: 8, rotation: none}\n"
        "evaluate: {fidelity: {samples: 2, steps: 2}, speed: {rounds: 2}}\n"
        "require: {sqnr_db: '>= 1', speedup: '> 0'}\n"
        "export: [{path: out/ours}, {path: out/plain, format: dequantized}]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run("recipe.yaml", work_dir="work")
    return root


@pytest.fixture
def place(result, tmp_path, monkeypatch):
    """A copy of it to change, without what the run kept, and the current directory."""
    shutil.copytree(result, tmp_path / "place", ignore=shutil.ignore_patterns("work"))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _rewrite(folder, old, new):
    """Change a folder's recipe.yaml, and its hash in the report."""
    text = (folder / "recipe.yaml").read_text()
    assert old in text
    (folder / "recipe.yaml").write_text(text.replace(old, new))
    document = json.loads((folder / "report.json").read_text())
    (row,) = (row for row in document["export"]["files"] if row["name"] == "recipe.yaml")
    row["sha256"] = file_sha256(folder / "recipe.yaml")
    (folder / "report.json").write_text(json.dumps(document))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "plain"])
def test_every_file_comes_out_again(place, name):
    """The folder has moved, the embeddings lie in it alone, and no earlier state is there."""
    (place / "out" / name).rename(place / "elsewhere")
    (place / "data" / "words.safetensors").unlink()
    before = _names(place)
    found = reproduce("elsewhere")
    assert found["reproduced"] is True and found["differences"] == []
    card = (place / "elsewhere" / "README.md").read_text()
    assert "times as fast" in card and "original and checkpoint in turn" in card
    assert all(row["equal"] and row["measured"] == row["expected"] for row in found["files"])
    names = {row["name"] for row in found["files"]}
    assert {
        "README.md", "LICENSE", "compress.json", "config.json", "samples.png", "recipe.yaml",
        "diffusion_pytorch_model.safetensors", "words.safetensors",
    } <= names  # fmt: skip
    assert ("bits.png" in names) == (name == "ours"), "a picture of bits where bits are fewer"
    assert _names(place) == before, "nothing is left behind"


@pytest.mark.slow
def test_a_folder_made_with_another_seed_is_not_reproduced(place):
    path = place / "out" / "ours" / "report.json"
    _rewrite(path.parent, "seed: 5", "seed: 6")
    document = json.loads(path.read_text())
    document["recipe"]["seed"] = 6
    document["environment"]["threads"] = 2
    path.write_text(json.dumps(document))
    before = _names(place)
    with pytest.raises(
        VerifyError, match=r"ours: not reproduced, \d+ of 12 files differ: README\.md"
    ) as caught:
        reproduce(place / "out" / "ours")
    assert "threads" not in caught.value.hint and torch.get_num_threads() == 1, "as many as there were"
    assert "seed: 5 then, 6 now" in caught.value.hint and "measured sqnr_db: " in caught.value.hint
    result = caught.value.result
    assert result["reproduced"] is False
    differ = {row["name"] for row in result["files"] if not row["equal"]}
    assert {"README.md", "compress.json", "samples.png"} <= differ
    assert not differ & {"scheduler/scheduler_config.json", "words.safetensors", "recipe.yaml", "LICENSE"}
    assert _names(place) == before


@pytest.mark.slow
def test_other_settings_than_the_reports_give_other_weights(place):
    path = place / "out" / "ours" / "report.json"
    _rewrite(path.parent, "rotation: none", "rotation: none, act_exponent: 0.01")
    document = json.loads(path.read_text())
    document["recipe"]["stages"][0]["vidit_q"]["act_exponent"] = 0.01
    path.write_text(json.dumps(document))
    with pytest.raises(VerifyError) as caught:
        reproduce(place / "out" / "ours")
    changed = {row["name"] for row in caught.value.result["files"] if not row["equal"]}
    assert "diffusion_pytorch_model.safetensors" in changed


@pytest.mark.slow
def test_a_source_that_has_changed_is_refused_before_anything_is_computed(place):
    weights = place / "tiny" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weights)
    before = _names(place)
    with pytest.raises(SourceError, match=r"tiny: diffusion_pytorch_model\.safetensors is not what"):
        reproduce("out/ours", work_dir="again")
    assert _names(place) == before
    shutil.rmtree(place / "tiny")
    with pytest.raises(SourceError, match="made from the folder tiny, which is not here"):
        reproduce("out/ours")


@pytest.mark.slow
def test_a_folder_that_was_changed_is_refused(place):
    (place / "out" / "ours" / "recipe.yaml").write_text("model: other\n")
    with pytest.raises(VerifyError, match=r"'recipe\.yaml' is not the file that report\.json describes"):
        reproduce("out/ours")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda document: document["recipe"].pop("stages"), "does not say how it was made: stages"),
        (lambda document: document["export"].update(path="out/other"), "no export of the recipe"),
        (lambda document: document.pop("recipe"), "does not say how it was made"),
        (lambda document: document["export"]["files"].append({"name": "../x", "sha256": ""}), "'../x'"),
        (lambda document: document["export"].update(files=3), "no readable export.files"),
    ],
)
def test_a_report_that_does_not_say_how(place, damage, message):
    path = place / "out" / "ours" / "report.json"
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(SourceError, match=message):
        reproduce("out/ours")


def test_what_is_no_folder(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        reproduce(tmp_path / "nowhere")
