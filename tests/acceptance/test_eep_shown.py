"""A search of experts through the command line: what card, pictures, terminal and job summary tell of it."""

from __future__ import annotations

import io
import json
import re

import pytest
from compress.cli._output import Output
from compress.cli.main import invoke
from PIL import Image

from ..tiny_items import make_asked_moe

pytestmark = pytest.mark.slow

RECIPE = """
model: model
stages:
  - eep:
      keep_experts: 4
      init_random: 6
      prune_evals: 20
      total_evals: 40
      random_draws: 4
      fitness: {by: tokens}
      splits: {train: 20, dev: 10, test: 20}
evaluate:
  fidelity: null
  answers: {}
export: {path: out}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run, what it wrote to the terminal, and the job summary."""
    folder = tmp_path_factory.mktemp("eep")
    make_asked_moe(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
        patch.delenv("GITHUB_OUTPUT", raising=False)
        assert invoke(["run", "recipe.yaml"], Output(out, err)) == 0, err.getvalue()
    return folder, out.getvalue(), (folder / "summary.md").read_text()


def test_every_score_of_the_report_stands_in_card_terminal_and_summary(run):
    folder, terminal, summary = run
    report = json.loads((folder / "out" / "report.json").read_text())
    card = (folder / "out" / "README.md").read_text()
    details = report["stages"][0]["details"]
    names = [row["name"] for row in details["scores"]]
    assert names[:5] == ["original", "random", "frequency", "soft_activation", "naee"] and names[-1] == "eep"
    section = card.split("## Which experts stay\n")[1].split("\n## ")[0]
    answers = section.split("On 20 test items")[1].splitlines()
    lines = [line for line in answers if re.search(r"\| \*{0,2}\d+\.\d%", line)]
    rows = list(details["scores"])
    rows.insert(1, {**details["skipping"], "name": "skipping"})
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        spread = row["deviation"] if "draws" in row else row["standard_error"]
        assert cells[1] == f"{row['accuracy']:.1%}" and cells[2].startswith(f"{100 * spread:.1f}")
        told = f"{cells[0]} {cells[1]} {cells[2]}"
        assert told in " ".join(terminal.split()), "the same row on the terminal"
        assert f"| {cells[0]} | {cells[1]} | {cells[2]} |" in summary
    assert "On 20 test items, on which nothing was chosen" in section
    assert (
        "40 evaluations with seed 0 (20 choose experts, 20 merge), fitness tokens on 20 train items"
        in section
    )
    assert "the best scored again on 10 others" in section


def test_the_result_answers_the_test_items_as_the_search_says(run):
    folder, terminal, _ = run
    report = json.loads((folder / "out" / "report.json").read_text())
    shown = {row["name"]: row["accuracy"] for row in report["stages"][0]["details"]["scores"]}
    metrics = report["evaluation"]["metrics"]
    assert metrics["answers_original"] == pytest.approx(shown["original"], abs=1e-6)
    assert metrics["answers"] == pytest.approx(shown["eep"], abs=1e-6)
    assert f"answers: {shown['eep']:.1%} (standard error " in terminal
    card = (folder / "out" / "README.md").read_text()
    assert f"first choice, of 20 items, ± standard error in points | {shown['original']:.1%} ±" in card


def test_pictures_lie_beside_the_card_which_shows_them(run):
    folder, _, _ = run
    card = (folder / "out" / "README.md").read_text()
    for name in ("experts.png", "fitness.png"):
        assert f"]({name})" in card
        with Image.open(folder / "out" / name) as picture:
            assert 400 < picture.width < 1500
    assert "all other tensors, experts among them, together have" in card


def test_sizes_are_those_of_the_files(run):
    folder, terminal, _ = run
    out = io.StringIO()
    assert invoke(["inspect", str(folder / "out"), "--json"], Output(out, io.StringIO())) == 0
    found = json.loads(out.getvalue())
    assert found["experts"] == {"kept": 4, "of": 6, "active": 2, "active_of": 2}
    card = (folder / "out" / "README.md").read_text()
    (stage,) = json.loads((folder / "out" / "report.json").read_text())["stages"]
    assert found["parameters"] == stage["after"]["parameters"]
    before, after = stage["before"]["active_parameters"], stage["after"]["active_parameters"]
    assert after < before, "the rows of the router"
    assert f"| parameters that a token meets | {before:,} | {after:,} | {after / before:.1%} |" in card
    assert f"| parameters | {stage['before']['parameters']:,} | {found['parameters']:,} |" in card
    assert "parameters a token meets" in terminal
