"""What expert pruning shows on a terminal and in a job summary, and `inspect` of a mixture of experts."""

from __future__ import annotations

import copy

from compress.cli import _github, _render
from compress.cli._inspection import sections
from compress.cli._tables import to_plain
from compress.exporters.formats import write
from compress.exporters.inspection import inspect
from compress.models.experts import keep_experts_of
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.recipes.stages import STAGES
from compress.runtime.manifest import HistoryEntry

from ..tiny_moe import make_moe
from ..told_experts import given, scores, searched


def rendered(report, details):
    document = copy.deepcopy(report)
    document["stages"] = [{**report["stages"][0], "method": "eep", "details": details}]
    return _render.report(document)


def shown(report, details):
    return "\n".join(to_plain(section) for section in rendered(report, details))


def words(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_search_is_a_line_the_layers_and_a_table_of_what_it_is_held_against(report):
    text = shown(report, searched())
    lines = words(text)
    assert "eep: kept 2 of 4 experts in each of 3 layers, merged" in lines
    start = lines.index("eep: experts that stay")
    assert lines[start + 1 : start + 4] == ["layers experts", "0, 1 0, 3", "2 1, 2"]
    how = "20 evaluations with seed 7 (10 choose experts, 10 merge), fitness exact_match on 128 train items"
    assert f"eep: {how}" in lines
    start = lines.index("eep: exact_match on 400 test items")
    assert lines[start + 1 : start + 4] == [
        "experts test standard error, points points on train",
        "before this stage, all 4 experts 100.0% 0.0 99.5",
        "random ones, mean of 30 40.0% 12.5, deviation of the choices 38.25",
    ]
    assert lines[start + 8] == "result of the search 65.0% 2.4 71"
    assert "eep: the result is 2.0 deviations of the random choices above their mean" in lines


def test_without_random_choices_no_distance_is_told(report):
    rows = [row for row in scores() if row["name"] != "random"]
    assert "deviations" not in shown(report, searched(scores=rows))


def test_given_experts_are_a_line_and_the_layers(report):
    lines = words(shown(report, given(active_after=1)))
    assert "eep: kept 2 of 4 experts in each of 3 layers; 1 instead of 2 for a token" in lines
    assert "0, 1 0, 3" in lines
    assert not any("test items" in line or "evaluations" in line for line in lines)


def test_many_different_layers_are_left_to_the_report(report):
    def of_layers(count):
        kept = {str(layer): [layer % 2, 2] for layer in range(count)}
        return shown(report, given(experts=kept))

    assert "experts that stay" in of_layers(16)
    assert "experts that stay" not in of_layers(17)


def test_stages_of_other_methods_say_nothing_of_experts(report):
    assert "expert" not in "\n".join(to_plain(section) for section in _render.report(report))


def test_parameters_that_a_token_meets_stand_beside_all_of_them(report):
    report["stages"][0]["before"]["active_parameters"] = 12_880_000_000
    report["stages"][-1]["after"]["active_parameters"] = 7_243_000_000
    lines = words("\n".join(to_plain(section) for section in _render.report(report)))
    assert "parameters a token meets 12.88 G 7.243 G 0.562 x" in lines


def test_the_job_summary_has_the_table_and_how_questions_were_answered(report, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    report["evaluation"]["metrics"] |= {"answers": 0.925, "answers_original": 1.0, "answers_drop": 0.075}
    report["evaluation"]["answers"] = {
        "by": "exact_match", "items": 512, "original_standard_error": 0.0, "standard_error": 0.01164,
    }  # fmt: skip
    assert _github.summarise("compress: moe", rendered(report, searched())) is None
    text = (tmp_path / "summary.md").read_text()
    assert "### eep: exact_match on 400 test items\n\n| experts | test | standard error, points |" in text
    assert "| result of the search | 65.0% | 2.4 | 71 |" in text
    shares = "92.5% (standard error 1.2), of the original 100.0% (standard error 0.0)"
    assert f"answers: {shares}: items whose generated text is the answer, of 512 items" in text


def test_inspect_tells_experts_before_and_after(tmp_path):
    model = open_model(
        ModelRef(id=str(make_moe(tmp_path / "m", "MixtralForCausalLM"))), progress=SilentProgress()
    )
    keep_experts_of(model, {0: (0, 2, 5), 1: (1, 2, 3), 2: (0, 1, 4)}, active=1)
    kept = {"0": [0, 2, 5], "1": [1, 2, 3], "2": [0, 1, 4]}
    details = given(experts=kept, experts_before=6, experts_after=3, active_after=1)
    settings = STAGES["eep"].model_validate({"experts": kept, "active_experts": 1}).model_dump(mode="json")
    model.history = [
        HistoryEntry(
            method="eep", settings=settings, seed=3, input_hash="0" * 64, versions={}, details=details
        )
    ]
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out", "compress")
    found = inspect(tmp_path / "out")
    assert found["experts"] == {"kept": 3, "of": 6, "active": 1, "active_of": 2}
    lines = words("\n".join(to_plain(section) for section in sections(found)))
    assert "experts 3 of 6 in a layer, 1 for a token instead of 2" in lines
    assert "eep: kept 3 of 6 experts in each of 3 layers; 1 instead of 2 for a token" in lines


def test_inspect_of_an_original_tells_its_experts_and_of_other_models_nothing(tmp_path, make_tiny):
    found = inspect(make_moe(tmp_path / "m", "DeepseekV2ForCausalLM"))
    assert found["experts"] == {"kept": 6, "of": 6, "active": 2, "active_of": 2}
    assert "experts 6 in a layer, 2 for a token" in words("\n".join(to_plain(s) for s in sections(found)))
    assert inspect(make_tiny())["experts"] is None
