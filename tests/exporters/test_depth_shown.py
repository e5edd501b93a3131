"""Pictures and account of depth pruning: everything from the report, in the numbers that the stage gave."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compress.evaluation.evaluator import Evaluation
from compress.exporters.card import render_card
from compress.exporters.depth_table import blocks_of, groups_told, least_confidence, removals
from compress.exporters.drawing import plain_defaults
from compress.exporters.figures import (
    CHOICES,
    KEPT,
    TRAINING,
    draw_layers,
    draw_samples,
    made_of,
    write_figures,
)
from compress.exporters.figures_depth import draw_choices, draw_kept
from matplotlib.colors import to_hex
from PIL import Image

BLUE = "#2f6db3"
LIST = "transformer_blocks"


def learned(groups=4, size=2, notes=10):
    """What a search tells of groups of which the first block stays, the last group settled in the end."""
    choices = [
        {"blocks": LIST, "of": [size * g + i for i in range(size)], "kept": [size * g],
         "confidence": round(0.99 - 0.02 * g, 4)}
        for g in range(groups)
    ]  # fmt: skip
    decisions = [
        [10 * (note + 1), [0] * (groups - 1) + [1 if note < 3 else 0], [0.5 + 0.04 * note] * groups]
        for note in range(notes)
    ]
    return {
        "groups": f"1:{size}", "mode": "lora", "learned": 4096, "data": 1000, "choices": choices,
        "decisions": decisions,
        "blocks": {LIST: {"of": groups * size, "kept": [size * g for g in range(groups)]}},
        "search": {"steps": 10 * notes, "loss": [[10 * (i + 1), 0.5 - 0.01 * i] for i in range(notes)]},
    }  # fmt: skip


@pytest.fixture
def shallow(document, training_details):
    """A report of a denoiser that lost half of its blocks and was trained."""
    found = copy.deepcopy(document)
    sizes = {"before": {"parameters": 20000, "macs": 1000}, "after": {"parameters": 12000, "macs": 500}}
    measured = {"class_agreement": 0.25, "class_agreement_original": 0.93, "fid": 60.5, "fid_original": 3.4,
                "psnr_db": 12.5, "sqnr_db": 5.25, "ssim": 0.1}  # fmt: skip
    stage = {**found["stages"][0], **sizes}
    found["stages"] = [
        {**stage, "method": "tinyfusion", "details": {**learned(), "measured": measured}},
        {**stage, "method": "distill", "details": {**training_details, "data": 1000}},
    ]
    found["evaluation"]["linears"] = [
        {**row, "method": None, "weight_bits": 16} for row in document["evaluation"]["linears"]
    ]
    return found


def section_of(document):
    return render_card(document, [], "").split("## What was removed\n")[1].split("\n## ")[0]


def cells(axes):
    """Return place -> colour of the squares of a strip."""
    squares = [to_hex(patch.get_facecolor()) for patch in axes.patches]
    return dict(zip([int(text.get_text()) for text in axes.texts], squares, strict=True))


def test_a_strip_has_a_square_for_every_block_and_marks_those_that_stay():
    with plain_defaults():
        figure = draw_kept(learned(14))
    (axes,) = figure.axes
    found = cells(axes)
    assert list(found) == list(range(28))
    assert [place for place, colour in found.items() if colour == BLUE] == list(range(0, 28, 2))
    assert figure.get_suptitle() == "Blocks that stay: 14 of 28"


def test_lists_that_stay_whole_are_not_drawn_and_several_are_named():
    details = {
        "by": "indices",
        "blocks": {
            "transformer_blocks": {"of": 4, "kept": [0, 3]},
            "single_transformer_blocks": {"of": 40, "kept": [39]},
            "others": {"of": 2, "kept": [0, 1]},
        },
    }
    with plain_defaults():
        figure = draw_kept(details)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "transformer_blocks: 2 of 4",
        "single_transformer_blocks: 1 of 40",
    ]
    assert [place for place, colour in cells(figure.axes[1]).items() if colour == BLUE] == [39]
    assert figure.get_suptitle() == "Blocks that stay"


@pytest.mark.parametrize("again", [False, True])
def test_no_title_is_cut_off(again):
    details = {"blocks": {LIST: {"of": 4, "kept": [0]}, f"single_{LIST}": {"of": 4, "kept": [1]}}}
    with plain_defaults():
        figure = draw_kept(details, again=again)
        figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    texts = [figure._suptitle, *(axes._left_title for axes in figure.axes)]
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    assert (figure.get_suptitle() == "Blocks that stay\nof those that the stage before it left") == again


@pytest.mark.parametrize("notes", [1, 2, 3, 10])
def test_what_is_written_beside_a_search_keeps_clear_of_its_steps(notes):
    with plain_defaults():
        figure = draw_choices(learned(notes=notes))
        figure.draw_without_rendering()
    axes = figure.axes[0]
    (said,) = [text for text in axes.texts if "probability" in text.get_text()]
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    labels += axes.child_axes[0].get_yticklabels()
    assert not any(said.get_window_extent().overlaps(label.get_window_extent()) for label in labels)
    assert said.get_window_extent().x1 < figure.bbox.width
    title, legend = figure._suptitle.get_window_extent(), axes.get_legend()
    assert not title.overlaps(said.get_window_extent())
    assert legend is None or not title.overlaps(legend.get_window_extent())


def test_layers_are_drawn_only_where_something_differs(tmp_path, shallow):
    row = {"name": "transformer_blocks.0", "role": "block", "block": 0, "sqnr_db": 200.0}
    assert "layer_error.png" not in write_figures(
        tmp_path, Evaluation(details={"layers": [row] * 2}), shallow
    )
    rows = [row, {**row, "sqnr_db": 199.0}]
    assert "layer_error.png" in write_figures(tmp_path, Evaluation(details={"layers": rows}), shallow)


def test_layers_of_several_lists_are_told_apart():
    names = [f"{LIST}.0", f"{LIST}.1", f"single_{LIST}.0"]
    rows = [
        {"name": name, "role": "block", "block": place, "sqnr_db": 9.0} for place, name in enumerate(names)
    ]
    with plain_defaults():
        label = draw_layers(rows).axes[0].get_xlabel()
        assert label == f"block: {LIST} from 0, single_{LIST} from 2"
        assert draw_layers(rows[:2]).axes[0].get_xlabel() == "block"


def test_scores_of_a_rule_are_bars_in_the_colour_of_what_became_of_the_block():
    details = {
        "by": "shortgpt",
        "blocks": {LIST: {"of": 4, "kept": [0, 3]}},
        "scores": {LIST: [4.0, 1.0, 2.0, 3.0]},
    }
    with plain_defaults():
        (axes,) = draw_kept(details).axes
    bars = axes.containers[0]
    assert [bar.get_height() for bar in bars] == [4.0, 1.0, 2.0, 3.0]
    colours = [to_hex(bar.get_facecolor()) for bar in bars]
    assert colours[0] == colours[3] == BLUE
    assert colours[1] == colours[2] != BLUE


def test_a_search_is_drawn_with_its_confidences_and_where_a_choice_changed():
    details = learned()
    with plain_defaults():
        figure = draw_choices(details)
    axes = figure.axes[0]
    (mesh,) = axes.collections[:1]
    values = mesh.get_array().reshape(4, 10)
    assert values[2].tolist() == pytest.approx([note[2][2] for note in details["decisions"]])
    changes = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert changes == [[[30.0, 3.1], [30.0, 3.9]]], "the last group alone, after the third note"
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "blocks 2 to 3"
    (right,) = axes.child_axes
    assert [label.get_text() for label in right.get_yticklabels()][1] == "2 (0.97)"


def test_groups_without_a_choice_are_not_drawn_nor_counted():
    details = learned()
    details["choices"][3] |= {"kept": [6, 7], "confidence": 1.0}
    details["choices"][0]["confidence"] = 0.4
    with plain_defaults():
        figure = draw_choices(details)
    assert len(figure.axes[0].get_yticklabels()) == 3
    assert not figure.axes[0].get_lines()
    assert [row["of"] for row in groups_told(details)] == [[0, 1], [2, 3], [4, 5]]
    assert least_confidence(details) == 0.4
    assert least_confidence({"blocks": details["blocks"], "by": "oracle"}) is None


def test_pictures_are_written_with_the_others_and_again_byte_by_byte(tmp_path, shallow, document):
    evaluation = Evaluation(details={"linears": shallow["evaluation"]["linears"]})
    assert write_figures(tmp_path, evaluation, shallow) == [KEPT, CHOICES, TRAINING]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_figures(tmp_path, Evaluation(), json.loads(json.dumps(shallow)))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == first[path.name]
        with Image.open(path) as picture:
            assert 400 < picture.width < 1500
    assert made_of(shallow) == "pruned\ntrained"
    assert removals(document) == []


def test_later_stages_have_pictures_of_their_own(tmp_path, shallow):
    by_rule = {"by": "oracle", "blocks": {LIST: {"of": 4, "kept": [0, 3]}}}
    shallow["stages"].insert(1, {**shallow["stages"][0], "method": "depth", "details": by_rule})
    written = write_figures(tmp_path, Evaluation(), shallow)
    assert written == [KEPT, "blocks_2.png", CHOICES, TRAINING]
    card = render_card(shallow, written, "")
    caption = (
        "Blocks that stay, counted from 0. Stage 2 of this kind. They are counted in the model before it."
    )
    assert f"![{caption}](blocks_2.png)" in card
    assert "Blocks are counted from 0, as in the model before this stage." in card
    assert f"| `{LIST}` | 8 | 2 | 0, 6 |" in card, "0 and 3 of 0, 2, 4, 6"


def test_samples_between_stages_stand_between_original_and_result():
    rows = [torch.full((2, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0)]
    names = ("original", "after tinyfusion", "compressed")
    evaluation = Evaluation(images=dict(zip(names, rows, strict=True)), labels=("a", "b"))
    with plain_defaults():
        figure = draw_samples(evaluation, "pruned")
    panels = [axes for axes in figure.axes if axes.images]
    assert [float(axes.images[0].get_array()[0, 0]) for axes in panels] == [0, 0, 0.5, 0.5, 1, 1]
    assert [axes.get_ylabel() for axes in panels[::2]] == ["original", "after\ntinyfusion", "pruned"]


def test_the_card_tells_blocks_groups_and_confidences(shallow):
    section = section_of(shallow)
    assert "`tinyfusion`: which blocks stay was learned" in section
    assert "The search took 100 steps on 1,000 latents" in section
    assert "low-rank changes of all linear layers learned beside the choice" in section
    assert f"| `{LIST}` | 8 | 4 | 0, 2, 4, 6 |" in section
    assert "| 4, 5 | 4 | 0.950 |" in section
    assert "not settled" not in section
    assert "| parameters | 20,000 | 12,000 | 60.0% |" in section
    assert "The blocks come from `builtin:dit`; `depth.json` beside the weights" in section
    shallow["stages"][0]["details"]["choices"][1]["confidence"] = 0.5
    assert "**1 of 4 choices are not settled**: they have less than 90%." in section_of(shallow)


def test_the_card_tells_what_was_measured_between_the_stages(shallow):
    section = section_of(shallow)
    rows = (
        "| original | 93.0% | 3.400 |  |  |",
        "| after `tinyfusion` | 25.0% | 60.500 | 12.50 | 5.25 |",
        "| this checkpoint | 92.0% | 3.900 | 30.00 | 21.50 |",
    )
    places = [section.index(row) for row in rows]
    assert places == sorted(places)
    assert "ine-tuning required" not in section
    assert "Between them, samples of the model as it was after" in render_card(shallow, ["samples.png"], "")
    del shallow["stages"][0]["details"]["measured"]
    assert "| original |" not in section_of(shallow)
    assert "Between them" not in render_card(shallow, ["samples.png"], "")


def test_two_stages_of_a_method_are_told_apart_in_the_card(shallow):
    again = copy.deepcopy(shallow["stages"][0])
    again["details"]["blocks"] = {LIST: {"of": 4, "kept": [0, 3]}}
    shallow["stages"].insert(1, again)
    section = section_of(shallow)
    assert "| after `tinyfusion` 1 |" in section and "| after `tinyfusion` 2 |" in section


def test_the_card_of_a_rule_says_which_one_and_that_training_is_missing(shallow):
    random = {"drawn": 100, "loss": 0.5, "least": 0.25, "largest": 2.0}
    stage = shallow["stages"][0]
    stage |= {"method": "depth", "details": {"by": "random", "blocks": stage["details"]["blocks"],
                                             "random": random}}  # fmt: skip
    del shallow["stages"][1]
    section = section_of(shallow)
    assert "By `depth`, rule `random`: one of many random choices, by its loss." in section
    assert "Of 100 choices, with losses from 0.25 to\n2, the one with 0.5 was taken." in section
    assert "Fine-tuning required" in section
    assert "probability" not in section
    (row,) = blocks_of(stage["details"])
    assert row.told == "4 of 8 blocks: 0, 2, 4, 6"


def test_what_is_said_of_speed_and_layers_fits_a_shallower_model(shallow):
    card = render_card(shallow, ["layer_error.png"], "")
    assert "Fewer blocks have fewer multiply-accumulates" in card
    assert "Narrower layers" not in card
    assert "Blocks are counted in this checkpoint, and held against those that they come from." in card
