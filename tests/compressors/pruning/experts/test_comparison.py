import math
from statistics import fmean, stdev

import numpy as np
import pytest
from compress.calibration.answer_scores import Score
from compress.compressors.pruning.experts.comparison import Contender, compared, spread
from compress.compressors.pruning.experts.genome import Space, individual_of
from compress.progress import SilentProgress

SPACE = Space(1, 2, 4)
CHOICES = [individual_of(np.array([pair]), 4) for pair in ((0, 1), (0, 2), (1, 3))]
SCORES = {choice.sha256: score for choice, score in zip(CHOICES, (90.0, 70.0, None), strict=True)}


class Judge:
    """Scores by a table, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, individual) -> Score:
        self.asked.append(individual.sha256)
        points = SCORES[individual.sha256]
        if points is None:
            return Score(-math.inf, None, None, 8)
        return Score(points, points / 100, 0.5, 8, 0.25)


class Scorer:
    def score(self) -> Score:
        return Score(99.0, 0.99, 0.1, 8, 0.01)


def test_rows_come_in_order_and_an_individual_is_scored_once() -> None:
    judge = Judge()
    contenders = [
        Contender("original", None, 98.76543),
        Contender("a", CHOICES[0]),
        Contender("b", CHOICES[1], -math.inf),
        Contender("c", CHOICES[0], 91.0),
    ]
    rows = compared(judge, Scorer(), contenders, SilentProgress())
    assert [(row["name"], row["score"]) for row in rows] == [
        ("original", 99.0), ("a", 90.0), ("b", 70.0), ("c", 90.0)
    ]  # fmt: skip
    assert judge.asked == [CHOICES[0].sha256, CHOICES[1].sha256]
    assert rows[0]["train"] == 98.7654 and rows[3]["train"] == 91.0
    assert "train" not in rows[1] and "train" not in rows[2]
    assert rows[1]["standard_error"] == pytest.approx(math.sqrt(0.25 / 8)) and rows[1]["count"] == 8


def test_random_choices_are_one_row_and_failed_ones_are_counted() -> None:
    draws = [Contender("random", one, train) for one, train in zip(CHOICES, (80.0, 60.0, 1.0), strict=True)]
    found = spread(compared(Judge(), Scorer(), draws, SilentProgress()))
    assert (found["draws"], found["failed"], found["count"]) == (3, 1, 8)
    assert found["score"] == fmean((90.0, 70.0)) and found["score_deviation"] == round(stdev((90.0, 70.0)), 4)
    assert found["accuracy"] == 0.8 and found["deviation"] == round(stdev((0.9, 0.7)), 6)
    assert found["train"] == 70.0


def test_one_random_choice_has_no_deviation_and_failures_alone_no_score() -> None:
    one = spread(compared(Judge(), Scorer(), [Contender("random", CHOICES[0])], SilentProgress()))
    assert one["score"] == 90.0 and one["score_deviation"] is None and "train" not in one
    none = spread(compared(Judge(), Scorer(), [Contender("random", CHOICES[2], 3.0)], SilentProgress()))
    assert none["score"] is None and none["failed"] == 1 and "accuracy" not in none and "train" not in none
