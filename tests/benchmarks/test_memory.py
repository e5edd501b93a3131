"""The memory benchmark fails where the budget is not kept, and measures what users run."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory

    yield memory
    for name in ("memory", "_common", "_dit_xl"):
        sys.modules.pop(name, None)


def test_over_budget_is_a_failure(memory, capsys):
    assert memory.verdict(100, 100.0) == 0
    assert memory.verdict(101, 100.0) == 1
    assert "OVER BUDGET" in capsys.readouterr().out


def test_the_default_evaluation_is_measured(memory):
    from compress.recipes.schema import EvaluateSettings, FidelitySettings

    given = EvaluateSettings.model_validate(memory.recipe(Path("m"), Path("o"), 4)["evaluate"])
    expected = EvaluateSettings(fidelity=FidelitySettings(steps=given.fidelity.steps))
    assert given == expected
    assert given.layers
