import time

from compress.recipes.gates import Gate
from compress.report import (
    check_gates,
    environment,
    measured,
    peak_rss_bytes,
    reset_peak_rss,
    without_timings,
)
from pydantic import TypeAdapter


def _gate(text):
    return TypeAdapter(Gate).validate_python(text)


def test_gates_state_what_was_measured_and_whether_it_holds():
    rows = check_gates(
        {"size_ratio": _gate("<= 0.35"), "sqnr_db": _gate(">= 12")}, {"size_ratio": 0.3, "sqnr_db": 9.5}
    )
    assert [(row["metric"], row["measured"], row["passed"]) for row in rows] == [
        ("size_ratio", 0.3, True),
        ("sqnr_db", 9.5, False),
    ]


def test_a_metric_that_was_not_measured_fails_its_gate():
    assert check_gates({"fid": _gate("<= 5")}, {})[0]["passed"] is False


def test_a_metric_that_is_not_a_number_fails_its_gate():
    assert check_gates({"sqnr_db": _gate(">= 5")}, {"sqnr_db": float("nan")})[0]["passed"] is False


def test_timings_are_the_only_difference_that_is_left_out():
    report = {
        "stages": [{"seconds": 1.0, "details": {"seconds": 2, "bits": 4}, "resumed": True}],
        "gates": [],
    }
    assert without_timings(report) == {"stages": [{"details": {"bits": 4}}], "gates": []}


def test_measured_seconds_are_the_bodys():
    with measured() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 1.0
    assert cost.peak_rss_bytes > 10_000_000


def test_peak_memory_sees_an_allocation():
    reset_peak_rss()
    before = peak_rss_bytes()
    block = bytearray(b"x") * 200_000_000
    assert peak_rss_bytes() - before > 150_000_000
    del block


def test_the_environment_names_versions_and_seed():
    found = environment(7, "cpu", 2, time.monotonic())
    assert found["seed"] == 7
    assert {"compress", "torch", "python"} <= set(found["versions"])
