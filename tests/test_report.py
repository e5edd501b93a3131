import subprocess
import sys
import time

import pytest
from compress.recipes.gates import Gate, judge
from compress.report import (
    Started,
    environment,
    measured,
    peak_rss_bytes,
    reset_peak_rss,
    versions,
    without_timings,
)
from pydantic import TypeAdapter


def _gate(text):
    return TypeAdapter(Gate).validate_python(text)


def test_gates_state_what_was_measured_and_whether_it_holds():
    rows = judge(
        {"size_ratio": _gate("<= 0.35"), "sqnr_db": _gate(">= 12")}, {"size_ratio": 0.3, "sqnr_db": 9.5}
    )
    assert [(row["metric"], row["measured"], row["passed"]) for row in rows] == [
        ("size_ratio", 0.3, True),
        ("sqnr_db", 9.5, False),
    ]


def test_a_metric_that_was_not_measured_fails_its_gate():
    assert judge({"fid": _gate("<= 5")}, {})[0]["passed"] is False


def test_a_metric_that_is_not_a_number_fails_its_gate():
    assert judge({"sqnr_db": _gate(">= 5")}, {"sqnr_db": float("nan")})[0]["passed"] is False


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
    found = environment(7, "cpu", 2, Started())
    assert found["seed"] == 7
    assert {"compress", "torch", "python", "huggingface_hub", "safetensors"} <= set(found["versions"])


def test_libraries_that_move_files_do_not_make_a_stage_anew():
    assert not {"huggingface_hub", "matplotlib"} & set(versions())


def test_processor_time_counts_the_processes_that_were_started():
    started = Started()
    burn = (
        "import time\nend = time.process_time() + 0.3\n"
        "while time.process_time() < end: pass\nblock = b'x' * (400 * 10**6)"
    )
    subprocess.run([sys.executable, "-c", burn], check=True)
    found = environment(0, "cpu", 1, started)
    assert 0.3 <= found["cpu_seconds"] < 3.0
    assert found["seconds"] >= 0.3
    assert found["peak_rss_bytes"] > 400_000_000


def test_the_peak_of_a_run_outlives_the_measurement_of_a_stage():
    started = Started()
    before = environment(0, "cpu", 1, started)["peak_rss_bytes"]
    block = bytearray(b"x") * 200_000_000
    del block
    with measured():
        time.sleep(0.01)
    assert environment(0, "cpu", 1, started)["peak_rss_bytes"] > before + 150_000_000


def test_a_run_does_not_report_the_cost_of_the_run_before():
    first = Started()
    block = bytearray(b"x") * 200_000_000
    del block
    before = environment(0, "cpu", 1, first)
    with measured() as stage:
        time.sleep(0.01)
    if stage.peak_rss_bytes > before["peak_rss_bytes"] - 100_000_000:
        pytest.skip("this kernel does not let a process reset its peak")
    again = environment(0, "cpu", 1, Started())
    assert again["peak_rss_bytes"] < before["peak_rss_bytes"] - 100_000_000
    assert again["cpu_seconds"] < 1.0


def test_cost_is_left_out_of_a_comparison():
    found = environment(0, "cpu", 1, Started())
    assert not [key for key in without_timings(found) if "seconds" in key or "peak" in key]
