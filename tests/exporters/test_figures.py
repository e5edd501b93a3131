"""Pictures: there when measured, small, the same bytes each time."""

import matplotlib
import pytest
import torch
from compress.evaluation.evaluator import Evaluation
from compress.exporters.drawing import save
from compress.exporters.figures import (
    BITS,
    LAYERS,
    SAMPLES,
    TIMESTEPS,
    draw_layers,
    draw_samples,
    write_figures,
)
from PIL import Image


def _evaluation(channels=1, samples=5, blocks=3):
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(samples, channels, 28, 28, generator=generator) * 2 - 1
    linears = [
        {
            "name": f"blocks.{block}.{role}", "role": role, "block": block, "parameters": 100,
            "weight_bits": bits, "activation_bits": 8, "method": "rtn", "bytes": 60, "bytes_original": 200,
        }
        for block in range(blocks)
        for role, bits in (("adaln", 8), ("ff.out", 4))
    ]  # fmt: skip
    layers = [
        {"name": "b", "role": role, "block": block, "sqnr_db": 20.0 + block}
        for block in range(blocks)
        for role in ("block", "attention.q", "ff.out")
    ]
    return Evaluation(
        metrics={"sqnr_db": 21.0},
        details={
            "timesteps": [{"timestep": 999.0 - 100 * i, "sqnr_db": 30.0 - i} for i in range(8)],
            "layers": layers,
            "linears": linears,
        },
        images={"original": original, "compressed": original * 0.9},
        labels=tuple(f"class {index}" for index in range(samples)),
    )


def _document(evaluation):
    return {"evaluation": {"metrics": evaluation.metrics, **evaluation.details}}


@pytest.mark.parametrize(("channels", "samples", "blocks"), [(1, 5, 3), (3, 16, 28), (4, 9, 2), (1, 1, 1)])
def test_every_picture_is_drawn(tmp_path, channels, samples, blocks):
    evaluation = _evaluation(channels, samples, blocks)
    assert write_figures(tmp_path, evaluation, _document(evaluation)) == [SAMPLES, TIMESTEPS, LAYERS, BITS]
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.info.keys() <= {"dpi"}
            assert 400 < picture.width < 1500


def test_equal_measurements_give_equal_bytes_whatever_the_user_has_set(tmp_path):
    evaluation = _evaluation()
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    write_figures(first, evaluation, _document(evaluation))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 300}):
        write_figures(second, evaluation, _document(evaluation))
        assert matplotlib.rcParams["font.size"] == 30
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize(("channels", "samples"), [(4, 1), (4, 4), (1, 1)])
def test_the_title_of_few_samples_fits(tmp_path, channels, samples):
    figure = draw_samples(_evaluation(channels, samples), "W4A8")
    save(figure, tmp_path / "samples.png")
    title = figure.get_suptitle()
    assert title.startswith("latents" if channels == 4 else "samples")
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


def test_each_role_has_its_place_where_a_stage_has_many_layers():
    rows = [{"name": "down_blocks.0.resnets.0", "role": "block", "block": 0, "sqnr_db": 9.0}]
    rows += [{"role": role, "block": 0, "sqnr_db": 8.0} for role in ("conv", "conv", "projection")]
    lines = {line.get_label(): set(line.get_xdata()) for line in draw_layers(rows).axes[0].get_lines()}
    assert lines == {"projection": {-0.15}, "conv": {0.15}}
    alone = draw_layers(rows[:2]).axes[0].get_lines()
    assert [set(line.get_xdata()) for line in alone] == [{0}]


def test_what_was_not_measured_is_not_drawn(tmp_path):
    evaluation = Evaluation(details={"linears": []})
    assert write_figures(tmp_path, evaluation, _document(evaluation)) == []
    assert list(tmp_path.iterdir()) == []


def test_black_stays_black_and_the_rows_are_in_order(tmp_path):
    evaluation = _evaluation(samples=1)
    evaluation.images = {"original": torch.full((1, 1, 28, 28), -1.0), "compressed": torch.ones(1, 1, 28, 28)}
    write_figures(tmp_path, evaluation, _document(evaluation))
    with Image.open(tmp_path / SAMPLES) as picture:
        column = picture.convert("L").crop(
            (picture.width // 2 + 20, 0, picture.width // 2 + 21, picture.height)
        )
        values = list(column.tobytes())
    darkest = values.index(0)
    assert darkest > 0
    assert all(value == 255 for value in values[values.index(255, darkest) :])
