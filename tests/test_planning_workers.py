"""Memory of the processes that work for a stage."""

import pytest
from compress import planning
from compress.compressors.base import StagePlan
from compress.errors import PlanError
from compress.recipes.workers import RaySettings


def _needed(monkeypatch, workers, **changes) -> tuple[int, str]:
    """Return the bytes that a stage of 1000, with 100 in each worker, is said to need, and the message."""
    plan = StagePlan("eep", None, None, None, 1000, **{"worker_memory_bytes": 100, **changes})
    monkeypatch.setattr(planning.preflight, "total_memory_bytes", lambda: 1)
    with pytest.raises(PlanError) as caught:
        planning.check_memory([plan], workers)
    said = caught.value.message
    return int(said.partition("about ")[2].partition(" ")[0].replace(",", "")), said


def test_no_more_processes_are_counted_than_have_something_to_do(monkeypatch):
    process = planning._PROCESS_BYTES
    counts = {workers: _needed(monkeypatch, workers, most_workers=3) for workers in (1, 2, 3, 8)}
    assert [needed for needed, _ in counts.values()] == [
        1000 + process, 1200 + 3 * process, 1300 + 4 * process, 1300 + 4 * process,
    ]  # fmt: skip
    assert "with 3 workers" in counts[8][1] and "workers" not in counts[1][1]
    assert _needed(monkeypatch, 8, most_workers=1)[0] == counts[1][0]
    assert _needed(monkeypatch, 8)[0] == 1800 + 9 * process


def test_actors_of_a_cluster_are_counted_by_the_cluster(monkeypatch):
    assert _needed(monkeypatch, RaySettings(4))[0] == 1000 + planning._PROCESS_BYTES
