"""What a pruned model's report shows on a terminal and in a job summary."""

from __future__ import annotations

import copy

import pytest
from compress.cli import _render
from compress.cli._pruning import FINE_TUNING_REQUIRED
from compress.cli._tables import to_markdown, to_plain


def member(name, block, before, after, heads=None, head_dim=None):
    return {
        "name": name, "block": block, "before": before, "after": after, "heads": heads, "head_dim": head_dim,
    }  # fmt: skip


DETAILS = {
    "classes": [
        {"name": "ff", "kind": "ff", "channels": [1024, 384], "histogram": None,
         "members": [member("a.fc1", 0, 512, 128), member("b.fc1", 1, 512, 256)]},
        {"name": "attention", "kind": "attention", "channels": [256, 144], "histogram": None,
         "members": [member("a.q", 0, 128, 96, [4, 4], [32, 24]),
                     member("b.q", 1, 128, 48, [4, 2], [32, 24])]},
    ],
    "ranking": "isomorphic", "importance": "taylor", "samples": 64,
    "macs": [1_000_000, 500_000], "parameters": [2_000_000, 900_000], "paper_macs": None,
    "loss": {"name": "cross_entropy", "before": 0.5, "after": 1.25},
    "baselines": {"global": {"loss": 1.75, "macs": 501_000}},
}  # fmt: skip
TRAINED = {"steps": 400, "images": 5000, "lr": [], "loss": [[1, 2.0], [200, 1.0], [400, 0.5]]}


@pytest.fixture
def pruned(report):
    found = copy.deepcopy(report)
    found["stages"] = [
        {**found["stages"][0], "method": "isomorphic", "details": copy.deepcopy(DETAILS)},
        {**found["stages"][0], "method": "finetune", "details": copy.deepcopy(TRAINED)},
    ]
    return found


def shown(document):
    return "\n".join(to_plain(section) for section in _render.report(document))


def test_classes_widths_cost_and_training_are_shown(pruned):
    lines = [" ".join(line.split()) for line in shown(pruned).splitlines()]
    assert "feed-forward 2 1,024 384 37.5% 128 to 256" in lines
    assert "attention 2 256 144 56.2% 48 to 96" in lines
    assert "heads 2 8 6 75.0% 2 to 4" in lines
    assert "head channels 2 64 48 75.0% 24" in lines
    assert (
        "isomorphic: parameters 2 M -> 900 k (45.0%), multiply-accumulates 1 M -> 500 k (50.0%),"
        " scored on 64 calibration samples" in lines
    )
    loss = "isomorphic: loss on the calibration samples: 0.5 before; after: isomorphic 1.25, global 1.75"
    assert loss in lines
    assert "finetune: 400 steps on 5,000 images, training loss 2 -> 0.5" in lines
    assert FINE_TUNING_REQUIRED not in lines


def test_a_job_summary_has_the_same(pruned):
    text = "\n".join(to_markdown(section) for section in _render.report(pruned))
    assert "### isomorphic: removed" in text
    assert "| feed-forward | 2 | 1,024 | 384 | 37.5% | 128 to 256 |" in text


def test_a_recipe_without_recovery_is_told_that_it_needs_one(pruned):
    alone = {**pruned, "stages": pruned["stages"][:1]}
    assert FINE_TUNING_REQUIRED in shown(alone)
    before = {**pruned, "stages": pruned["stages"][::-1]}  # trained, then pruned
    assert FINE_TUNING_REQUIRED in shown(before)


def test_magnitude_says_that_it_looked_at_no_sample(pruned):
    details = pruned["stages"][0]["details"]
    details |= {"importance": "magnitude", "samples": 0, "loss": None, "baselines": {}}
    text = shown(pruned)
    assert "scored by the weights alone" in text
    assert "loss on the calibration samples" not in text


def test_a_plan_shows_what_it_knows(pruned):
    stage = pruned["stages"][0]
    planned = {
        "method": "isomorphic", "before": stage["before"], "after": stage["after"], "notes": [],
        "peak_memory_bytes": 1,
    }  # fmt: skip
    document = {"stages": [planned], "export": {"bytes": 1}}
    text = "\n".join(to_plain(section) for section in _render.plan(document))
    assert "what competed" not in text
    document["stages"] = [{**planned, "details": stage["details"]}, {**planned, "method": "finetune"}]
    text = "\n".join(to_plain(section) for section in _render.plan(document))
    assert "what competed" in text
    assert FINE_TUNING_REQUIRED not in text


def test_other_reports_say_nothing_of_pruning(report):
    text = shown(report)
    assert "what competed" not in text
    assert FINE_TUNING_REQUIRED not in text
