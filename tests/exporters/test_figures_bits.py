"""Pictures and account of an allocation: there when bits were chosen, readable at any size."""

import copy
import json

import pytest
from compress.evaluation.evaluator import Evaluation
from compress.exporters.card import render_card
from compress.exporters.drawing import plain_defaults
from compress.exporters.figures import BITS, POINTS, SENSITIVITY, write_figures
from compress.exporters.figures_bits import draw_bits, draw_points, draw_sensitivity
from PIL import Image

ROLES = ("adaln", "attention.q", "ff.in", "ff.out")


def linears(blocks, bits=(2, 3, 4, 8, 16)):
    return [
        {
            "name": f"blocks.{block}.{role}", "role": role, "block": block, "parameters": 1000,
            "weight_bits": bits[(block + place) % len(bits)], "activation_bits": 8, "method": "mixdq",
            "bytes": 600, "bytes_original": 2000,
        }
        for block in range(blocks)
        for place, role in enumerate(ROLES)
    ]  # fmt: skip


def allocation(blocks=3, bits=(2, 3, 4, 8)):
    layers = [
        {
            "name": row["name"], "group": "all", "metric": "sqnr_db", "weight_bits": row["weight_bits"],
            "activation_bits": 8, "weights": 1000, "bytes": 600, "decided_by": "allocation",
            "sensitivity": {f"w{b}": 6.0 * b + row["block"] for b in bits},
        }
        for row in linears(blocks)
    ]  # fmt: skip
    points = [
        {
            "label": label, "bytes": 1000 * size, "mean_bits": 4.0, "predicted_loss": 0.01, "sqnr_db": value,
            "on_front": True, "for_this_budget": label == "optimum", "chosen": label == "optimum",
        }
        for label, size, value in (
            ("all w2", 2, 5.0), ("other budget", 3, 14.0), ("optimum", 4, 21.0), ("all w8", 8, 45.0),
            ("all w16", 16, 200.0),
        )
    ]  # fmt: skip
    return {
        "objective": "power", "objective_label": "least error power", "asked": {"bytes": 4010},
        "used": {
            "bytes": 4000, "bytes_limit": 4010, "allocated_bytes": 3000, "share": 4000 / 4010,
            "mean_bits": 3.51, "mean_bits_stored": 3.64,
        },
        "groups": [
            {"name": "all", "metric": "sqnr_db", "layers": 12, "weights": 12000, "mean_bits": 3.51,
             "histogram": {"2": 4, "4": 8}}
        ],
        "chosen": "optimum",
        "bound": {
            "point": "optimum", "loss": 0.0079, "lower_bound": 0.00789, "certificate": "lagrangian",
            "gap_of_range": 2e-5, "found_by": "greedy", "stopped": "gap",
        },
        "measured": {"weights_sqnr_db": 21.0, "predicted_weights_sqnr_db": 21.4, "sqnr_db": 20.5},
        "points": points, "layers": layers, "skipped": [], "monotone_changes": [],
    }  # fmt: skip


def with_allocation(document):
    found = copy.deepcopy(document)
    found["stages"][0]["details"] = {"allocation": allocation()}
    return found


def colours(figure, place):
    mesh = figure.axes[place].collections[0]
    return mesh.cmap(mesh.norm(mesh.get_array()))


def test_every_number_of_bits_has_its_own_colour_and_stands_in_its_field():
    with plain_defaults():
        figure = draw_bits(linears(5))
    figure.draw_without_rendering()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [str((2, 3, 4, 8, 16)[(block + place) % 5]) for place in range(4) for block in range(5)]
    found = colours(figure, 0).reshape(-1, 4)
    by_bits = {bits: tuple(colour) for bits, colour in zip(texts, found, strict=True)}
    assert len(set(by_bits.values())) == 5
    light = [sum(by_bits[str(bits)][:3]) for bits in (2, 3, 4, 8, 16)]
    assert light == sorted(light)  # told apart in grey, too


def test_a_field_of_several_layers_shows_their_mean():
    rows = linears(1)[:1]
    rows.append({**rows[0], "name": "other", "weight_bits": 3, "parameters": 3000})
    with plain_defaults():
        figure = draw_bits(rows)
    assert [text.get_text() for text in figure.axes[0].texts] == ["2.8"]


@pytest.mark.parametrize(
    ("blocks", "bits", "panels"), [(3, (2, 4), 2), (8, (2, 3, 4, 6, 8), 5), (28, (2, 3, 4, 8), 3)]
)
def test_sensitivities_have_a_panel_for_each_number_of_bits_while_there_is_room(
    tmp_path, blocks, bits, panels
):
    with plain_defaults():
        figure = draw_sensitivity(allocation(blocks, bits)["layers"], linears(blocks))
    shown = [axes for axes in figure.axes[:-1] if axes.get_visible()]
    assert len(shown) == panels
    assert shown[0].get_title(loc="left") == "2 bits"
    values = shown[-1].collections[0].get_array().reshape(len(ROLES), blocks)
    assert values[0].tolist() == [6.0 * bits[-1] + block for block in range(blocks)]
    assert figure.get_size_inches()[0] <= 11


def test_similarities_are_drawn_on_the_same_scale():
    layers = allocation(1, (4,))["layers"][:2]
    layers[1] |= {"metric": "ssim", "sensitivity": {"w4": 0.99}}
    with plain_defaults():
        figure = draw_sensitivity(layers, linears(1))
    assert figure.axes[0].collections[0].get_array().ravel().tolist() == pytest.approx([24.0, 20.0])


def test_error_over_bytes_shows_choice_budget_and_equal_bits():
    with plain_defaults():
        figure = draw_points(allocation())
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["chosen"].get_xydata().tolist() == [[4.0, 21.0]]
    assert lines["equal bits for all layers"].get_ydata().tolist() == [5.0, 45.0]
    assert lines["allocated, other budgets"].get_xydata().tolist() == [[3.0, 14.0]]
    assert any(list(line.get_xdata()) == [4.01, 4.01] for line in axes.get_lines())
    assert {"w2", "w8", "budget"} <= {text.get_text() for text in axes.texts}
    assert axes.get_ylim()[1] < 100  # what is equal to the original does not squeeze the rest


def test_the_pictures_are_written_where_bits_were_chosen(tmp_path, document):
    evaluation = Evaluation(details={"linears": linears(3)})
    plain = {"evaluation": {"linears": linears(3)}, "stages": document["stages"]}
    assert write_figures(tmp_path, evaluation, plain) == [BITS]
    chosen = {**plain, "stages": with_allocation(document)["stages"]}
    assert write_figures(tmp_path, evaluation, chosen) == [BITS, SENSITIVITY, POINTS]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_figures(tmp_path, evaluation, json.loads(json.dumps(chosen)))
    for path in tmp_path.iterdir():
        assert path.read_bytes() == first[path.name]
        with Image.open(path) as picture:
            assert 400 < picture.width < 1500
            assert path.stat().st_size < 200_000


def test_the_card_tells_budget_bound_and_groups(document):
    card = render_card(with_allocation(document), [SENSITIVITY, POINTS], "")
    section = card.split("## How the bits were chosen\n")[1].split("\n## ")[0]
    assert "objective: least error power" in section
    assert "| bytes of all tensors | 4,010 | 4,000 |" in section
    assert "| mean bits of the allocated weights, scales not counted |  | 3.5100 |" in section
    proof = "Taken: optimum; loss 0.0079, lower bound 0.00789 (lagrangian), gap 2.0e-05 of the range"
    assert f"99.75 % of the budget is used. {proof}" in section
    assert "21.00 dB with quantized weights (the sum of the layers' losses predicts 21.40 dB)" in section
    assert "| all | SQNR | 12 | 12,000 | 3.510 | 4 at 2, 8 at 4 |" in section
    assert "**W3.51A8 on average, mixed**: layers have bits of their own" in card
    assert "W4A8" not in card.split("## ")[0]
    assert "\n- mixed-precision\n" in card
    assert "\n- w4a8\n" not in card
    assert f"]({POINTS})" in card


def test_the_papers_objective_is_named_on_the_card_and_inputs_too(document):
    found = with_allocation(document)
    chosen = found["stages"][0]["details"]["allocation"]
    chosen |= {"objective": "mixdq", "objective_label": "mixdq objective (paper)", "asked": {"ratio": 0.25}}
    chosen["activations"] = {"rule": "protect", "share_asked": 0.01, "protected": ["a", "b"]}
    card = render_card(found, [], "")
    assert "objective: mixdq objective (paper)." in card
    assert "| bytes of all tensors | 4,010 (0.25 of the original) | 4,000 |" in card
    assert "The inputs of 2 layers stay in floating point" in card


def test_without_an_allocation_the_card_says_nothing_of_one(document):
    assert "How the bits were chosen" not in render_card(document, [], "")
