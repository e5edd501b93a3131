"""The picture of masks, and what the card says of them: readable, and the same bytes each time."""

import copy

import numpy as np
import pytest
from compress.evaluation.evaluator import Evaluation
from compress.evaluation.mask_examples import LONGEST_SIDE, example
from compress.exporters.card import render_card
from compress.exporters.drawing import BLUE, ORANGE, plain_defaults
from compress.exporters.figures import MASKS, figures_in, write_figures
from compress.exporters.figures_masks import draw_masks
from PIL import Image

DETAILS = {
    "held_out": 40, "skipped": 1, "copies": 2, "seed": 7,
    "fidelity": {
        "samples": 6, "points": 4, "prompts": 24, "good_iou": 0.9, "good": 0.75,
        "worst": [{"image": "a.jpg", "mean": 0.5, "lowest": 0.25}],
    },
    "quality": {
        "samples": 8, "masks": 12,
        "sizes": [
            {"size": "small", "from_share": 0.0, "to_share": 0.01, "masks": 5, "original": 0.5,
             "result": 0.25},
            {"size": "large", "from_share": 0.1, "to_share": 1.0, "masks": 7, "original": 1.0,
             "result": 0.75},
        ],
    },
}  # fmt: skip
METRICS = {
    "bytes": 18000, "size_ratio": 0.45, "bits_per_weight": 16.0, "parameters": 9000, "macs": 500_000,
    "sqnr_db": 9.5, "mask_agreement": 0.91234, "miou": 0.7, "miou_original": 0.75, "miou_drop": 0.05,
}  # fmt: skip


def _example(height=48, width=64, truth=True):
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 4 % 256, columns * 4 % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)
    original = (rows < height // 2) & (columns < width // 2)
    result = (rows < height // 2) & (columns < width // 4)
    return example(
        "a.jpg", image, (10.0, 5.0), (original, result, original if truth else None),
        (0.5, 1.0 if truth else None, 0.5 if truth else None),
    )  # fmt: skip


def _picture(folder, examples):
    evaluation = Evaluation(masks=tuple(examples))
    document = {"evaluation": {"metrics": {}}}
    assert write_figures(folder, evaluation, document) == [MASKS] == figures_in(folder)
    return folder / MASKS


@pytest.mark.parametrize(
    ("count", "height", "width", "truth"),
    [(1, 48, 64, True), (3, 64, 32, False), (6, 300, 900, True), (6, 2, 3, False)],
)
def test_it_is_drawn_whatever_the_images_are(tmp_path, count, height, width, truth):
    path = _picture(tmp_path, [_example(height, width, truth)] * count)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.info.keys() <= {"dpi"}
        assert 400 < picture.width < 1500 and 250 < picture.height < 1300


def test_equal_examples_give_equal_bytes(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        _picture(folder, [_example(), _example(64, 40)])
    assert (first / MASKS).read_bytes() == (second / MASKS).read_bytes()


def test_every_row_says_what_it_is_and_how_it_fits():
    with plain_defaults():
        figure = draw_masks([_example(), _example(truth=False)], "slim")
    axes = np.array(figure.axes).reshape(4, 2)
    assert [row[0].get_ylabel() for row in axes] == ["image", "original", "slim", "true mask"]
    assert [one.get_xlabel() for one in axes[1]] == ["IoU 1.00 with the truth", ""]
    assert [one.get_xlabel() for one in axes[2]] == [
        "IoU 0.50 with original\nIoU 0.50 with the truth", "IoU 0.50 with original\n"
    ]  # fmt: skip
    for one in axes.ravel():
        (marker,) = one.get_lines()
        assert (marker.get_xdata(), marker.get_ydata()) == ([10.0], [5.0])
    with plain_defaults():
        assert len(draw_masks([_example(truth=False)], "slim").axes) == 3


def _colours(axes):
    return axes.get_images()[0].get_array()


def _rgb(colour):
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def test_masks_lie_where_they_are_and_the_original_s_edge_on_the_result():
    shown = _example()
    with plain_defaults():
        figure = draw_masks([shown], "slim")
    image, original, result, _ = (_colours(axes) for axes in figure.axes)
    assert (image == shown.image).all()
    assert original.shape == (48 * 5, 64 * 5, 3), "enlarged, so that edges are thin"
    assert original[0, 25].tolist() == _rgb(BLUE) and result[100, 79].tolist() == _rgb(ORANGE)
    assert result[50, 159].tolist() == _rgb(BLUE), "the edge of the original's mask"
    outside, inside = original[200, 250], original[60, 60]
    assert outside[0] == outside[1] == outside[2] >= 140, "pale and grey"
    assert inside[2] > inside[0], "blue"
    assert result[60, 40][0] > result[60, 40][2], "orange"
    edges = {tuple(axes.get_images()[0].get_extent()) for axes in figure.axes}
    assert edges == {(-0.5, 63.5, 47.5, -0.5)}, "the point is in pixels of the image"


def test_an_example_is_not_larger_than_a_picture_needs():
    found = _example(3 * LONGEST_SIDE, 2 * LONGEST_SIDE)
    assert found.image.shape == (LONGEST_SIDE, round(LONGEST_SIDE * 2 / 3), 3)
    assert found.original.shape == found.result.shape == found.image.shape[:2]
    assert found.point == pytest.approx((10 / 3, 5 / 3), rel=0.01)
    assert found.original.mean() == pytest.approx(0.25, abs=0.01)
    assert _example().image.shape == (48, 64, 3), "smaller ones stay as they are"


@pytest.fixture
def segmented(document):
    found = copy.deepcopy(document)
    found["model"] |= {"class": "SamModel", "family": "sam"}
    found["evaluation"] = {"metrics": METRICS, "linears": [], "segmentation": DETAILS}
    return found


def test_the_card_tells_agreement_and_fit(segmented):
    card = render_card(segmented, [MASKS], recipe_text="model: a")
    assert f"]({MASKS})" in card and card.index(f"]({MASKS})") < card.index("| bits per parameter")
    assert "| SQNR of the embedding of an image |  | 9.50 dB |" in card
    assert "| masks held against the original's at random points, mean IoU | 1 | 0.9123 |" in card
    assert "| masks held against true ones, a point each, mean IoU | 0.7500 | 0.7000 |" in card
    assert "chosen with seed 7 from 40 that were neither calibrated nor trained on" in card
    assert "24 random points in 6 images; 75.0% of the masks have an IoU of at least 0.9" in card
    assert "True masks: 12 in 8 images" in card and "cannot be read: 1" in card
    assert "| small, 0% to 1% of the image | 5 | 0.5000 | 0.2500 |" in card
    assert "denoiser" not in card


def test_the_card_tells_the_time_of_the_encoder_too(segmented):
    times = {"original_seconds": 0.2, "seconds": 0.1, "speedup": 2.0}
    speed = {"batch_size": 1, "rounds": 7, "on": "a machine", "threads": 1, **times}
    segmented["evaluation"]["speed"] = {**speed, "encoder": {**times, "seconds": 0.05, "speedup": 4.0}}
    card = render_card(segmented, [], recipe_text="model: a")
    assert "| one forward of 1, shortest of 7, milliseconds | 200 | 100 (2.00 times as fast) |" in card
    assert "| one forward of the image encoder of 1, shortest of 7, milliseconds | 200 | 50 (4.00" in card
