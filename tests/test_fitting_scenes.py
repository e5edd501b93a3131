"""A recipe for a model that segments is held against its images and masks before anything is done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from compress import pipeline
from compress.errors import RecipeError, SourceError
from compress.fitting import check_kind
from compress.images_ahead import images_of
from compress.models.checkpoint import locate
from compress.models.open import open_model
from compress.preflight import check_stages
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe

from .tiny_sam import save_tiny_sam
from .tiny_scenes import write_parts, write_scenes, write_tar

FEW = {"fidelity": {"samples": 2}}
MASKS = {"quality": {"samples": 2}, **FEW}


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return save_tiny_sam(tmp_path_factory.mktemp("sam") / "model")


def _recipe(model, images=None, *, samples=4, evaluate=FEW, stage=None, **parts):
    calibration = {"samples": samples, **({} if images is None else {"images": str(images)})}
    calibration |= parts.pop("calibration", {})
    return {
        "model": str(model), "stages": [{"slimsam": {"ratio": 0.5, **(stage or {})}}],
        "export": {"path": "out/x"}, "calibration": calibration, "evaluate": evaluate, **parts,
    }  # fmt: skip


def _check(recipe):
    loaded = load_recipe(recipe)
    check_stages(loaded, locate(loaded.recipe.model, weights=False))


@pytest.mark.parametrize("packed", [False, True])
def test_what_fits(sam, tmp_path, packed):
    """20 images: 4 are held out, 3 choose, 13 are trained on."""
    place = write_scenes(tmp_path / "s", 20)
    place = write_tar(place, tmp_path / "s.tar") if packed else place
    most = {"fidelity": {"samples": 4, "points": 9}, "quality": {"samples": 4}}
    _check(_recipe(sam, place, samples=13, evaluate=most))
    _check(_recipe(sam, write_parts(tmp_path / "p", 10, 4), samples=8, evaluate=MASKS))
    _check(_recipe(sam, write_scenes(tmp_path / "bare", 20, masks=False)))


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ({"calibration": {"steps": 5}}, "calibration.steps: is of use for denoisers"),
        ({"calibration": {"guidance_scale": 2.0}}, "calibration.guidance_scale: is of use for denoisers"),
        ({"calibration": {"length": 64}}, "calibration.length: is of use for language models"),
        ({"evaluate": {"fidelity": {"steps": 5, "samples": 2}}}, "evaluate.fidelity.steps: is of use for"),
        (
            {"evaluate": {"quality": {"guidance_scale": 2.0, "samples": 2}, **FEW}},
            "evaluate.quality.guidance_scale",
        ),
        (
            {"require": {"accuracy": ">= 0.5"}, "evaluate": MASKS},
            r"require.accuracy: is not measured for a model that segments",
        ),
        ({"require": {"perplexity": "<= 9"}}, "require.perplexity: is not measured"),
        ({"require": {"psnr_db": ">= 9"}}, "require.psnr_db: is not measured"),
        ({"require": {"kl": "<= 9"}}, "require.kl: is not measured"),
        ({"evaluate": {"answers": {"data": "x.jsonl"}, **FEW}}, "evaluate.answers"),
    ],
)
def test_keys_of_others_are_refused(sam, tmp_path, parts, key):
    place = write_scenes(tmp_path / "s", 20)
    with pytest.raises(RecipeError, match=key):
        _check(_recipe(sam, place, **{"evaluate": FEW, **parts}))


@pytest.mark.parametrize(
    ("model", "stage"),
    [
        ("builtin:vit", {"isomorphic": {"ratios": {"width": 0.5}}}),
        ("builtin:dit", {"rtn": {}}),
        ("builtin:stories", {"rtn": {}}),
    ],
)
def test_points_are_refused_elsewhere(model, stage):
    recipe = {"model": model, "stages": [stage], "export": {"path": "out/x"}}
    loaded = load_recipe({**recipe, "evaluate": {"fidelity": {"points": 3}}})
    with pytest.raises(RecipeError, match=r"evaluate\.fidelity\.points: prompts models that segment"):
        check_kind(loaded, locate(loaded.recipe.model, weights=False))
    loaded = load_recipe({**recipe, "evaluate": {"fidelity": {"points": 4}}})  # as a resolved recipe has it
    check_kind(loaded, locate(loaded.recipe.model, weights=False))


def test_images_are_needed(sam, tmp_path):
    with pytest.raises(
        SourceError, match=r"stages\[0\]\.slimsam looks at images, and the recipe names none"
    ) as found:
        _check(_recipe(sam))
    assert "images: FOLDER" in str(found.value.hint)
    own = shutil.copytree(sam, tmp_path / "own")
    for name, count in (("train", 8), ("validation", 2)):
        write_tar(write_scenes(tmp_path / name, count, seed=count), own / "images" / f"{name}.tar")
    _check(_recipe(own, samples=7, evaluate=MASKS))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"samples": 14}, r"13 of 20 images .* \(3 choose the epoch\); calibration\.samples asks for 14"),
        ({"samples": 15, "stage": {"choice_images": 1}}, "15 of 20 images"),
        ({"evaluate": {"fidelity": {"samples": 5}}}, r"4 of 20 images are held out .*fidelity\.samples asks"),
        ({"evaluate": {"quality": {"samples": 5}, **FEW}}, "4 of 20 images with masks are held out .* for 5"),
    ],
)
def test_too_few_images(sam, tmp_path, parts, message):
    place = write_scenes(tmp_path / "s", 20)
    if "stage" in parts:
        _check(_recipe(sam, place, **parts))
        parts = {**parts, "samples": 16}
    with pytest.raises(SourceError, match=message) as found:
        _check(_recipe(sam, place, **parts))
    assert "more images" in str(found.value.hint)


def test_one_image_cannot_be_trained_on_and_chosen_by(sam, tmp_path):
    with pytest.raises(SourceError, match="1 of 2 images may be scored and trained on; some are trained on"):
        _check(_recipe(sam, write_scenes(tmp_path / "s", 2), samples=1, evaluate={"fidelity": None}))


@pytest.mark.parametrize("made", ["none", "empty", "damaged", "another size"])
def test_true_masks_are_needed_where_they_are_measured(sam, tmp_path, made):
    place = write_scenes(tmp_path / "s", 10, masks=made != "none")
    for path in place.glob("*.json"):
        content = json.loads(path.read_text())
        if made == "empty":
            content["annotations"] = []
        elif made == "another size":
            content["annotations"][0]["segmentation"]["size"] = [64, 48]
        path.write_text("{" if made == "damaged" else json.dumps(content))
    message = "have none$" if made == "none" else "have none: no .json file beside them, of 10, holds one"
    with pytest.raises(RecipeError, match=r"evaluate\.quality: compares with true masks") as found:
        _check(_recipe(sam, place, evaluate=MASKS))
    assert message.rstrip("$") in str(found.value) and "SA-1B" in str(found.value.hint)
    _check(_recipe(sam, place))


def test_masks_of_the_part_that_is_measured_count(sam, tmp_path):
    parts = write_parts(tmp_path / "s", 10, 4)
    for index in range(3):
        (parts / "validation" / f"sa_{index}.json").unlink()
    with pytest.raises(SourceError, match="1 of 1 images with masks are held out"):
        _check(_recipe(sam, parts, evaluate=MASKS))


@pytest.mark.parametrize("broken", ["train/sa_3.jpg", "validation/sa_1.json"])
def test_strict_looks_at_all_files(sam, tmp_path, broken):
    parts = write_parts(tmp_path / "s", 10, 4)
    (parts / broken).write_bytes(b"broken")
    _check(_recipe(sam, parts, samples=2))
    with pytest.raises(SourceError, match=broken.split("/")[1]) as found:
        _check(_recipe(sam, parts, samples=2, calibration={"strict": True}))
    assert "calibration.strict" in str(found.value.hint)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "holds no images"),
        (lambda path: path.write_text("x"), "neither a folder nor a .tar"),
        (lambda path: None, "no such file or folder"),
    ],
)
def test_a_wrong_place_is_refused_before_a_byte_is_written(sam, tmp_path, make, message):
    make(tmp_path / "images")
    with pytest.raises(SourceError, match=message):
        pipeline.run(_recipe(sam, tmp_path / "images"), work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_without_torch(sam, tmp_path):
    """Looking at images and masks needs none, so a wrong recipe is answered at once."""
    place = write_tar(write_scenes(tmp_path / "s", 20), tmp_path / "s.tar")
    recipe = _recipe(sam, place, evaluate=MASKS, calibration={"strict": True})
    program = (
        "import sys, json\n"
        "from compress.models.checkpoint import locate\n"
        "from compress.preflight import check_stages\n"
        "from compress.recipes.loader import load_recipe\n"
        "loaded = load_recipe(json.loads(sys.argv[1]))\n"
        "check_stages(loaded, locate(loaded.recipe.model, weights=False))\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(recipe)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_images_are_looked_at_before_the_first_stage(sam, tmp_path):
    """Counts were enough, but files cannot be read: refused at the start, with what is wrong."""
    parts = write_parts(tmp_path / "s", 6, 4)
    recipe = load_recipe(_recipe(sam, parts, samples=4, evaluate=MASKS)).recipe
    model = open_model(recipe.model, progress=SilentProgress())
    pools = images_of(model, recipe).pools
    assert pools is not None and len(pools.train.order) == 6
    for name in ("sa_0", "sa_1", "sa_2"):
        (parts / "validation" / f"{name}.json").write_text("{")
    with pytest.raises(SourceError, match="1 images are held out for measuring; 3 cannot be read; 2 are"):
        images_of(model, recipe)
    for name in ("sa_0", "sa_1", "sa_2"):
        (parts / "validation" / f"{name}.json").write_text('{"annotations": []}')
    with pytest.raises(SourceError, match="1 images with masks are held out for measuring; 2 are asked for"):
        images_of(model, recipe)
    for index in range(3):
        (parts / "train" / f"sa_{index}.jpg").write_bytes(b"broken")
    with pytest.raises(SourceError, match="3 images may be calibrated on; 3 cannot be read; 4 are asked for"):
        images_of(model, recipe)


def test_preprocessing_that_does_not_fit_is_refused_at_the_start(sam, tmp_path):
    other = shutil.copytree(sam, tmp_path / "sam")
    values = json.loads((other / "preprocessor_config.json").read_text())
    values["pad_size"] = {"height": 80, "width": 80}
    (other / "preprocessor_config.json").write_text(json.dumps(values))
    recipe = load_recipe(_recipe(other, write_scenes(tmp_path / "s", 10))).recipe
    with pytest.raises(SourceError, match=r"prepares images \[3, 80, 80\], the model takes \[3, 64, 64\]"):
        images_of(open_model(recipe.model, progress=SilentProgress()), recipe)
