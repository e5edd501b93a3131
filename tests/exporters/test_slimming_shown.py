"""Pictures and account of slimming: everything from the report, in the numbers that the stage gave."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
from compress.evaluation.evaluator import Evaluation
from compress.exporters.card import render_card
from compress.exporters.drawing import BLUE, ORANGE, plain_defaults
from compress.exporters.figures import SLIMMING, WIDTHS, figures_in, made_of, write_figures
from compress.exporters.figures_slimming import draw_phases, draw_slim_widths
from compress.exporters.formats import write
from compress.exporters.slimming_table import choice_told, course, differs, slimmings, training_told
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from matplotlib.colors import to_hex
from PIL import Image

from ..slimmed import slimmed_details
from ..tiny_sam import pictures, save_tiny_sam

STOCK = ["compress.load(path)", "transformers.SamModel.from_pretrained(path)"]
OURS = ["compress.load(path)", "import compress; transformers.SamModel.from_pretrained(path)"]
HEADING = "## How it was slimmed\n"


@pytest.fixture
def slimmed(document):
    """Return `slimmed(**details)` -> a report of a model that was slimmed."""

    def build(**changes):
        found, details = copy.deepcopy(document), slimmed_details(**changes)
        found["stages"] = [{**found["stages"][0], "method": "slimsam", "details": details}]
        found["model"] |= {"id": "facebook/sam-vit-base", "class": "SamModel", "family": "sam"}
        found["export"]["loads_with"] = STOCK if details["ranking"] == "uniform" else OURS
        found["evaluation"] = {
            "linears": [],
            "metrics": {"bytes": 111_900_000, "size_ratio": 0.2984, "bits_per_weight": 32.0, "sqnr_db": 12.5,
                        "parameters": 27_962_032, "macs": 154_046_024_192, "mask_agreement": 0.91},
            "segmentation": {"held_out": 500, "skipped": 0, "copies": 0, "seed": 1, "quality": None,
                             "fidelity": {"samples": 16, "points": 4, "prompts": 64, "good_iou": 0.9,
                                          "good": 0.8, "worst": []}},
        }  # fmt: skip
        return found

    return build


def _section(document):
    text = render_card(document, [], "").split(HEADING)[1].split("\n## ")[0]
    return " ".join(line if line.startswith("|") else line + " " for line in text.splitlines())


def _flat(document):
    return " ".join(_section(document).split())


def test_widths_and_cost_stand_in_both_conventions(slimmed):
    text = _flat(slimmed())
    for row in (
        "| residual stream | 1 | 768 | 384 | 50.0% |",
        "| channels of a head, 12 heads | 12 | 64 | 32 | 50.0% |",
        "| feed-forward | 12 | 3,072 | 1,536 | 50.0% |",
        "| parameters | 93,735,728 | 27,962,032 | 29.8% |",
        "| parameters of the image encoder | 89,670,912 | 23,897,216 | 26.6% |",
        "| multiply-accumulates of the image encoder | 483,585,097,728 | 152,233,672,704 | 31.5% |",
        "| the same without attention products, as the paper counts | 368,704,487,424 | 94,793,367,552 |",
    ):
        assert row in text
    assert "The paper's table leaves them out, and then more seems to be saved than is." in text


def test_every_phase_is_a_row_with_its_error_and_miou(slimmed):
    text = _flat(slimmed())
    assert "| after | error of the encoder's output | mIoU with true masks |" in text
    for row in (
        "| original | 0 | 0.7301 |", "| embedding pruning | 0.0421 | 0.4100 |",
        "| embedding aligning | 0.00312 | 0.7050 |", "| bottleneck pruning | 0.0119 | 0.6220 |",
        "| bottleneck aligning | 0.00287 | 0.7123 |",
    ):  # fmt: skip
        assert row in text
    assert "best by the mIoU of 312 masks of 50 images, which were neither scored nor trained on" in text
    assert "9,950 images were trained on, without labels or masks" in text
    assert (
        "- embedding aligning: 1,000 steps of 4 (20 epochs); the weights of step 950 were the best." in text
    )
    assert "- bottleneck aligning: 1,000 steps of 4 (20 epochs); the last weights were the best." in text


def test_without_masks_the_error_chose(slimmed):
    text = _flat(slimmed(masks=False))
    assert "| after | error of the encoder's output |" in text and "mIoU" not in text
    assert "best by the output error of 50 images" in text


def test_what_follows_the_paper_and_what_the_official_code_is_told(slimmed):
    text = _flat(slimmed())
    assert (
        "First the residual stream was pruned and aligned" in text and "inner features were aligned" in text
    )
    assert "the size of weight times summed gradient" in text and "deviation 0.01), on 1,000 images" in text
    assert "Channels competed within their layer" in text and "keep the columns" in text
    assert "official code" not in text and "`slimming.json` beside the weights" in text
    document = slimmed()
    document["stages"][0]["details"] |= {
        "rel_pos": "zero", "attn_scale": "reset", "features": False, "gradients": "per_image"
    }  # fmt: skip
    text = _flat(document)
    assert "started again from zero, as in the official code" in text and "outputs alone were aligned" in text
    assert "follows the size of the heads, as in the official code" in text
    assert "the sum over images of the size of weight times gradient" in text


def test_one_step_is_told_as_a_baseline(slimmed):
    document = slimmed()
    details = document["stages"][0]["details"]
    details |= {"slimming": "one_step", "phases": details["phases"][:2]}
    assert "pruned at once, and what was left was aligned" in _flat(document)


def test_a_global_ranking_says_that_it_needs_compress(slimmed):
    text = _flat(slimmed(uniform=False))
    assert "| channels of a head, 12 heads | 12 | 64 | 20 to 42 | 48.4% |" in text
    assert "the scores of each layer were moved by their mean and divided by their deviation." in text
    assert "it needs compress to be loaded" in text
    assert "it needs compress to be loaded" not in _flat(slimmed())


def test_what_takes_its_time_as_before_is_told(slimmed):
    card = render_card(slimmed(), [], "")
    assert "narrower, but compare as many tokens" in card and "run as in the" not in card


def test_speed_is_held_against_the_model_that_was_slimmed(slimmed):
    document = slimmed()
    assert "SAM-H" not in _flat(document)
    document["evaluation"]["speed"] = {
        "batch_size": 1, "rounds": 7, "threads": 2, "on": "cpu",
        "original_seconds": 17.2, "seconds": 8.6, "speedup": 2.0,
        "encoder": {"original_seconds": 17.0, "seconds": 8.5, "speedup": 2.0},
    }  # fmt: skip
    assert "Speed is held against `sam-vit-base`, which this was made from." in _flat(document)


def test_nothing_on_the_card_differs_between_equal_runs(slimmed):
    first, second = slimmed(), slimmed()
    for phase in second["stages"][0]["details"]["phases"]:
        phase |= {"seconds": 99.0, "resumed_at": 500}
    assert render_card(first, [], "") == render_card(second, [], "")


def test_other_stages_are_none(document):
    assert slimmings(document) == [] and HEADING not in render_card(document, [], "")
    for details in ({"phases": 3, "widths": {}}, {"phases": [], "widths": []}, {"phases": []}, None):
        assert slimmings({"stages": [{"method": "other", "details": details}]}) == []


def test_bars_are_the_errors_and_the_course_marks_what_stayed():
    details = slimmed_details()
    with plain_defaults():
        figure = draw_phases(details)
    above, below = figure.axes
    assert [bar.get_height() for bar in above.patches] == [0.0421, 0.00312, 0.0119, 0.00287]
    assert [to_hex(bar.get_facecolor()) for bar in above.patches] == [ORANGE, BLUE, ORANGE, BLUE]
    assert [text.get_text() for text in above.texts][1] == "0.00312\nmIoU 0.705"
    assert below.get_ylabel() == "mIoU"
    first = next(line for line in below.lines if line.get_label() == "embedding aligning")
    second = next(line for line in below.lines if line.get_label() == "bottleneck aligning")
    assert (first.get_xdata()[0], first.get_ydata()[0]) == (0, 0.41)  # as the pruning left it
    assert (second.get_xdata()[0], second.get_ydata()[0]) == (1000, 0.622)
    assert second.get_xdata()[-1] == 2000
    marks = [
        line.get_xdata()[0] for line in below.lines if line.get_markersize() == 7 and len(line.get_xdata())
    ]
    assert marks == [950, 2000]


def test_the_course_is_of_what_chose():
    details = slimmed_details(masks=False)
    name, points, best = next(course(details))
    assert (name, points[0], best) == ("embedding aligning", (0, 0.0421), 19)
    with plain_defaults():
        assert draw_phases(details).axes[1].get_ylabel() == "mean square error\nof the output"


def test_widths_are_drawn_where_layers_differ(tmp_path, slimmed):
    assert not differs(slimmed_details()) and differs(slimmed_details(uniform=False))
    with plain_defaults():
        figure = draw_slim_widths(slimmed_details(uniform=False))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["channels of a head", "feed-forward"]
    after = next(bars for bars in figure.axes[0].containers if bars.get_label() == "after")
    assert [bar.get_height() for bar in after] == list(range(20, 44, 2))
    assert write_figures(tmp_path, Evaluation(), slimmed()) == [SLIMMING]
    assert write_figures(tmp_path, Evaluation(), slimmed(uniform=False)) == [SLIMMING, WIDTHS]
    assert figures_in(tmp_path) == [SLIMMING, WIDTHS] and Image.open(tmp_path / SLIMMING).width > 600
    again = tmp_path / "again"
    again.mkdir()
    write_figures(again, Evaluation(), slimmed(uniform=False))
    assert all((again / name).read_bytes() == (tmp_path / name).read_bytes() for name in (SLIMMING, WIDTHS))


@pytest.mark.parametrize("changes", [{}, {"masks": False}, {"layers": 32, "uniform": False}], ids=str)
def test_nothing_overlaps_or_is_cut_off(changes):
    details = slimmed_details(**changes)
    with plain_defaults():
        figure = draw_phases(details)
        figure.draw_without_rendering()
    above = figure.axes[0]
    boxes = [text.get_window_extent() for text in above.texts]
    boxes += [label.get_window_extent() for label in above.get_xticklabels()]
    for place, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
    assert max(box.y1 for box in boxes) <= above.get_window_extent().y1
    title = figure._suptitle.get_window_extent()
    assert title.x1 <= figure.bbox.width and title.y0 >= above.get_window_extent().y1


def test_words_count_by_themselves():
    assert choice_told({"by": "output_error", "images": 1, "masks": None}) == "the output error of 1 image"
    assert training_told({"steps": 7, "epochs": 1.0, "batch_size": 2, "best_step": 7}) == (
        "7 steps of 2 (1 epoch); the last weights were the best"
    )
    assert training_told({"steps": 7, "epochs": 2.5, "batch_size": 2, "best_step": 0}) == (
        "7 steps of 2 (2.5 epochs); nothing was better than the weights from before"
    )


def test_weights_from_before_may_stay():
    details = slimmed_details()
    phase = details["phases"][1]
    phase |= {"best_step": 0, "choice_values": [[0, 0.41, 1e-4], *phase["choice_values"]]}
    name, points, best = next(course(details))
    assert (points[0], best, len(points)) == ((0, 0.41), 0, 21)
    with plain_defaults():
        draw_phases(details)


def test_names_and_metadata(slimmed):
    document = slimmed()
    card = render_card(document, [SLIMMING], "")
    assert made_of(document) == "slimmed"
    assert "pipeline_tag: mask-generation" in card and "- slimsam" in card
    assert f"]({SLIMMING})" in card
    assert "fine-tuning required" not in card


@pytest.mark.slow
def test_the_code_for_masks_runs_as_it_stands(slimmed, tmp_path):
    source = save_tiny_sam(tmp_path / "sam")
    model = open_model(ModelRef(id=str(source)), progress=SilentProgress())
    folder = tmp_path / "out" / "dit-w4a8"
    folder.mkdir(parents=True)
    write(model, folder, "compress")
    name = "preprocessor_config.json"
    (folder / name).write_bytes((source / name).read_bytes())
    Image.fromarray(pictures(1, 300, 400)[0]).save(tmp_path / "photo.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```$", render_card(slimmed(), [], ""), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3 and "post_process_masks" in blocks[2]
    code = blocks[1] + blocks[2] + "\nimport json\nprint(json.dumps([len(masks), list(masks[0].shape)]))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [1, [1, 3, 300, 400]]
