"""Pictures and account of expert pruning: everything from the report, in the figures that the stage gave."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from compress.evaluation.evaluator import Evaluation
from compress.exporters.card import render_card
from compress.exporters.drawing import plain_defaults
from compress.exporters.experts_table import (
    above_random,
    contenders,
    counts_told,
    expert_stages,
    layers_told,
    not_told_apart,
    search_told,
    spans,
)
from compress.exporters.figures import EXPERTS, FITNESS, figures_in, made_of, write_figures
from compress.exporters.figures_experts import draw_experts, draw_fitness
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from ..told_experts import given, row, scores, searched

BLUE, PALE = "#2f6db3", "#e3e6ea"


@pytest.fixture
def fewer(document):
    """A report of a mixture that lost half of its experts by a search."""
    found = copy.deepcopy(document)
    found["model"] |= {"class": "MixtralForCausalLM", "family": "moe"}
    sizes = {
        "before": {"parameters": 46_000, "active_parameters": 12_000, "bytes": 92_000},
        "after": {"parameters": 23_000, "active_parameters": 9_000, "bytes": 46_000},
    }
    found["stages"] = [{**found["stages"][0], **sizes, "method": "eep", "details": searched()}]
    found["evaluation"]["linears"] = []
    return found


def with_details(document, *every):
    """The same report with other details, one stage each."""
    (stage,) = document["stages"]
    return {**document, "stages": [{**stage, "details": details} for details in every]}


def section_of(document):
    return render_card(document, [], "").split("## Which experts stay\n")[1].split("\n## ")[0]


def drawn(draw, *arguments, **options):
    with plain_defaults():
        figure = draw(*arguments, **options)
        figure.draw_without_rendering()
    return figure


def points(axes, label):
    """Return the points of a kind."""
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line.get_xydata().tolist()


def squares(axes):
    """Return the values of a heat map, [layers, experts]."""
    (mesh,) = axes.collections[:1]
    return np.asarray(mesh.get_array())


def test_every_evaluation_is_a_point_of_its_kind():
    details = searched()
    (axes,) = drawn(draw_fitness, details).axes
    assert points(axes, "random") == [[1, 30], [2, 34], [3, 38], [4, 30], [5, 34]]
    assert points(axes, "choice of a rule") == [[6, 40], [7, 50], [8, 60]]
    assert points(axes, "of two parents") == [[13, 64], [17, 68]]
    assert [place for place, _ in points(axes, "changed")] == [9, 11, 12, 14, 15, 16, 18, 19, 20]
    best = points(axes, "best so far")
    assert best[:3] == [[1, 30], [2, 34], [3, 38]] and best[9] == [10, 60] and best[-1] == [20, 71]
    assert axes.get_ylabel() == "points on 128 train items"
    details["search"]["history"] = [{**details["search"]["history"][5], "index": 0, "name": "identity"}]
    (axes,) = drawn(draw_fitness, details).axes
    assert points(axes, "experts as they were") == [[1, 40]]


def test_merging_begins_between_two_evaluations_and_nowhere_without_it():
    def marks(details):
        (axes,) = drawn(draw_fitness, details).axes
        lines = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
        upright = [
            line for line in axes.get_lines() if len(set(line.get_xdata())) == 1 < len(line.get_xdata())
        ]
        texts = [text.get_text() for text in axes.texts]
        return lines + [line.get_xdata()[0] for line in upright], "merging begins" in texts

    assert marks(searched()) == ([10.5], True)
    for first in (0, 20):
        details = searched()
        details["search"]["prune_evals"] = first
        assert marks(details) == ([], False)


def test_rules_and_original_are_lines_with_their_train_scores():
    (axes,) = drawn(draw_fitness, searched()).axes
    levels = {line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]}
    assert levels == {99.5, 60.0, 50.0, 40.0, 38.25}
    said = [text.get_text() for text in axes.texts if text.get_text() != "merging begins"]
    assert said == [
        "all 4 experts 99.5", "NAEE 60", "soft activation 50", "frequency 40", "random, mean 38.2",
    ]  # fmt: skip


def test_names_of_equal_levels_do_not_touch():
    rows = [
        {**one, "train": 60.0} if one["name"] in ("naee", "frequency", "random") else one for one in scores()
    ]
    rows[0]["train"] = rows[3]["train"] = 30.0
    (axes,) = drawn(draw_fitness, searched(scores=rows)).axes
    boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text() != "merging begins"]
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    width, height = axes.figure.bbox.width, axes.figure.bbox.height
    assert all(box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)


def test_what_failed_or_lies_far_below_is_counted_and_not_drawn():
    details = searched()
    details["search"]["history"][2]["fitness"] = -5000.0
    figure = drawn(draw_fitness, details)
    (axes,) = figure.axes
    assert [place for place, _ in points(axes, "random")] == [1, 2, 4, 5]
    assert axes.get_ylim()[0] > 0
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "not drawn: 1 without finite outputs, 1 further down"
    details["search"]["history"][2]["fitness"] = 38.0
    details["search"]["history"][9]["fitness"] = 61.0
    assert drawn(draw_fitness, details).legends[0].get_title().get_text() == ""


def test_a_choice_is_a_heat_map_of_layers_and_experts():
    figure = drawn(draw_experts, given())
    (axes,) = figure.axes
    assert squares(axes).tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]
    (mesh,) = axes.collections[:1]
    assert [to_hex(mesh.cmap(mesh.norm(value))) for value in (0.0, 1.0)] == [PALE, BLUE]
    assert axes.get_ylim() == (3, 0), "the first layer above"
    assert figure.get_suptitle() == "Kept 2 of 4 experts in each of 3 layers"
    assert not [line for line in axes.get_lines() if len(set(line.get_ydata())) == 1]
    again = drawn(draw_experts, given(), again=True).get_suptitle()
    assert again.endswith("\nof those that the stage before it left")


def test_layers_are_told_by_their_numbers_in_the_model():
    details = given(experts={"11": [0, 1], "3": [0, 1], "10": [2, 3]})
    (axes,) = drawn(draw_experts, details).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "10", "11"]
    assert squares(axes)[1].tolist() == [0, 0, 1, 1]
    assert layers_told(details) == [("3", "0, 1"), ("10", "2, 3"), ("11", "0, 1")]


def test_groups_of_layers_are_parted_by_a_line():
    (axes,) = drawn(draw_experts, searched()).axes
    assert [line.get_ydata()[0] for line in axes.get_lines()] == [2]
    (axes,) = drawn(draw_experts, searched(groups=["layers.0", "layers.1", "layers.2"])).axes
    assert not axes.get_lines()


def test_merged_experts_are_drawn_by_their_coefficients():
    mixing = {
        "0": [[1.0, 0.25, 0.0, 0.0], [0.0, -0.25, 0.0, 0.75]],
        "1": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
        "2": [[0.0, 1.0, 0.0, 0.0], [0.125, 0.0, 1.0, 0.0]],
    }
    figure = drawn(draw_experts, searched(mixing=mixing))
    axes = figure.axes[0]
    assert squares(axes).tolist() == [[1, 0.5, 0, 0.75], [1, 0, 0, 1], [0.125, 1, 1, 0]]
    assert [text.get_text() for text in axes.texts[:4]] == ["1.00", "0.50", "0.00", "0.75"]
    frames = [(int(patch.get_x()), int(patch.get_y())) for patch in axes.patches]
    assert frames == [(0, 0), (3, 0), (0, 1), (3, 1), (1, 2), (2, 2)]
    assert figure.legends[0].get_texts()[0].get_text() == "stays in the router"


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (4, 8), (32, 8), (58, 256)])
def test_no_label_is_cut_off_or_runs_into_another(layers, experts):
    kept = {str(layer): list(range(experts // 2)) for layer in range(layers)}
    details = given(experts=kept, experts_before=experts, experts_after=experts // 2)
    figure = drawn(draw_experts, details)
    (axes,) = figure.axes
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:], strict=False))
        assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.width
    assert figure.bbox.height < 1300 and figure.bbox.width <= 1320


def test_pictures_are_written_again_byte_by_byte_and_numbered(tmp_path, fewer, document):
    assert write_figures(tmp_path, Evaluation(), fewer) == [EXPERTS, FITNESS]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_figures(tmp_path, Evaluation(), fewer)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == first[path.name]
        with Image.open(path) as picture:
            assert 400 < picture.width < 1500
    twice = with_details(fewer, searched(), given())
    assert write_figures(tmp_path, Evaluation(), twice) == [EXPERTS, "experts_2.png", FITNESS]
    assert figures_in(tmp_path) == [EXPERTS, "experts_2.png", FITNESS]
    second = (tmp_path / "experts_2.png").read_bytes()
    write_figures(tmp_path, Evaluation(), with_details(fewer, given()))
    assert (tmp_path / EXPERTS).read_bytes() != second, "whose title says what the places count"
    assert made_of(fewer) == "pruned"
    assert expert_stages(document) == []


def test_nothing_is_drawn_where_all_experts_stay_as_they_are(tmp_path, fewer):
    alike = given(experts_before=2, active_after=1, experts={"0": [0, 1]})
    assert write_figures(tmp_path, Evaluation(), with_details(fewer, alike)) == []


def test_counts_are_told_in_words():
    assert counts_told(given()) == "kept 2 of 4 experts in each of 3 layers"
    assert counts_told(searched()) == "kept 2 of 4 experts in each of 3 layers, merged"
    one = given(experts={"4": [1, 2]}, active_after=1)
    assert counts_told(one) == "kept 2 of 4 experts in 1 layer; 1 instead of 2 for a token"
    assert counts_told(searched(experts_after=4)) == "merged all 4 experts in each of 3 layers"
    assert spans([0, 1, 3, 4, 5, 9]) == "0, 1, 3-5, 9"
    assert layers_told(given()) == [("0, 1", "0, 3"), ("2", "1, 2")]


def test_what_another_method_tells_under_these_names_is_not_taken_for_experts():
    assert expert_stages({"stages": [{"details": {"experts": {"0": [1]}}}, {"details": None}, {}]}) == []


def test_the_search_is_told_with_and_without_what_the_report_alone_has():
    details = searched()
    assert search_told(details) == (
        "20 evaluations with seed 7 (10 choose experts, 10 merge), fitness exact_match on 128 train items"
    )
    details["fitness"] |= {"task": "sort", "dev": 64}
    del details["search"]
    assert search_told(details) == (
        "searched with seed 7, fitness exact_match on 128 train items of the task sort, the best scored again"
        " on 64 others"
    )


def test_close_rows_are_not_told_apart_and_random_ones_are_not_asked():
    rows = contenders(searched())
    assert [one.key for one in not_told_apart(rows, 400)] == ["naee", "eep: experts chosen"]
    # 2 * sqrt(0.0245^2 + 0.0238^2) = 0.0683
    wider = [row("naee", 0.581, 0.0245), row("frequency", 0.582, 0.0245), row("eep", 0.65, 0.0238)]
    assert [one.key for one in not_told_apart(contenders(searched(scores=wider)), 400)] == ["frequency"]


def test_dynamic_skipping_stands_below_the_original_with_its_mean_of_experts(fewer):
    skipped = {"experts_per_token": 1.5123, "score": 58.0, "accuracy": 0.58, "standard_error": 0.02}
    section = section_of(with_details(fewer, searched(skipping=skipped)))
    line = "| before this stage, skipping experts: 1.51 a token | 58.0% | 2.0 |  |"
    assert f"{line}\n| random ones" in section and "Skipping removes nothing" in section
    assert "kipping" not in section_of(fewer)


def test_a_free_router_is_told_as_one_and_what_is_not_shipped_is_named(fewer):
    free = section_of(with_details(fewer, searched(router="free")))
    assert "a matrix maps these weights to the experts\nthat stay" in free
    rounded = [*scores()[:-1], row("eep: router free, not shipped", 0.7, 0.02), scores()[-1]]
    section = section_of(with_details(fewer, searched(router="onehot", scores=rounded)))
    assert "the best with a free router, not shipped | 70.0% |" in section
    assert "a matrix maps" not in section
    mixing = {layer: [[0.5] * 4] * 2 for layer in ("0", "1", "2")}
    figure = drawn(draw_experts, searched(router="free", mixing=mixing))
    assert figure.legends[0].get_texts()[0].get_text() == "weighs most in the router"


def test_an_error_of_zero_counts_as_one_item():
    alike = [row("original", 1.0, 0.0), row("eep", 0.99, 0.0)]
    # 2 * sqrt(2) / 100 = 0.028; / 400 = 0.007
    assert [one.key for one in not_told_apart(contenders(searched(scores=alike)), 100)] == ["original"]
    assert not_told_apart(contenders(searched(scores=alike)), 400) == []
    # 2 * sqrt(0.01^2 + 0.0075^2) = 0.025, and 0.015 without that of the one item
    for first, last in (((1.0, 0.0), (0.98, 0.0075)), ((0.98, 0.0075), (1.0, 0.0))):
        rows = contenders(searched(scores=[row("original", *first), row("eep", *last)]))
        assert len(not_told_apart(rows, 100)) == 1


def test_the_distance_from_random_choices_is_in_their_deviations():
    assert above_random(contenders(searched())) == pytest.approx((0.65 - 0.4) / 0.125)
    rows = scores()
    rows[1]["deviation"] = None
    assert above_random(contenders(searched(scores=rows))) is None
    assert above_random(contenders(searched(scores=[rows[0], rows[-1]]))) is None


def test_the_card_tells_which_experts_stay_what_it_saves_and_how_it_was_found(fewer):
    section = section_of(fewer)
    assert "By `eep`: kept 2 of 4 experts in each of 3 layers, merged." in section
    assert "| experts of a layer | 4 | 2 | 50.0% |" in section
    assert "| parameters | 46,000 | 23,000 | 50.0% |" in section
    assert "| parameters that a token meets | 12,000 | 9,000 | 75.0% |" in section
    assert "numbered from 0 as in the original" in section
    assert "| 0, 1 | 0, 3 |" in section and "| 2 | 1, 2 |" in section
    assert "are shared by the layers of each of 2 groups" in section
    assert "what else the model could do may be lost" in section
    assert "20 evaluations with seed 7 (10 choose experts, 10 merge)" in section


def test_the_card_holds_the_result_against_every_rule_and_says_how_sure_it_is(fewer):
    section = section_of(fewer)
    assert "On 400 test items, on which nothing was chosen; share of items whose generated text" in section
    rows = (
        "| before this stage, all 4 experts | 100.0% | 0.0 | 99.5 |",
        "| random ones, mean of 30 | 40.0% | 12.5, deviation of the choices | 38.25 |",
        "| those that most tokens meet (frequency) | 45.0% | 2.5 | 40 |",
        "| those with most routing weight (soft activation) | 55.0% | 2.5 | 50 |",
        "| those with which the outputs change least (NAEE) | 60.0% | 2.5 | 60 |",
        "| chosen by the search, before merging | 64.0% | 2.4 | 62 |",
        "| **result of the search** | **65.0%** | 2.4 | 71 |",
    )
    places = [section.index(line) for line in rows]
    assert places == sorted(places)
    assert "One of 0 says no more than that all 400 items came out alike." in section
    assert "The result is 2.0 such deviations above the mean of the random choices." in section
    apart = section.split("**These items do not tell it apart** from: ")[1].split("\n")[0]
    assert "NAEE" in apart and "before merging" in apart
    assert "frequency" not in apart and "before this stage" not in section.split("tell it apart")[1]


def test_the_card_says_where_the_result_is_worse_than_chance_or_failed(fewer):
    rows = scores()
    rows[-1] |= {"accuracy": 0.3, "score": 30.0}
    rows[2] |= {"accuracy": None, "standard_error": None, "loss": None, "score": None}
    rows[1]["failed"] = 2
    section = section_of(with_details(fewer, searched(scores=rows)))
    assert "The result is 0.8 such deviations below the mean of the random choices." in section
    assert "(frequency) | no finite outputs |  | 40 |" in section
    assert "random ones, mean of 28 (2 more gave no finite outputs)" in section
    assert "do not tell it apart" not in section


def test_a_result_as_good_as_the_original_is_said_to_be_no_more_than_that(fewer):
    rows = [row("original", 0.66, 0.0237), row("eep", 0.65, 0.0238)]
    section = section_of(with_details(fewer, searched(scores=rows)))
    assert "These items do not tell it apart from the model before this stage." in section
    assert "such deviations" not in section and "One of 0" not in section


def test_a_loss_is_told_in_points_without_errors(fewer):
    rows = [
        {"name": name, "score": score, "accuracy": None, "standard_error": None, "loss": -score / 100}
        for name, score in (("original", -0.0421), ("eep", -150.25))
    ]
    rows.insert(1, {"name": "random", "score": -300.0, "score_deviation": 50.0, "draws": 5, "failed": 0})
    fitness = {"by": "loss", "task": None, "train": 10, "dev": 0, "test": 20}
    section = section_of(with_details(fewer, searched(scores=rows, fitness=fitness)))
    assert "nothing was chosen; points: minus 100 times the mean loss of a token, in nats." in section
    assert "| random ones, mean of 5 | -300 | 50, deviation of the choices |  |" in section
    assert "| **result of the search** | **-150.2** |  |  |" in section and "| -0.0421 |" in section
    assert "No standard error is known of a loss." in section
    assert "The result is 3.0 such deviations above" in section


def test_the_card_of_given_experts_says_that_nothing_was_scored(fewer):
    section = section_of(with_details(fewer, given(active_after=1)))
    assert "The recipe says which; nothing was searched or scored here." in section
    assert "test items" not in section and "weighted sums" not in section
    assert "| of these, a token meets | 2 | 1 | 50.0% |" in section
    card = render_card(with_details(fewer, given(active_after=1)), [], "")
    assert "A token meets 1 instead of 2 experts" in card
    assert "Fewer experts take less memory" in render_card(fewer, [], "")
    merged = render_card(with_details(fewer, searched(experts_after=4)), [], "")
    assert "Fewer experts" not in merged and "Experts that stay" not in merged


def test_long_lists_are_left_to_the_report(fewer):
    kept = {str(layer): list(range(layer % 2, 256, 2)) for layer in range(58)}
    section = section_of(with_details(fewer, given(experts=kept, experts_before=256, experts_after=128)))
    assert "`report.json` lists the experts that stay, numbered from 0 as in the original." in section
    assert "| 0 |" not in section and len(section) < 1500


def test_later_stages_count_in_the_model_before_them(fewer):
    twice = with_details(fewer, searched(), given())
    assert "numbered from 0 as in the model before this stage" in section_of(twice)
    card = render_card(twice, [EXPERTS, "experts_2.png", FITNESS], "")
    assert "Stage 2 of this kind. They are counted in the model before it.](experts_2.png)" in card
    assert (
        "![Fitness of every evaluation of the search on the train items, and the best so far.](fitness.png)"
        in card
    )


def test_a_second_search_is_held_against_the_model_that_it_began_with(fewer):
    counts = {"experts_before": 2, "experts_after": 1, "active_before": 1, "active_after": 1}
    kept = {"0": [0], "1": [1], "2": [0]}
    skipped = {"experts_per_token": 1.5, "score": 90.0, "accuracy": 0.9, "standard_error": 0.02}
    rows = [row("original", 0.66, 0.0237, 70.0), row("eep", 0.65, 0.0238)]
    second = searched(**counts, experts=kept, skipping=skipped, scores=rows)
    _, again = section_of(with_details(fewer, searched(), second)).split("By `eep`: ")[1:]
    assert "| before this stage, all 2 experts | 66.0% |" in again
    assert "| before this stage, skipping experts: 1.50 a token |" in again
    assert "do not tell it apart from the model before this stage." in again
    assert "original" not in again
    (axes,) = drawn(draw_fitness, second).axes
    assert "all 2 experts 70" in [text.get_text() for text in axes.texts]


def test_rows_that_do_not_ship_are_excepted_from_what_is_said_of_all(fewer):
    rows = [*scores()[:-1], row("eep: router free, not shipped", 0.7, 0.02), scores()[-1]]
    section = section_of(with_details(fewer, searched(router="onehot", scores=rows)))
    said = "All rows answer the same items; where a row says nothing else, as the model would be shipped:"
    assert section.index(said) < section.index("the best with a free router, not shipped")


def test_other_cards_say_nothing_of_experts(document):
    card = render_card(document, [], "")
    assert "Which experts stay" not in card and "experts" not in card


def test_questions_of_the_evaluation_stand_in_the_table_with_their_errors(fewer):
    metrics = {"answers": 0.925, "answers_original": 1.0, "answers_drop": 0.075}
    fewer["evaluation"]["metrics"] |= metrics
    fewer["evaluation"]["answers"] = {
        "by": "tokens",
        "items": 512,
        "original_standard_error": 0.0,
        "standard_error": 0.01164,
    }
    card = render_card(fewer, [], "")
    title = (
        "tokens of the answers that are the model's first choice, of 512 items, ± standard error in points"
    )
    assert f"| {title} | 100.0% ± 0.0 | 92.5% ± 1.2 |" in card
