"""The loop: phases, budgets, starts, the same result for any number of workers, a planted optimum."""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from compress.compressors.pruning.experts import evolution
from compress.compressors.pruning.experts.archive import Archive
from compress.compressors.pruning.experts.evolution import Search, choose, evolve, in_turn
from compress.compressors.pruning.experts.genome import Individual, Space, given_choice, is_one_hot
from compress.errors import StageError
from compress.progress import SilentProgress
from compress.recipes.experts import EepSettings
from compress.runtime import atomic


@pytest.fixture(scope="module", autouse=True)
def unflushed():
    """Leave out the flushing of every file to the disk, which these tests do not need; half of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_sync", lambda path: None)
        yield


def chosen_by(search, archive, second=None):
    return choose(search, archive, second and in_turn(second), progress=SilentProgress())


@pytest.fixture(scope="module")
def default(landscape, tmp_path_factory):
    """Return (search, its finished archive) on the landscape with two phases."""
    search = landscape.search()
    return search, landscape.finished(tmp_path_factory.mktemp("default"), search)


def test_phases_have_the_evaluations_that_are_set(default):
    search, archive = default
    records = archive.first(search.total_evals)
    assert len(archive) == 70
    assert [record.origin["phase"] for record in records] == [1] * 40 + [2] * 30
    assert [record.origin["kind"] for record in records[:8]] == ["random"] * 8
    assert {record.origin["kind"] for record in records[8:40]} == {"mutation"}
    assert {record.origin["kind"] for record in records[40:]} == {"mutation", "crossover"}


def test_individuals_that_choose_are_distinct_one_hot_rows_of_both_matrices(default):
    search, archive = default
    assert all(record.individual.is_choice for record in archive.first(40))
    assert not any(record.individual.is_choice for record in archive.first(70)[40:])


def test_no_individual_is_evaluated_twice(default):
    _, archive = default
    assert len({record.individual.sha256 for record in archive.first(70)}) == 70


def test_a_child_differs_from_a_single_parent_in_flagged_groups_only(default):
    _, archive = default
    some_untouched = False
    for record in archive.first(70)[8:]:
        if record.origin["kind"] != "mutation":
            continue
        (parent,) = record.origin["parents"]
        assert parent < record.index
        before, after = archive[parent].individual.experts, record.individual.experts
        same = (before == after).all(axis=(1, 2))
        assert not same.all()
        some_untouched |= bool(same.any())
    assert some_untouched


def test_the_best_so_far_never_falls(default):
    search, archive = default
    best = [row["best"] for row in archive.history(70)]
    assert best == sorted(best)
    assert best[-1] == max(record.fitness for record in archive.first(70))


def test_parents_are_within_three_points_of_the_best_known_before(default):
    _, archive = default
    for record in archive.first(70)[8:]:
        if record.origin["kind"] == "mutation":
            known = [archive[index].fitness for index in range(record.index)]
            assert archive[record.origin["parents"][0]].fitness >= max(known) - 3.0


def test_the_planted_choice_and_then_something_better_is_found(landscape, tmp_path):
    for seed in (0, 1):
        search = landscape.search(seed, prune_evals=120, total_evals=320)
        archive = landscape.finished(tmp_path / str(seed), search)
        found = chosen_by(search, archive)
        assert landscape.right(found.pruned.individual) == 9  # one choice of 8,000
        assert found.pruned.index < 120
        assert found.best.fitness > found.pruned.fitness + 5.0
        assert found.best.fitness == max(record.fitness for record in archive.first(320))
        merged = np.abs(found.best.individual.experts - landscape.blend()).mean()
        assert merged < np.abs(found.pruned.individual.experts - landscape.blend()).mean()


def test_choosing_beats_as_many_random_draws(landscape, tmp_path):
    bred = landscape.search(prune_evals=150, total_evals=150)
    drawn = landscape.search(init_random=150, prune_evals=150, total_evals=150, seed_heuristics=False)
    best = [
        max(record.fitness for record in landscape.finished(tmp_path / name, one).first(150))
        for name, one in (("bred", bred), ("drawn", drawn))
    ]
    assert best[0] > best[1]


def test_a_frozen_router_stays_one_hot_to_the_end(default):
    _, archive = default
    assert all(is_one_hot(record.individual.router) for record in archive.first(70))


def test_a_free_router_is_mixed_as_well(landscape, tmp_path):
    search = landscape.search(router="free", export="custom")
    records = landscape.finished(tmp_path, search).first(70)
    assert all(record.individual.is_choice for record in records[:40])
    assert not all(is_one_hot(record.individual.router) for record in records[40:])
    apart = [
        not np.array_equal(record.individual.router, record.individual.experts) for record in records[40:]
    ]
    assert all(apart)


def test_two_parents_make_the_share_of_children_that_is_set(landscape, tmp_path):
    search = landscape.search(total_evals=440)
    archive = landscape.finished(tmp_path, search)
    crossed = sum(record.origin["kind"] == "crossover" for record in archive.first(440))
    assert abs(crossed - 400 * 0.3) <= 3 * (400 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_row_sums_are_divided_by_as_often_as_is_set(landscape, tmp_path, chance, share):
    search = landscape.search(total_evals=240, norm_prob=chance, crossover=0.0, group_flag=1.0)
    merged = landscape.finished(tmp_path, search, lambda individual: 0.0).first(240)[40:]
    sums = np.stack([record.individual.experts.sum(axis=2) for record in merged])
    divided = (np.abs(sums - 1.0) < 1e-5).all(axis=(1, 2)).sum()
    assert abs(divided - 200 * share) <= 3 * (200 * share * (1 - share)) ** 0.5


def test_equal_seeds_give_equal_bytes_and_others_do_not(landscape, tmp_path):
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        landscape.finished(tmp_path / name, landscape.search(seed))
    files = [landscape.files(tmp_path / name) for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_the_global_generator_is_left_alone(landscape, tmp_path):
    before = np.random.get_state()[1].copy()
    landscape.finished(tmp_path, landscape.search())
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("lag", [1, 4])
def test_any_number_of_workers_gives_the_same_bytes(landscape, tmp_path, lag):
    search = landscape.search(lag=lag)
    landscape.finished(tmp_path / "one", search, landscape.coarse)
    expected = landscape.files(tmp_path / "one")
    with ThreadPoolExecutor(4) as pool:
        threads = lambda individual: pool.submit(landscape.slowly, individual)  # noqa: E731
        landscape.finished(tmp_path / "threads", search, submit=threads)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        processes = lambda individual: pool.submit(landscape.slowly, individual)  # noqa: E731
        landscape.finished(tmp_path / "processes", search, submit=processes)
    assert landscape.files(tmp_path / "threads") == expected
    assert landscape.files(tmp_path / "processes") == expected


def backwards(landscape, lag, waiting):
    """Return a `Submit` that finishes the latest evaluation first, once `lag` of them wait."""

    def submit(individual):
        future = Future()
        waiting.append((future, individual))
        if len(waiting) == lag:
            while waiting:
                last, what = waiting.pop()
                last.set_result(landscape.coarse(what))
        return future

    return submit


def test_as_many_evaluations_as_the_lag_go_on_at_once_and_their_order_does_not_count(landscape, tmp_path):
    search = landscape.search(lag=5, init_random=10)
    landscape.finished(tmp_path / "one", search, landscape.coarse)
    # It would wait for ever if the search gave it fewer than 5 at once; 10 and 70 are multiples of 5.
    landscape.finished(tmp_path / "late", search, submit=backwards(landscape, 5, []))
    assert landscape.files(tmp_path / "late") == landscape.files(tmp_path / "one")


def test_a_child_does_not_know_what_is_within_the_lag(landscape, tmp_path):
    archive = landscape.finished(tmp_path, landscape.search(lag=10))
    for record in archive.first(70)[8:]:
        known = max(8, record.index - 10 + 1)  # the first individuals are known to all
        assert max(record.origin["parents"]) < known


GIVEN = [[[0, 2, 5], [1, 2, 3], [0, 1, 4]], [[0, 1, 2]] * 3, [[2, 1, 0]] * 3]


def test_given_individuals_are_evaluated_behind_the_random_ones_and_equal_ones_once(landscape, tmp_path):
    names = ("naee", "frequency", "soft_activation")
    given = {name: given_choice(landscape.SPACE, kept, name) for name, kept in zip(names, GIVEN, strict=True)}
    search = landscape.search(given=given)
    archive = landscape.finished(tmp_path / "given", search)
    assert [archive[index].origin.get("name") for index in (7, 8, 9, 10)] == [None, "naee", "frequency", None]
    found = chosen_by(search, archive)
    assert {name: record.index for name, record in found.given.items()} == {
        "naee": 8, "frequency": 9, "soft_activation": 9,
    }  # fmt: skip
    assert found.pruned.fitness >= max(record.fitness for record in found.given.values())
    plain = landscape.finished(tmp_path / "plain", landscape.search())
    assert [plain[index].individual.sha256 for index in range(8)] == [
        archive[index].individual.sha256 for index in range(8)
    ]  # the random ones are the same with and without


def test_a_given_individual_that_was_drawn_is_not_evaluated_again(landscape, tmp_path):
    drawn = landscape.finished(tmp_path / "plain", landscape.search())[3].individual
    search = landscape.search(given={"frequency": drawn})
    archive = landscape.finished(tmp_path / "given", search)
    assert chosen_by(search, archive).given["frequency"].index == 3
    assert archive[8].origin["kind"] == "mutation"


def test_what_is_given_has_to_be_a_choice_of_this_space(landscape, tmp_path):
    other = given_choice(Space(1, 3, 6), [[0, 1, 2]], "naee")
    with pytest.raises(ValueError, match="naee is no choice"):
        landscape.finished(tmp_path, landscape.search(given={"naee": other}))


def test_where_all_experts_stay_merging_starts_from_the_identity(landscape, tmp_path):
    space = Space(2, 4, 4)
    search = Search(space, EepSettings(total_evals=60), seed=1)

    def evaluate(individual):
        return 100.0 - float(np.square(individual.experts - np.eye(4) * 1.3).sum())

    archive = landscape.finished(tmp_path, search, evaluate)
    found = chosen_by(search, archive)
    assert np.array_equal(archive[0].individual.experts, np.stack([np.eye(4)] * 2))
    assert [record.origin["phase"] for record in archive.first(60)] == [1] + [2] * 59
    assert found.pruned is None
    assert found.best.fitness > archive[0].fitness
    assert np.array_equal(found.best.individual.router, archive[0].individual.router)


def test_a_space_with_few_choices_is_searched_completely(landscape, tmp_path):
    space = Space(1, 2, 4)
    search = Search(space, EepSettings(keep_experts=2, total_evals=110), seed=0)
    assert (search.prune_evals, search.total_evals) == (6, 110)
    records = landscape.finished(tmp_path / "a", search, lambda individual: 0.0).first(110)
    choices = {tuple(record.individual.experts.argmax(axis=2)[0].tolist()) for record in records[:6]}
    assert choices == set(itertools.combinations(range(4), 2))
    bred = Search(space, EepSettings(keep_experts=2, init_random=1, prune_evals=6, total_evals=6), seed=0)
    records = landscape.finished(tmp_path / "b", bred, lambda individual: 0.0).first(6)
    assert len({record.individual.sha256 for record in records}) == 6


def test_choices_keep_the_share_of_every_pool_to_the_end(landscape, tmp_path):
    space = Space(groups=2, kept=4, experts=8, pools=2)
    search = Search(space, landscape.settings(keep_experts=4), seed=0)
    for record in landscape.finished(tmp_path, search, lambda individual: 0.0).first(70):
        assert (record.individual.router[:, :2, :4].sum(axis=(1, 2)) == 2).all()
        assert (record.individual.router[:, 2:, 4:].sum(axis=(1, 2)) == 2).all()


def test_the_best_are_scored_again_and_the_second_score_decides(landscape, tmp_path):
    search = landscape.search()
    archive = landscape.finished(tmp_path, search)
    asked = []

    def second(individual):
        asked.append(individual.sha256)
        return -landscape.fitness(individual)  # of the fittest 20 the least fit has the best second score

    found = chosen_by(search, archive, second)
    order = sorted(archive.first(70), key=lambda record: (-record.fitness, record.index))
    choices = [record for record in order if record.index < 40]
    assert found.best is archive[order[19].index]
    assert found.pruned.fitness == choices[19].fitness
    assert set(asked) == {record.individual.sha256 for record in [*order[:20], *choices[:20]]}
    assert len(asked) == len(set(asked))
    again = chosen_by(search, archive, lambda individual: pytest.fail("it was kept"))
    assert again == found


def test_of_equal_second_scores_the_better_first_score_counts(landscape, tmp_path):
    search = landscape.search()
    archive = landscape.finished(tmp_path, search)
    found = chosen_by(search, archive, lambda individual: 50.0)
    assert found.best.fitness == max(record.fitness for record in archive.first(70))


def test_second_scores_of_several_workers_are_those_of_one(landscape, tmp_path):
    search = landscape.search(lag=3)
    for name in ("one", "four"):
        landscape.finished(tmp_path / name, search, landscape.coarse)
    one = chosen_by(search, Archive(tmp_path / "one", landscape.KEY, landscape.SPACE), landscape.slowly)
    four = Archive(tmp_path / "four", landscape.KEY, landscape.SPACE)
    with ThreadPoolExecutor(4) as pool:
        found = choose(
            search,
            four,
            lambda individual: pool.submit(landscape.slowly, individual),
            progress=SilentProgress(),
        )
    assert (found.best.index, found.pruned.index) == (one.best.index, one.pruned.index)
    assert landscape.files(tmp_path / "one") == landscape.files(tmp_path / "four")


def test_second_scores_are_kept_one_by_one(landscape, tmp_path):
    search = landscape.search()
    landscape.finished(tmp_path, search)
    asked = []

    def second(individual):
        if len(asked) == 7:
            raise RuntimeError("out of memory")
        asked.append(individual.sha256)
        return 1.0

    with pytest.raises(RuntimeError, match="out of memory"):
        chosen_by(search, Archive(tmp_path, landscape.KEY, landscape.SPACE), second)
    assert len(list(tmp_path.glob("dev-*.json"))) == 7
    kept, asked[:] = list(asked), []
    archive = Archive(tmp_path, landscape.KEY, landscape.SPACE)
    chosen_by(search, archive, lambda individual: asked.append(individual.sha256) or 1.0)
    assert not set(asked) & set(kept)


@pytest.mark.parametrize("lag", [1, 4])
def test_an_evaluation_that_fails_leaves_what_is_finished(landscape, tmp_path, lag):
    count = itertools.count()

    def evaluate(individual):
        if next(count) == 21:
            raise RuntimeError("out of memory")
        return landscape.fitness(individual)

    search = landscape.search(lag=lag)
    with pytest.raises(RuntimeError, match="out of memory"), ThreadPoolExecutor(1) as pool:
        landscape.finished(
            tmp_path / "a", search, submit=lambda individual: pool.submit(evaluate, individual)
        )
    kept = Archive(tmp_path / "a", landscape.KEY, landscape.SPACE)
    assert len(kept) >= 21
    landscape.finished(tmp_path / "a", search)
    landscape.finished(tmp_path / "b", search)
    assert landscape.files(tmp_path / "a") == landscape.files(tmp_path / "b")


def test_what_finishes_beside_a_failure_is_kept(landscape, tmp_path):
    waiting = []

    def submit(individual):
        waiting.append((Future(), individual))
        future = waiting[-1][0]
        if len(waiting) == 4:
            waiting[0][0].set_exception(RuntimeError("out of memory"))
            for other, what in waiting[1:]:
                other.set_result(landscape.fitness(what))
        return future

    search = landscape.search(lag=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        landscape.finished(tmp_path, search, submit=submit)
    kept = Archive(tmp_path, landscape.KEY, landscape.SPACE)
    assert [record.index for record in kept.records()] == [1, 2, 3]


def test_a_fitness_that_is_no_number_ends_the_search(landscape, tmp_path):
    with pytest.raises(StageError, match="evaluation 0: the fitness is nan"):
        landscape.finished(tmp_path, landscape.search(), lambda individual: float("nan"))


def test_an_archive_that_this_search_would_not_have_bred_is_refused(landscape, tmp_path):
    landscape.finished(tmp_path, landscape.search(0))
    with pytest.raises(StageError, match="evaluation 0 of the kept archive") as caught:
        landscape.finished(tmp_path, landscape.search(1))
    assert "start over" in caught.value.hint


def test_a_search_that_can_breed_nothing_new_says_so(landscape, tmp_path):
    search = landscape.search(mut_entry=1e-12, norm_prob=0.0, crossover=0.0)
    with pytest.raises(StageError, match="evaluation 40: none of 200 children") as caught:
        landscape.finished(tmp_path, search)
    assert "mut_entry" in caught.value.hint


def test_a_longer_search_goes_on_from_a_shorter_one(landscape, tmp_path):
    short, long = landscape.search(total_evals=50), landscape.search(total_evals=60)
    assert short.key("w") == long.key("w")
    landscape.finished(tmp_path, short)
    asked = []

    def evaluate(individual):
        asked.append(individual)
        return landscape.fitness(individual)

    landscape.finished(tmp_path, long, evaluate)
    assert len(asked) == 10


def test_the_key_holds_all_that_decides(landscape):
    one = landscape.search()
    given = {"naee": given_choice(landscape.SPACE, GIVEN[0], "naee")}
    others = [
        landscape.search(seed=1), landscape.search(given=given), landscape.search(lag=2),
        landscape.search(mut_row=0.2), landscape.search(prune_evals=41),
        Search(Space(2, 3, 6), one.settings, 0), Search(Space(3, 3, 6, pools=3), one.settings, 0),
    ]  # fmt: skip
    keys = {search.key("w") for search in (one, *others)}
    assert len(keys) == 8
    assert one.key("v") not in keys


def test_progress_is_told_of_every_evaluation(landscape, tmp_path):
    class Told(SilentProgress):
        def __init__(self):
            self.units, self.steps = 0, []

        def start(self, label, total):
            self.steps.append((label, total))

        def advance(self, units=1, detail=""):
            self.units += units

    for _ in range(2):  # the second time all of them are there
        told = Told()
        archive = Archive(tmp_path, landscape.KEY, landscape.SPACE)
        evolve(landscape.search(), archive, in_turn(landscape.fitness), told)
        assert (told.units, told.steps) == (70, [("evolution", 70)])


def test_the_search_loads_no_torch():
    import subprocess
    import sys

    program = f"import sys, {evolution.__name__}; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_individual_goes_to_another_process_and_back(landscape):
    import pickle  # of the standard library's process pools; nothing of it is kept

    individual = Individual(landscape.blend(), landscape.blend())
    again = pickle.loads(pickle.dumps(individual))
    assert again.sha256 == individual.sha256
