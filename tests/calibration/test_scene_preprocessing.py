"""Preprocessing of images to segment is the checkpoint's own: held against the library, worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compress.calibration.scene_preprocessing import preprocessor_in, scene_preprocessor_for
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from PIL import Image

from ..tiny_sam import save_tiny_sam
from ..tiny_scenes import drawn

FILE = "preprocessor_config.json"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIDE = 64


@pytest.fixture
def folder(tmp_path):
    return save_tiny_sam(tmp_path / "sam")


def _write(folder, **values):
    (folder / FILE).write_text(json.dumps({**json.loads((folder / FILE).read_text()), **values}))


def test_the_longer_side_by_hand(folder):
    """100 x 75 pixels become 64 x 48, normalized; below is zero."""
    image = drawn(1, height=75, width=100)[0][0]
    found = preprocessor_in(folder, SIDE, "sam")(image)
    small = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR), dtype=np.float64)
    wanted = ((small / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert found.pixels.shape == (3, 64, 64) and found.pixels.dtype == torch.float32
    assert np.abs(found.pixels[:, :48].numpy() - wanted).max() < 1e-5
    assert not found.pixels[:, 48:].any() and found.size == (75, 100) and found.resized == (48, 64)
    assert found.points(torch.tensor([[50.0, 75.0]])).tolist() == [[32.0, 48.0]]


@pytest.mark.parametrize("size", [(48, 64), (75, 100), (91, 33), (200, 7)])
def test_as_the_library(folder, size):
    from transformers import SamImageProcessorPil

    image = drawn(1, *size)[0][0]
    wanted = SamImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
    found = preprocessor_in(folder, SIDE, "sam")(image)
    assert torch.equal(found.pixels, wanted["pixel_values"][0])
    assert [list(found.resized)] == wanted["reshaped_input_sizes"].tolist()


def test_values_may_stand_in_the_file_of_the_whole_processor(folder):
    """As newer versions of the library write them; that file goes first."""
    values = json.loads((folder / FILE).read_text())
    before = preprocessor_in(folder, SIDE, "sam")
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "SamProcessor"}))
    assert preprocessor_in(folder, SIDE, "sam").key == before.key
    nested = {"image_processor": {**values, "image_mean": [0.0, 0.0, 0.0]}, "processor_class": "SamProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    found = preprocessor_in(folder, SIDE, "sam")
    assert found.key != before.key and "processor_config.json" in found.source
    (folder / FILE).unlink()
    assert preprocessor_in(folder, SIDE, "sam").key == found.key


def test_of_a_checkpoint_and_without_a_file(folder):
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    image = drawn(1)[0][0]
    known = scene_preprocessor_for(model)
    assert known.note == "" and known.side == SIDE
    (folder / FILE).unlink()
    usual = scene_preprocessor_for(model)
    assert FILE in usual.note and "64 pixels" in usual.note
    assert torch.equal(usual(image).pixels, known(image).pixels)


def test_the_key_follows_what_is_done(folder):
    keys = {preprocessor_in(folder, SIDE, "sam").key for _ in range(2)}
    for values in ({"image_std": [0.5, 0.5, 0.5]}, {"resample": 3}, {"do_normalize": False}):
        _write(folder, **values)
        keys.add(preprocessor_in(folder, SIDE, "sam").key)
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"longest_edge": 10**9}}, "size.longest_edge is 1000000000, not a side of 1 to 4096"),
        ({"size": {"longest_edge": True}}, "size.longest_edge is True"),
        ({"size": {"height": 64, "width": 64}}, "needed: {'longest_edge': 64}"),
        ({"size": 64}, "size is 64"),
        ({"pad_size": {"height": 4097, "width": 64}}, "pad_size.height is 4097"),
        ({"pad_size": {"height": 64}}, "pad_size is"),
        ({"pad_size": {"height": 64.0, "width": 64}}, "pad_size.height is 64.0"),
        ({"image_std": [0.1, 0.0, 0.1]}, "each must be above 0"),
        ({"image_std": [0.1, 0.1]}, "not 3 numbers"),
        ({"image_mean": [0.1, 1e999, 0.1]}, "not a finite number"),
        ({"image_mean": ["x", 0.1, 0.1]}, "not a finite number"),
        ({"rescale_factor": 0}, "rescale_factor is 0, not above 0"),
        ({"rescale_factor": 1e9}, "not above 0 and at most"),
        ({"resample": 9}, "resample is 9"),
        ({"do_pad": "yes"}, "do_pad is 'yes'"),
        ({"do_center_crop": True}, "do_center_crop is not supported"),
        ({"do_pad": False}, r"prepares images \[3, 48, 64\], the model takes \[3, 64, 64\]"),
        ({"pad_size": {"height": 80, "width": 80}}, r"prepares images \[3, 80, 80\]"),
        ({"size": {"longest_edge": 80}}, "prepare"),
        ({"image_std": [1e-300, 1e-300, 1e-300]}, "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_settings_that_are_refused(folder, values, message):
    _write(folder, **values)
    with pytest.raises(SourceError, match=message) as found:
        preprocessor_in(folder, SIDE, "sam")(drawn(1)[0][0])
    assert FILE in str(found.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"size": 1, "size": 2}', " " * (2**20 + 1)])
def test_a_file_that_is_no_object_is_refused(folder, text):
    (folder / FILE).write_text(text)
    with pytest.raises(SourceError, match=r"preprocessor_config\.json"):
        preprocessor_in(folder, SIDE, "sam")
