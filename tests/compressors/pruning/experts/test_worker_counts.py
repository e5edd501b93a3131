"""How many workers a search has something to do for, with how many threads, and where actors fit."""

import pytest
import torch
from compress.compressors.pruning.experts.ray_workers import Place, _room
from compress.compressors.pruning.experts.workers import idle_note, submitters, threads_of_each
from compress.errors import UsageError
from compress.recipes.workers import RaySettings
from compress.runtime.threads import computing_with


@pytest.mark.parametrize(("cores", "lag", "threads"), [(1, 1, 1), (8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_threads_follow_from_the_lag_alone(cores, lag, threads):
    with computing_with(cores):
        assert threads_of_each(lag) == threads


def test_more_workers_than_the_lag_are_told_to_have_nothing_to_do():
    with computing_with(8):
        assert idle_note(1, 1) is None and idle_note(4, 4) is None and idle_note(RaySettings(), 1) is None
        assert idle_note(4, 1).startswith("4 workers, but only 1 evaluation goes on at once")
        assert idle_note(RaySettings(3), 2).startswith("3 workers, but only 2 evaluations go on at once")
        assert "--workers 4 is faster" in idle_note(2, 4)
    with computing_with(2):
        assert "--workers 2 is faster" in idle_note(1, 4)
        assert idle_note(2, 4) is None


def test_one_process_is_this_one_with_the_threads_of_all_and_what_is_open_is_used(landscape, tmp_path):
    seen = []

    def here(individual):
        seen.append(torch.get_num_threads())
        return landscape.coarse(individual)

    for workers, lag in ((1, 4), (3, 1)):  # of three, two would have nothing to do
        seen.clear()
        with computing_with(8), submitters(None, workers, lag=lag, here=here) as submit:
            landscape.finished(tmp_path / f"{workers}", landscape.search(lag=lag), submit=submit)
        assert len(seen) == 70 and set(seen) == {8 // lag}


def test_an_actor_takes_a_gpu_or_the_cpus_of_its_threads():
    on_cpu, on_gpu = Place("cpu", 4, 10_000), Place("cuda:0", 4, 10_000)
    assert on_cpu.needs(16.0) == {"num_gpus": 0, "num_cpus": 4, "memory": 10_000}
    assert on_cpu.needs(2.0)["num_cpus"] == 2  # more than the largest node has would never get a place
    assert on_gpu.needs(16.0) == {"num_gpus": 1, "num_cpus": 1}
    large = {"CPU": 16.0, "GPU": 2.0, "memory": 35_000.0}
    assert _room(large, on_cpu.needs(16.0)) == 3  # the memory is enough for three
    assert _room(large, on_gpu.needs(16.0)) == 2
    assert _room({"CPU": 16.0, "memory": 35_000.0}, on_gpu.needs(16.0)) == 0
    assert _room({"CPU": 7.0, "memory": 1e9}, on_cpu.needs(16.0)) == 1


def test_a_gpu_that_no_actor_can_have_is_refused():
    for device in ("cpu", "cuda", "cuda:0"):
        Place(device, 1).check()
    with pytest.raises(UsageError, match="cuda:1: an actor of a Ray cluster sees one GPU"):
        Place("cuda:1", 1).check()
