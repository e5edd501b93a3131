"""Preprocessing is the checkpoint's own: held against the library and, by hand, against Pillow."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compress.calibration.decoding import decode
from compress.calibration.preprocessing import preprocessor_for
from compress.errors import SourceError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from PIL import Image

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
COMMON = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}


def _open(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def _write(folder, **values):
    (folder / "preprocessor_config.json").write_text(json.dumps({**COMMON, **values}))


def _normalized(image):
    pixels = np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255
    return (pixels - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]


@pytest.fixture
def photograph(shared_data):
    return shared_data / "data" / "images" / "chelsea.png"


@pytest.mark.parametrize("kind", [{}, {"feature_extractor_type": "ViTFeatureExtractor"}])
def test_resizing_to_a_size_by_hand(make_vit, photograph, kind):
    """As published checkpoints of ViT and Swin say it: a number, and an older name of the kind or none."""
    folder = make_vit()
    _write(folder, do_resize=True, size=16, resample=2, **kind)
    found = preprocessor_for(_open(folder))([decode(photograph, 3)])
    wanted = _normalized(Image.open(photograph).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    assert found.shape == (1, 3, 16, 16) and found.dtype == torch.float32
    assert np.abs(found[0].numpy() - wanted).max() < 1e-5


def test_a_short_side_and_a_centre_by_hand(make_vit, photograph):
    """As DeiT: 451 x 300 becomes 27 x 18 (short side 18), of which the middle 16 x 16 stays."""
    folder = make_vit("DeiTForImageClassification")
    _write(
        folder, image_processor_type="DeiTImageProcessor", do_resize=True, size={"shortest_edge": 18},
        resample=3, do_center_crop=True, crop_size={"height": 16, "width": 16},
    )  # fmt: skip
    found = preprocessor_for(_open(folder))([decode(photograph, 3)])
    resized = Image.open(photograph).convert("RGB").resize((27, 18), Image.Resampling.BICUBIC)
    left, top = (27 - 16) // 2, (18 - 16) // 2
    wanted = _normalized(resized.crop((left, top, left + 16, top + 16)))
    assert np.abs(found[0].numpy() - wanted).max() < 1e-5


def test_convnexts_share_of_the_picture_by_hand(make_vit, photograph):
    folder = make_vit("ConvNextForImageClassification")
    _write(
        folder, image_processor_type="ConvNextImageProcessor", do_resize=True, size={"shortest_edge": 32},
        crop_pct=0.875, resample=3,
    )  # fmt: skip
    found = preprocessor_for(_open(folder))([decode(photograph, 3)])
    width = int(36 * 451 / 300)
    resized = Image.open(photograph).convert("RGB").resize((width, 36), Image.Resampling.BICUBIC)
    left = (width - 32) // 2
    wanted = _normalized(resized.crop((left, 2, left + 32, 34)))
    assert found.shape == (1, 3, 32, 32) and np.abs(found[0].numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "SwinForImageClassification"])
def test_a_checkpoint_without_preprocessing_gets_its_own_size(make_vit, class_name):
    model = _open(make_vit(class_name))
    prepare = preprocessor_for(model)
    side = model.config["image_size"]
    image = np.zeros((3, 20, 30), dtype=np.uint8)
    image[1:] = 255
    found = prepare([image])
    assert found.shape == (1, 3, side, side)
    assert torch.all(found[:, 0] == -1) and torch.all(found[:, 1:] == 1)
    assert f"{side}x{side}" in prepare.note and "preprocessor_config.json" in prepare.note


def test_one_channel(make_vit):
    folder = make_vit(num_channels=1)
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    found = preprocessor_for(_open(folder))([grey, grey])
    assert found.shape == (2, 1, 16, 16)
    assert torch.allclose(found[0, 0].flatten(), torch.arange(256) / 127.5 - 1, atol=1e-6)


def test_the_key_follows_what_is_done(make_vit):
    folder = make_vit()
    keys = {preprocessor_for(_open(folder)).key}
    for side in (16, 16, 17):
        _write(folder, image_processor_type="ViTImageProcessor", size={"height": side, "width": side})
        keys.add(preprocessor_for(_open(folder)).key)
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 10**9, "width": 16}}, "size.height is 1000000000, not a side"),
        ({"size": 0}, "size is 0"),
        ({"size": {"shortest_edge": 16.5}}, "size.shortest_edge is 16.5"),
        ({"crop_size": {"height": True, "width": 16}}, "crop_size.height is True"),
        ({"crop_pct": 1e-9}, "crop_pct is 1e-09"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"image_processor_type": "NoSuchProcessor"}, "cannot be used"),
        (
            {"size": {"height": 24, "width": 24}},
            r"prepares images \[3, 24, 24\], the model takes \[3, 16, 16\]",
        ),
        ({"size": 16, "image_mean": [0.5], "image_std": [0.0, 1.0]}, "cannot prepare the images"),
        ({"size": 16, "image_std": [0.0, 1.0, 1.0]}, "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_settings_that_are_refused(make_vit, values, message):
    folder = make_vit()
    _write(folder, **{"image_processor_type": "ViTImageProcessor", "do_resize": True, **values})
    with pytest.raises(SourceError, match=message):
        preprocessor_for(_open(folder))([np.zeros((3, 20, 20), dtype=np.uint8)])


@pytest.mark.parametrize("text", ["{", "[]", '{"size": 1, "size": 2}'])
def test_a_file_that_is_no_object_is_refused(make_vit, text):
    folder = make_vit()
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(SourceError, match=r"preprocessor_config\.json"):
        preprocessor_for(_open(folder))
