"""The archive: what was evaluated survives, whole; what is damaged or foreign is refused by name."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compress.compressors.pruning.experts.archive import Archive, Record
from compress.compressors.pruning.experts.genome import Individual, random_choice
from compress.errors import StageError
from safetensors.numpy import load_file, save_file

ORIGIN = {"kind": "random", "phase": 1, "parents": []}
PROGRAM = Path(__file__).with_name("landscape.py")


@pytest.fixture
def records(landscape):
    generator = np.random.default_rng(0)
    choice = random_choice(landscape.SPACE, generator)
    noise = generator.standard_normal(landscape.SPACE.shape).astype(np.float32)
    return [
        Record(0, choice, 100 / 3, ORIGIN),
        Record(1, Individual(choice.router, choice.experts + noise), -math.inf, {**ORIGIN, "parents": [0]}),
        Record(2, Individual(choice.router + noise, choice.experts), 5e-324, ORIGIN),
    ]


@pytest.fixture
def kept(landscape, records, tmp_path):
    """Return the folder of an archive with three records, added out of order."""
    archive = Archive(tmp_path / "kept", landscape.KEY, landscape.SPACE)
    for index in (2, 0, 1):
        archive.add(records[index])
    archive.add_second(records[0], 1 / 7)
    return tmp_path / "kept"


def test_what_is_added_is_read_again_bit_for_bit(landscape, records, kept):
    again = Archive(kept, landscape.KEY, landscape.SPACE)
    assert len(again) == 3
    for record, found in zip(records, again.first(3), strict=True):
        assert (found.index, found.fitness, found.origin) == (record.index, record.fitness, record.origin)
        assert found.individual.sha256 == record.individual.sha256
        assert np.array_equal(found.individual.experts, record.individual.experts)
    assert again.second(records[0]) == 1 / 7
    assert [again.has_second(record) for record in records] == [True, False, False]
    assert 2 in again
    assert 3 not in again


def test_nothing_but_safetensors_and_json_is_written(kept):
    assert sorted(path.suffix for path in kept.iterdir()) == [".json", *[".safetensors"] * 3]


def test_history_tells_the_best_so_far(landscape, kept):
    rows = Archive(kept, landscape.KEY, landscape.SPACE).history(3)
    assert [row["fitness"] for row in rows] == [100 / 3, None, 5e-324]
    assert [row["best"] for row in rows] == [100 / 3] * 3
    assert rows[1]["parents"] == [0]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_what_is_no_score_is_refused(landscape, records, tmp_path, score):
    archive = Archive(tmp_path / "a", landscape.KEY, landscape.SPACE)
    with pytest.raises(StageError, match=f"evaluation 7: the fitness is {score}"):
        archive.add(Record(7, records[0].individual, score, ORIGIN))
    with pytest.raises(StageError, match="second score of evaluation 0"):
        archive.add_second(records[0], score)
    assert len(archive) == 0
    assert list((tmp_path / "a").iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def without_header(path):
    save_file(load_file(path), path)


def other_shape(path):
    save_file({"choice": np.zeros((3, 9), np.int64)}, path, metadata={"evaluation": "{}"})


@pytest.mark.parametrize(
    "damage", [cut, flip, without_header, other_shape, lambda path: path.write_bytes(b"")]
)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_damaged_file_is_named(landscape, kept, damage, index):
    path = kept / f"{index:06d}.safetensors"
    damage(path)
    with pytest.raises(StageError) as caught:
        Archive(kept, landscape.KEY, landscape.SPACE)
    assert str(path) in str(caught.value)
    assert "remove this file" in caught.value.hint


def test_a_damaged_second_score_is_named(landscape, kept):
    path = kept / "dev-000000.json"
    path.write_text('{"fitness": ', encoding="utf-8")
    with pytest.raises(StageError, match="dev-000000.json"):
        Archive(kept, landscape.KEY, landscape.SPACE)


@pytest.mark.parametrize("name", ["000001.safetensors", "dev-000000.json"])
def test_an_evaluation_of_another_search_is_refused(landscape, kept, name):
    for path in kept.iterdir():
        if path.name != name:
            path.unlink()
    with pytest.raises(StageError, match="of another search"):
        Archive(kept, "1" * 64, landscape.SPACE)


def run(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), *map(str, arguments)],
        env=environment,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def undisturbed(landscape, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "archive"
    landscape.finished(folder, landscape.search(lag=3), landscape.coarse)
    return landscape.files(folder)


@pytest.mark.parametrize(("count", "when"), [(1, "before"), (12, "after"), (50, "before")])
def test_a_process_that_dies_around_a_write_leaves_nothing_half_done(
    landscape, undisturbed, tmp_path, count, when
):
    folder = tmp_path / "archive"
    assert run(folder, 1, 3, count, when).wait(timeout=60) == -signal.SIGKILL
    left = Archive(folder, landscape.KEY, landscape.SPACE)  # reads every file, and checks it
    assert len(left) == count - (when == "before")
    landscape.finished(folder, landscape.search(lag=3), landscape.coarse)
    assert landscape.files(folder) == undisturbed


def test_a_search_that_is_killed_again_and_again_ends_with_the_same_archive(landscape, undisturbed, tmp_path):
    folder, moments = tmp_path / "archive", random.Random(3)
    kept = 0
    for _ in range(4):
        # Some files later, and then anywhere: while a child is bred, awaited or written. An evaluation takes
        # more than 200 calls, so that four times 12 of them and a few more are not all 70.
        renames, calls = moments.randint(5, 12), moments.randint(1, 600)
        assert run(folder, 2, 3, renames, calls).wait(timeout=60) == -signal.SIGKILL
        left = len(Archive(folder, landscape.KEY, landscape.SPACE))  # reads every file, and checks it
        assert kept + renames <= left < len(undisturbed)
        kept = left
    assert run(folder, 2, 3).wait(timeout=60) == 0
    assert landscape.files(folder) == undisturbed


def test_what_is_finished_is_not_evaluated_again(landscape, tmp_path):
    archive = landscape.finished(tmp_path / "a", landscape.search(), landscape.coarse)
    (tmp_path / "a" / "000033.safetensors").unlink()
    asked = []

    def evaluate(individual):
        asked.append(individual.sha256)
        return landscape.coarse(individual)

    again = landscape.finished(tmp_path / "a", landscape.search(), evaluate)
    assert asked == [archive[33].individual.sha256]
    assert [record.fitness for record in again.first(70)] == [record.fitness for record in archive.first(70)]
