"""What a pruned model's report shows on a terminal and in a job summary."""

from __future__ import annotations

import copy

import pytest
from compress.cli import _render
from compress.cli._tables import to_markdown, to_plain

REQUIRED = "fine-tuning required: no stage trains the model after it is pruned"


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
    trained = "finetune: 400 steps on 5,000 images, training loss 2 -> 0.5 (means of the first and the last"
    assert f"{trained} twelfth)" in lines
    assert REQUIRED not in shown(pruned)


def test_images_that_a_training_left_out_are_counted(pruned):
    pruned["stages"][1]["details"] |= {"skipped": 2, "held_out": 1}
    lines = " ".join(shown(pruned).split())
    left_out = "2 more cannot be read and are left out; 1 more is a held-out image and is left out"
    assert f"on 5,000 images; {left_out}; training loss 2 -> 0.5" in lines
    pruned["stages"][1]["details"] |= {"skipped": 0, "held_out": 13}
    lines = " ".join(shown(pruned).split())
    assert "on 5,000 images; 13 more are held-out images and are left out; training loss 2" in lines


def test_a_job_summary_has_the_same(pruned):
    text = "\n".join(to_markdown(section) for section in _render.report(pruned))
    assert "### isomorphic: removed" in text
    assert "| feed-forward | 2 | 1,024 | 384 | 37.5% | 128 to 256 |" in text


def test_a_recipe_without_recovery_is_told_that_it_needs_one(pruned):
    alone = {**pruned, "stages": pruned["stages"][:1]}
    assert REQUIRED in shown(alone)
    before = {**pruned, "stages": pruned["stages"][::-1]}  # trained, then pruned
    assert REQUIRED in shown(before)


def test_magnitude_says_that_it_looked_at_no_sample(pruned):
    details = pruned["stages"][0]["details"]
    details |= {"importance": "magnitude", "samples": 0, "loss": None, "baselines": {}}
    text = shown(pruned)
    assert "scored by the weights alone" in text and "sample" not in text.split("scored by")[1].split("\n")[0]
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
    assert REQUIRED not in text


def test_other_reports_say_nothing_of_pruning(report):
    text = shown(report)
    assert "what competed" not in text
    assert REQUIRED not in text


def test_accuracy_right_after_pruning_is_shown(pruned):
    assert "right after it" not in shown(pruned)
    measured = {"accuracy": 0.747, "accuracy_original": 0.896, "top1_agreement": 0.792}
    pruned["stages"][0]["details"]["measured"] = measured
    line = (
        "isomorphic: right after it, on held-out images: accuracy 74.70%, of the original 89.60%;"
        " 79.20% answered as the original does"
    )
    assert line in shown(pruned).splitlines()


def test_a_denoiser_is_told_of_the_stage_for_denoisers(pruned):
    alone = {**pruned, "stages": pruned["stages"][:1], "model": {**pruned["model"], "family": "dit"}}
    (line,) = [line for line in shown(alone).splitlines() if line.startswith(REQUIRED)]
    assert line.endswith("; the stage for it is distill")


def test_what_a_denoiser_was_trained_on(pruned):
    details = pruned["stages"][1]["details"]
    details["data"] = details.pop("images")
    details["data"] = 2000
    assert "steps on 2,000 latents," in shown(pruned)


@pytest.mark.parametrize(
    ("export", "text"),
    [
        ({"bytes": 689_000}, "689 kB"),
        (
            {"bytes": 705_000, "bytes_at_most": 1_370_000, "bytes_unpadded": 689_000},
            "705 kB to 1.37 MB, padded to the widest layers, which scores decide (see --with-scores);"
            " without padding 689 kB",
        ),
        (
            {"bytes": 850_000, "bytes_at_most": 850_000, "bytes_unpadded": 689_000},
            "850 kB, padded to equal widths; without padding 689 kB",
        ),
    ],
)
def test_a_plan_says_what_padding_costs(export, text):
    sections = _render.plan({"stages": [], "export": export})
    assert sections == [f"predicted size of the exported weights: {text}"]
