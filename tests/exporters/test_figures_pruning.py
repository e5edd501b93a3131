"""Pictures and account of pruning: everything from the report, readable from two blocks to many."""

import copy
import json

import pytest
from compress.evaluation.evaluator import Evaluation
from compress.exporters.card import render_card
from compress.exporters.drawing import plain_defaults
from compress.exporters.figures import SCORES, TRAINING, WIDTHS, figures_in, write_figures
from compress.exporters.figures_pruning import draw_scores, draw_training, draw_widths
from compress.exporters.pruning_table import WIDTHS as WIDTHS_OF
from compress.exporters.pruning_table import layers_of, shown_class
from PIL import Image


@pytest.fixture
def pruned(document, pruning_details, training_details):
    """A report of a classifier that was pruned and trained."""
    found = copy.deepcopy(document)
    stage = found["stages"][0]
    found["stages"] = [
        {**stage, "method": "isomorphic", "details": {**pruning_details(), "measured": {"accuracy": 0.125}}},
        {**stage, "method": "finetune", "details": training_details},
    ]
    found["model"] |= {"class": "ViTForImageClassification", "family": "vit"}
    found["export"]["loads_with"] = [
        "compress.load(path)",
        "import compress; transformers.AutoModelForImageClassification.from_pretrained(path)",
    ]
    found["evaluation"] = {
        "linears": [{**row, "method": None, "weight_bits": 16} for row in document["evaluation"]["linears"]],
        "metrics": {
            "bytes": 18000, "size_ratio": 0.45, "bits_per_weight": 16.0, "parameters": 9000, "macs": 500_000,
            "accuracy": 0.875, "accuracy_original": 0.88, "accuracy_drop": 0.005, "top1_agreement": 0.9,
            "sqnr_db": 9.5, "kl": 0.125,
        },
    }  # fmt: skip
    return found


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def heights(axes, label):
    bars = next(held for held in axes.containers if held.get_label() == label)
    return [bar.get_height() for bar in bars]


def test_widths_have_a_panel_for_each_kind_that_changed(pruning_details):
    details = pruning_details()
    with plain_defaults():
        figure = draw_widths(details)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["residual stream", "feed-forward", "heads", "head channels"]
    assert heights(panel(figure, "feed-forward"), "before") == [512] * 4
    assert heights(panel(figure, "feed-forward"), "after") == [128, 160, 192, 224]
    assert heights(panel(figure, "heads"), "after") == [4, 3, 4, 3]
    for member in details["classes"][2]["members"]:
        member["heads"] = [4, 4]
    with plain_defaults():
        titles = [axes.get_title(loc="left") for axes in draw_widths(details).axes]
    assert "heads" not in titles


def test_scores_show_what_was_kept_and_removed(pruning_details):
    details = pruning_details()
    with plain_defaults():
        figure = draw_scores(details)
    axes = panel(figure, "feed-forward")
    histogram = details["classes"][1]["histogram"]
    assert heights(axes, "kept") == histogram["kept"]
    assert heights(axes, "removed") == histogram["removed"]
    assert [text.get_text() for text in axes.texts] == ["704 of 2,048 channels kept, 4 layers"]


def test_scores_of_several_steps_are_said_to_be_those_of_the_last(pruned, pruning_details):
    details = pruning_details()
    details["schedule"] = [{"channels": 9, "loss": 1.0}, {"channels": 8, "loss": 1.0}]
    entry = next(entry for entry in details["classes"] if entry["name"] == "ff")
    entry["histogram"] = {"edges": [0.0, 1.0, 2.0], "kept": [1, 4], "removed": [3, 0]}
    with plain_defaults():
        figure = draw_scores(details)
    assert figure.get_suptitle().endswith("what was removed in the last of 2 steps")
    axes = panel(figure, "feed-forward")
    assert any(text.get_text().startswith("5 of 8 channels kept") for text in axes.texts)
    assert axes.get_ylim()[1] > 4  # the highest bar ends below the edge
    said = "Of the last of 2 steps; each has scores of its own."
    assert said not in render_card(pruned, [SCORES], "")
    pruned["stages"][0]["details"] = details
    assert said in render_card(pruned, [SCORES], "")


def test_many_classes_are_shown_in_part_and_counted(pruning_details):
    details = pruning_details()
    one = details["classes"][1]
    details["classes"] = [{**one, "name": f"vit.layers.{i}.mlp.fc1"} for i in range(25)]
    with plain_defaults():
        figure = draw_scores(details)
    assert figure.get_suptitle().startswith("Scores in 12 of 25 classes")
    assert panel(figure, "feed-forward: vit.layers.2.mlp.fc1").get_visible()


def test_classes_of_a_kind_are_numbered_and_mixed_ones_taken_apart(pruning_details):
    details = pruning_details()
    width, ff, attention = details["classes"]
    assert [shown_class({**width, "name": "width.3"}), shown_class(ff)] == [
        "residual stream 3",
        "feed-forward",
    ]
    mixed = {**width, "name": "width+ff", "members": width["members"] + ff["members"]}
    assert shown_class(mixed) == "residual stream: width+ff"
    apart = {kind: layers_of(details, kind) for kind in WIDTHS_OF}
    assert {kind: layers_of({"classes": [mixed, attention]}, kind) for kind in WIDTHS_OF} == apart


def test_training_shows_the_loss_and_its_mean(training_details):
    with plain_defaults():
        figure = draw_training(training_details)
    raw, mean = figure.axes[0].get_lines()
    assert raw.get_xydata().tolist() == training_details["loss"]
    window = 200 // 12
    values = [value for _, value in training_details["loss"]]
    assert mean.get_ydata()[0] == pytest.approx(sum(values[:window]) / window)
    assert len(mean.get_ydata()) == 200 - window + 1


@pytest.mark.parametrize("blocks", [1, 4, 28, 60])
def test_pictures_are_written_again_byte_by_byte(tmp_path, document, pruned, pruning_details, blocks):
    pruned["stages"][0]["details"] = pruning_details(blocks)
    evaluation = Evaluation(details={"linears": pruned["evaluation"]["linears"]})
    assert write_figures(tmp_path, evaluation, pruned) == [WIDTHS, SCORES, TRAINING]  # none of bits
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_figures(tmp_path, Evaluation(), json.loads(json.dumps(pruned)))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == first[path.name]
        with Image.open(path) as picture:
            assert 400 < picture.width < 1500
            assert path.stat().st_size < 200_000
    assert write_figures(tmp_path / "none", Evaluation(), document) == []


def test_later_stages_have_pictures_of_their_own(tmp_path, pruned):
    pruned["stages"].insert(1, pruned["stages"][0])
    written = write_figures(tmp_path, Evaluation(), pruned)
    assert written == [WIDTHS, "widths_2.png", SCORES, "scores_2.png", TRAINING]
    assert figures_in(tmp_path) == written
    card = render_card(pruned, written, "")
    assert "![Width of every layer before and after pruning. Stage 2 of this kind.](widths_2.png)" in card


def test_the_card_of_a_classifier_says_what_was_measured_on_which_images(pruned):
    pruned["evaluation"] |= {
        "images": {"held_out": 2000, "skipped": 3, "copies": 12, "seed": 7}, "fidelity": {"samples": 64},
        "quality": {"samples": 500, "per_class": [], "absent_classes": ["a", "b", "c", "d"]},
    }  # fmt: skip
    card = render_card(pruned, [], "")
    assert "| accuracy on images that were not trained on | 88.00% | 87.50% |" in card
    assert "| images answered as the original answers them | 100% | 90.00% |" in card
    assert "| SQNR of the logits |  | 9.50 dB |" in card
    assert (
        "chosen with seed 7 from 2,000 that were neither calibrated nor trained on: agreement with the"
        in card
    )
    assert "original on 64, accuracy on 500." in card
    assert "- Files left out because they cannot be read: 3." in card
    assert "- Copies of held-out images that were left out of calibration and training: 12." in card
    assert "- Classes of the model without a held-out image: 4 (`a`, `b`, `c`, ...)." in card
    assert "denoiser" not in card
    assert "language" not in card
    assert '`transformers.AutoImageProcessor.from_pretrained("out/dit-w4a8")`' in card
    assert "run as in the\n  original" not in card  # attention is smaller than it was


def section_of(document):
    return render_card(document, [], "").split("## What was removed\n")[1].split("\n## ")[0]


def test_the_card_tells_classes_widths_and_cost(pruned):
    section = section_of(pruned)
    assert "Isomorphic sub-structures of all layers compete among themselves" in section
    assert "cross-entropy with the labels were summed over 64 calibration samples" in section
    assert "| feed-forward | 4 | 2,048 | 704 | 34.4% | 128 to 224 |" in section
    assert "| heads | 4 | 16 | 14 | 87.5% |" in section
    assert "| parameters | 20,000 | 9,000 | 45.0% |" in section
    assert "attention products included | 1,000,000 | 500,000 | 50.0% |" in section
    assert "counted as the papers on pruning do | 990,000 | 495,000 | 50.0% |" in section
    assert "| **isomorphic** | 0.5 | 1.25 | 500,000 |" in section
    assert "| global |  | 1.75 | 501,000 |" in section


def test_the_card_tells_accuracy_before_and_after_everything(pruned):
    section = section_of(pruned)
    rows = ("| original | 88.00% |", "| after `isomorphic` | 12.50% |", "| this checkpoint | 87.50% |")
    places = [section.index(row) for row in rows]
    assert places == sorted(places)
    assert "Trained afterwards by `finetune`: 400 steps on 5,000 images; training loss" in section
    assert " on average over its first twelfth, " in section
    assert "ine-tuning required" not in section
    assert "left out" not in section
    pruned["stages"][1]["details"] |= {"skipped": 2, "held_out": 1200}
    section = section_of(pruned)
    assert "Files left out because they cannot be read: 2." in section
    assert "Images left out because they are held out for measuring: 1,200." in section


def test_without_recovery_the_card_says_that_it_is_required(pruned):
    required = "**Fine-tuning required: no stage trains the model after it is pruned"
    trained_first = {**pruned, "stages": pruned["stages"][::-1]}
    assert required in section_of(trained_first)
    del pruned["stages"][1]
    assert f"{required}, and pruned models answer badly; the stage for it is finetune.**" in section_of(
        pruned
    )
    of_denoiser = {**pruned, "model": {**pruned["model"], "family": "dit"}}
    assert f"{required}, and pruned denoisers draw badly; the stage for it is distill.**" in section_of(
        of_denoiser
    )
    of_another = {**pruned, "model": {**pruned["model"], "family": "unet"}}
    assert f"{required}; no stage here trains models such as unet" in section_of(of_another)


def test_magnitude_and_a_stage_without_losses_are_told_as_they_are(pruned):
    details = pruned["stages"][0]["details"]
    details |= {"importance": "magnitude", "samples": 0, "loss": None, "baselines": {}, "paper_macs": None}
    section = section_of(pruned)
    assert "squared size of the weights (magnitude)" in section
    assert "calibration samples" not in section
    assert "papers on pruning" not in section


def test_what_was_not_pruned_says_nothing_of_it(document):
    card = render_card(document, [], "")
    assert "What was removed" not in card
    assert "ine-tuning" not in card
