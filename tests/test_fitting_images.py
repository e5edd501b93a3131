"""A recipe for a classifier is held against its images and labels before anything is read or written."""

from __future__ import annotations

import pytest
import torch
from compress import pipeline
from compress.errors import PlanError, RecipeError, SourceError
from compress.fitting import recovery_notes
from compress.fitting_images import check_images
from compress.models.checkpoint import locate
from compress.recipes.loader import load_recipe
from PIL import Image
from safetensors.torch import save_file

VIT, DIT, STORIES = "builtin:vit", "builtin:dit", "builtin:stories"
PRUNE = {"isomorphic": {"ratios": {"width": 0.5}}}
FEW = {"fidelity": {"samples": 2}}


def _recipe(model, **parts):
    stages = parts.pop("stages", [PRUNE])
    return {"model": str(model), "stages": stages, "export": {"path": "out/x"}, **parts}


def _check(recipe):
    loaded = load_recipe(recipe)
    check_images(loaded, locate(loaded.recipe.model, weights=False))


def _prune(**values):
    return {"isomorphic": {"ratios": {"width": 0.5}, **values}}


def _finetune(**values):
    return {"finetune": {"steps": 2, **values}}


@pytest.fixture
def vit(make_vit):
    return make_vit(num_labels=2, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})


@pytest.fixture
def labelled(tmp_path):
    """20 images of two classes: 16 to calibrate on, 4 held out."""
    for name in ("cat", "dog"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (4, 4)).save(tmp_path / "labelled" / name / f"{index}.png")
    return tmp_path / "labelled"


@pytest.fixture
def bare(tmp_path):
    """20 images without labels."""
    path = tmp_path / "bare.safetensors"
    save_file({"pixels": torch.zeros(20, 4, 4).byte()}, path)
    return path


def _calibration(path, samples=4):
    return {"images": str(path), "samples": samples}


def test_the_built_in_model_brings_its_images():
    _check(_recipe(VIT, stages=[PRUNE, _finetune()], evaluate={"quality": {}}))


def test_others_are_left_to_their_own_checks():
    _check(_recipe(STORIES, stages=[{"rtn": {}}]))
    _check(_recipe(DIT, stages=[{"rtn": {}}]))


@pytest.mark.parametrize(
    ("stages", "evaluate", "what"),
    [
        ([PRUNE], {"fidelity": None}, r"stages\[0\]\.isomorphic"),
        ([_prune(importance="magnitude")], {}, r"evaluate\.fidelity"),
        ([_prune(importance="magnitude")], {"fidelity": None, "quality": {}}, r"evaluate\.quality"),
        ([_prune(importance="magnitude", baselines=["local"])], {"fidelity": None}, r"isomorphic\.baselines"),
        ([_prune(importance="magnitude"), _finetune()], {"fidelity": None}, r"stages\[1\]\.finetune"),
    ],
)
def test_what_looks_at_images_needs_some(vit, stages, evaluate, what):
    with pytest.raises(SourceError, match=rf"{what} looks at images, and the recipe names none") as found:
        _check(_recipe(vit, stages=stages, evaluate=evaluate))
    assert "images: FOLDER" in str(found.value.hint)


def test_magnitude_alone_needs_none(vit):
    _check(_recipe(vit, stages=[_prune(importance="magnitude")], evaluate={"fidelity": None}))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"samples": 17}, r"16 of 20 images may be calibrated on; calibration\.samples asks for 17"),
        (
            {"evaluate": {"fidelity": {"samples": 5}}},
            r"4 of 20 images are held out .*; evaluate\.fidelity\.samples asks for 5",
        ),
        ({"evaluate": {"quality": {}, **FEW}}, r"evaluate\.quality\.samples asks for 500"),
    ],
)
def test_too_few_images(vit, labelled, parts, message):
    calibration = _calibration(labelled, parts.get("samples", 4))
    with pytest.raises(SourceError, match=message):
        _check(_recipe(vit, calibration=calibration, evaluate=parts.get("evaluate", FEW)))


def test_classes_that_are_not_the_models(vit, labelled):
    (labelled / "cow").mkdir()
    with pytest.raises(SourceError, match="'cow' is no class of the model"):
        _check(_recipe(vit, calibration=_calibration(labelled), evaluate=FEW))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([PRUNE], r"stages\[0\]\.isomorphic\.importance: cross_entropy needs labels"),
        ([_prune(loss="cross_entropy")], r"stages\[0\]\.isomorphic\.loss: cross_entropy needs labels"),
        ([_prune(loss="output_norm"), _finetune()], r"stages\[1\]\.finetune: .* no labels to learn from"),
        (
            [_prune(loss="output_norm"), _finetune(distill={"weight": 0.75})],
            r"stages\[1\]\.finetune\.distill\.weight: leaves 0\.25 of the loss to labels",
        ),
    ],
)
def test_labels_that_are_needed(vit, bare, stages, message):
    with pytest.raises(RecipeError, match=message) as found:
        _check(_recipe(vit, calibration=_calibration(bare), evaluate=FEW, stages=stages))
    if "cross_entropy" in message:
        assert all(word in str(found.value.hint) for word in ("pseudo_labels", "output_norm", "magnitude"))


@pytest.mark.parametrize(
    "stages",
    [
        [_prune(loss="pseudo_labels")],
        [_prune(loss="output_norm"), _finetune(distill={})],
        [_prune(importance="magnitude")],
    ],
)
def test_labels_that_are_not_needed(vit, bare, stages):
    _check(_recipe(vit, calibration=_calibration(bare), evaluate=FEW, stages=stages))


def test_accuracy_needs_labels(vit, bare):
    recipe = _recipe(
        vit, calibration=_calibration(bare), stages=[_prune(loss="output_norm")],
        evaluate={"quality": {"samples": 2}, **FEW},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"evaluate\.quality: is accuracy for a classifier, .* no labels"):
        _check(recipe)


@pytest.mark.parametrize(
    ("stages", "evaluate"),
    [
        ([PRUNE], FEW),
        ([_prune(loss="pseudo_labels"), _finetune()], FEW),
        ([_prune(loss="pseudo_labels"), _finetune(distill={"weight": 0.5})], FEW),
        ([_prune(loss="pseudo_labels")], {"quality": {"samples": 2}, **FEW}),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_columns_serve_where_nothing_needs_labels(vit, tmp_path, stages, evaluate, suffix):
    names = [f"{index}.png" for index in range(10)]
    lines = [f'{{"file_name": "{name}", "text": "a cat"}}' for name in names]
    if suffix == "csv":
        lines = ["file_name,text", *(f"{name},a cat" for name in names)]
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / f"metadata.{suffix}").write_text("\n".join(lines) + "\n")
    calibration = _calibration(tmp_path / "captions")
    with pytest.raises(RecipeError, match=rf"\(metadata\.{suffix}: .* 'file_name', 'text', and no 'label'"):
        _check(_recipe(vit, calibration=calibration, evaluate=evaluate, stages=stages))
    free = [_prune(loss="pseudo_labels"), _finetune(distill={"weight": 1.0})]
    _check(_recipe(vit, calibration=calibration, evaluate=FEW, stages=free))


def test_each_part_needs_its_own_labels(vit, tmp_path):
    """Scores take those of the training part, accuracy those of the other."""
    pixels = torch.zeros(8, 4, 4).byte()
    for name, bare in (("one", "test"), ("two", "train")):
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            labels = {} if part == bare else {"labels": torch.zeros(8).byte()}
            save_file({"pixels": pixels, **labels}, tmp_path / name / f"{part}.safetensors")
    quality = {"quality": {"samples": 2}, "fidelity": None}
    _check(_recipe(vit, calibration=_calibration(tmp_path / "one"), evaluate=FEW))
    with pytest.raises(RecipeError, match=r"evaluate\.quality"):
        _check(_recipe(vit, calibration=_calibration(tmp_path / "one"), evaluate=quality))
    stages = [_prune(loss="output_norm")]
    _check(_recipe(vit, calibration=_calibration(tmp_path / "two"), evaluate=quality, stages=stages))
    with pytest.raises(RecipeError, match=r"isomorphic\.importance"):
        _check(_recipe(vit, calibration=_calibration(tmp_path / "two"), evaluate=FEW))


def test_images_of_the_training_alone(vit, bare, labelled, tmp_path):
    stages = [_prune(loss="output_norm"), _finetune(images=str(labelled))]
    recipe = _recipe(vit, calibration=_calibration(bare), evaluate=FEW, stages=stages)
    _check(recipe)
    stages[1]["finetune"]["images"] = str(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="nowhere: no such folder or file of images"):
        _check(recipe)


def test_what_is_refused_is_refused_before_a_weight_is_read_or_a_byte_is_written(vit, bare, tmp_path):
    (vit / "model.safetensors").write_bytes(b"damaged")
    recipe = _recipe(vit, calibration=_calibration(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="nowhere: no such file or folder"):
        pipeline.run(recipe, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("model", "stage"), [(DIT, _finetune()), (VIT, {"rtn": {}})])
def test_stages_of_others_do_not_fit(model, stage):
    with pytest.raises(PlanError, match="does not fit the family"):
        pipeline.plan(_recipe(model, stages=[stage]))


def test_pruning_without_training_is_told():
    notes = [
        recovery_notes(load_recipe(_recipe(VIT, stages=stages)).recipe, 0, "vit")
        for stages in ([PRUNE], [PRUNE, _finetune()])
    ]
    assert len(notes[0]) == 1 and "fine-tuning required" in notes[0][0] and notes[1] == []


def _varied(folder, classes, each, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.parametrize("where", ["calibration", "held out", "training"])
def test_strict_looks_at_all_files_before_anything_is_changed(vit, tmp_path, where):
    """The broken file is none of the two that are calibrated on: the run would meet it after the cut."""
    images = _varied(tmp_path / "images" / "train", ["cat", "dog"], 8).parent
    _varied(images / "test", ["cat", "dog"], 3, seed=1)
    more = _varied(tmp_path / "more", ["cat", "dog"], 8, seed=2)
    place = {"calibration": images / "train", "held out": images / "test", "training": more}[where]
    for name in ("0.png", "2.png"):
        (place / "dog" / name).write_bytes((place / "dog" / name).read_bytes()[:100])
    recipe = _recipe(
        vit, calibration={**_calibration(images, 2), "strict": True}, evaluate=FEW,
        stages=[PRUNE, _finetune(images=str(more), batch_size=4)],
    )  # fmt: skip
    with pytest.raises(SourceError, match=r"dog.0\.png: cannot be .*\(and 1 more of 38\)") as found:
        pipeline.run(recipe, work_dir=tmp_path / "work")
    assert "calibration.strict" in str(found.value.hint)
    assert not list((tmp_path / "work").rglob("*")), "no stage was started"
    del recipe["calibration"]["strict"]
    _check(recipe)


@pytest.mark.parametrize("where", ["images", "more"])
def test_strict_refuses_an_empty_folder_of_a_class(vit, tmp_path, where):
    for name, seed in (("images", 0), ("more", 1)):
        _varied(tmp_path / name, ["cat"], 12, seed)
    (tmp_path / where / "dog").mkdir()
    recipe = _recipe(
        vit, calibration={**_calibration(tmp_path / "images", 2), "strict": True}, evaluate=FEW,
        stages=[PRUNE, _finetune(images=str(tmp_path / "more"))],
    )  # fmt: skip
    with pytest.raises(SourceError, match=rf"{where}: no image is in the folder 'dog'"):
        _check(recipe)
    del recipe["calibration"]["strict"]
    _check(recipe)


@pytest.mark.slow
def test_a_training_may_be_all_that_has_images(vit, tmp_path):
    """Nothing is measured then, so nothing is held out; its images are checked all the same."""
    more = _varied(tmp_path / "more", ["cat", "dog"], 4)
    recipe = _recipe(
        vit, stages=[_prune(importance="magnitude"), _finetune(images=str(more), batch_size=4)],
        evaluate={"fidelity": None},
    )  # fmt: skip
    recipe["export"]["path"] = str(tmp_path / "out")
    report = pipeline.run(recipe, work_dir=tmp_path / "work")
    assert report["stages"][1]["details"]["images"] == 8
    (more / "cow").mkdir()
    with pytest.raises(SourceError, match="'cow' is no class of the model"):
        _check(recipe)
