"""The benchmark of experts times searches, and says what a method did not do."""

import importlib.util
import sys

import pytest
from compress.progress import step


@pytest.fixture
def bench(repository, monkeypatch):
    """The benchmark as a module."""
    folder = repository / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("experts_bench", folder / "experts.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experts_bench", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def result(bench, *, chosen=0.9, chosen_train=92.0, found_train=95.0, rule=91.0):
    rows = {
        "random": {"accuracy": 0.6, "deviation": 0.1},
        **{name: {"accuracy": 0.8, "train": rule} for name in bench.HEURISTICS},
        "eep: experts chosen": {"accuracy": chosen, "train": chosen_train},
        "eep": {"accuracy": 0.95, "train": found_train},
    }
    return bench.Result(rows, 1.0)


def settings(bench, **changes):
    good = {name: result(bench) for name in bench.SEARCHES}
    return {"a": {**good, **{name: result(bench, **change) for name, change in changes.items()}}}


def test_nothing_is_found_where_all_is_well(bench):
    assert bench.problems(settings(bench), quick=False) == []
    assert result(bench).deviations == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": 0.6}, "not better than the mean random choice"),
        ({"found_train": 91.9}, "merging ended worse"),
        ({"rule": 92.5}, "worse than a rule that it started from"),
    ],
)
def test_each_shortcoming_is_told_with_its_setting(bench, change, message):
    (found,) = bench.problems(settings(bench, free=change), quick=False)
    assert found.startswith("a, free: ") and message in found


def test_a_random_start_may_be_worse_than_a_rule(bench):
    assert bench.problems(settings(bench, **{"random start": {"rule": 92.5}}), quick=False) == []


def test_one_setting_of_four_may_be_near_random(bench):
    near = {"with the rules": result(bench, chosen=0.75)}
    four = {name: settings(bench)["a"] for name in "abcd"}
    assert bench.problems({**four, "a": {**four["a"], **near}}, quick=False) == []
    two = {**four, **{name: {**four[name], **near} for name in "ab"}}
    (found,) = bench.problems(two, quick=False)
    assert found.startswith("2 of 4 settings: less than 2 deviations above random")


def test_only_the_evaluations_are_timed(bench, monkeypatch):
    now = iter([0.0, 1.0, 5.0, 200.0, 203.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(now))
    watch = bench.Watch()
    with step(watch, "measuring experts"), step(watch, "evolution"):
        pass
    with step(watch, "evolution"):
        pass
    assert watch.seconds == pytest.approx(4.0 + 3.0)
