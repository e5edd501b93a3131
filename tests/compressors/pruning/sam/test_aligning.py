"""Aligning: what stays, at which rates, and going on where it was stopped."""

import json
import shutil

import pytest
import torch
from compress.compressors.pruning.sam.aligning import rate_after
from compress.errors import StageError

from ....tiny_sam import tiny_sam
from .learners import (
    MemoryScenes,
    OutputJudge,
    ScriptedJudge,
    Told,
    embedded,
    models,
    narrower,
    run_align,
    same,
    settings_of,
    slimmer,
    state,
)


def _encoder_apart(one, other):
    return not same(
        {name: item for name, item in one.items() if name.startswith("vision_encoder.")},
        {name: item for name, item in other.items() if name.startswith("vision_encoder.")},
    )


def _rates(values, patience, higher=True):
    judge = ScriptedJudge()
    if not higher:
        judge.better = lambda value, other: value < other
    rows = [[step, value] for step, value in enumerate(values)]
    return [rate_after(rows[: end + 1], judge, lr=8.0, patience=patience) for end in range(len(rows))]


def test_the_rate_is_halved_when_nothing_improved_for_some_epochs():
    assert _rates([1, 2, 2, 1.5, 3, 1, 1, 1, 1, 4, 4, 4], 2) == [8, 8, 8, 4, 4, 4, 2, 2, 1, 1, 1, 0.5]
    assert _rates([1, 2, 2, 1.5, 3, 1, 1], 4) == [8] * 7
    assert _rates([3, 2, 4, 1, 5, 5], 2, higher=False) == [8, 8, 8, 8, 8, 4]
    assert _rates([1, 1], 1) == [8, 4]  # the weights from before training are the first to be beaten


def test_the_output_comes_nearer_in_both_phases(tmp_path):
    original, first, _ = models()
    judge = OutputJudge(original, MemoryScenes(4, seed=7))
    before = state(original)
    one = run_align(first, original, judge, tmp_path / "1", settings=settings_of(steps=12))
    second = slimmer(first)
    kept = state(first)
    two = run_align(
        second, original, judge, tmp_path / "2", phase="bottleneck", previous=first,
        settings=settings_of(steps=12),
    )  # fmt: skip
    for found, module in ((one, first), (two, second)):
        steps = [step for step, _, _ in found.epochs]
        assert steps == [0, 3, 5, 8, 10, 12]  # 10 images in batches of 4: whole epochs, and the last step
        values = [value for _, value, _ in found.epochs]
        assert found.best_value == min(values) == judge.measure(module) < 0.97 * values[0]
        assert found.best_step == steps[values.index(min(values))]
        assert len(found.losses) == len(found.rates) == 12 and found.resumed_at == 0
        assert found.rates == [1e-3] * 12 and found.seconds_per_step > 0
    assert same(state(original), before) and same(state(first), kept)  # teachers


def test_only_the_encoder_changes_and_it_comes_back_as_it_was(tmp_path):
    original, first, _ = models()
    first.to(torch.bfloat16)
    first.mask_decoder.requires_grad_(True)
    before = state(first)
    run_align(first, original, ScriptedJudge(1, 2), tmp_path, settings=settings_of(steps=2))
    after = state(first)
    assert _encoder_apart(before, after)
    others = {name for name in before if not name.startswith("vision_encoder.")}
    assert others and all(torch.equal(before[name], after[name]) for name in others)
    assert {item.dtype for item in first.parameters()} == {torch.bfloat16}
    assert not any(item.requires_grad for item in first.vision_encoder.parameters())
    assert all(item.requires_grad for item in first.mask_decoder.parameters())
    assert not any(item.grad is not None for item in first.parameters())
    assert not any(module.training for module in first.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("values", "best"), [((1, 3, 2, 2.5), 1), ((4, 3, 2, 1), 0), ((1, 1.5, 1, 2), 3)])
def test_the_weights_of_the_best_row_stay(values, best, dtype, tmp_path):
    original, first, _ = models()
    first.to(dtype)
    before, judge = state(first), ScriptedJudge(*values)
    found = run_align(first, original, judge, tmp_path, settings=settings_of(steps=8))
    assert [row[0] for row in found.epochs] == [0, 3, 5, 8]
    assert found.best_step == found.epochs[best][0] and found.best_value == values[best]
    wanted = {name: item.to(dtype) for name, item in judge.seen[best].items()}
    assert same(wanted, state(first))
    assert same(before, state(first)) == (best == 0)


def test_rates_of_the_steps_are_recorded(tmp_path):
    original, first, _ = models()
    judge = ScriptedJudge(5, 4, 3, 6, 1, 1)
    found = run_align(first, original, judge, tmp_path, settings=settings_of(steps=12, patience=2))
    assert found.rates == [1e-3] * 5 + [5e-4] * 7
    assert found.epochs == [
        (0, 5, 1e-3), (3, 4, 1e-3), (5, 3, 1e-3), (8, 6, 5e-4), (10, 1, 5e-4), (12, 1, 5e-4),
    ]  # fmt: skip


def test_a_run_shorter_than_an_epoch_is_judged_before_and_after(tmp_path):
    original, first, _ = models()
    judge = ScriptedJudge(1, 2)
    found = run_align(first, original, judge, tmp_path, settings=settings_of(steps=2), train=MemoryScenes(40))
    assert [row[0] for row in found.epochs] == [0, 2]


def test_every_image_is_trained_on_once_an_epoch(tmp_path):
    original, first, _ = models()
    images = MemoryScenes(10)
    run_align(first, original, ScriptedJudge(*range(4)), tmp_path, train=images,
              settings=settings_of(steps=5, accumulate=2, checkpoint_every=2))  # fmt: skip
    # The first is read once more, to see how large they are; each stays in memory then.
    assert sorted(images.asked) == sorted([0, *range(10)])


def test_parts_of_a_batch_make_the_whole(tmp_path):
    original, whole, _ = models()
    parts = narrower(original)
    one = run_align(whole, original, ScriptedJudge(1, 2), tmp_path / "1", settings=settings_of(steps=2))
    two = run_align(
        parts, original, ScriptedJudge(1, 2), tmp_path / "2", settings=settings_of(steps=2, accumulate=4)
    )
    assert one.losses == pytest.approx(two.losses, rel=1e-4)
    pixels = MemoryScenes(1, seed=9).values
    assert torch.allclose(embedded(whole, pixels), embedded(parts, pixels), atol=1e-2)


@pytest.mark.parametrize("changes", [{"recompute": False}, {"recompute": True}])
def test_the_arithmetic_may_be_bfloat16(changes, tmp_path):
    original, first, _ = models()
    judge = OutputJudge(original, MemoryScenes(4, seed=7))
    given = settings_of(steps=6, precision="bfloat16", **changes)
    found = run_align(first, original, judge, tmp_path, settings=given)
    assert found.best_value < found.epochs[0][1]


def test_recomputing_changes_no_bit(tmp_path):
    original, one, _ = models()
    other = narrower(original)
    for student, recompute in ((one, True), (other, False)):
        run_align(
            student, original, ScriptedJudge(1, 2, 3), tmp_path / str(recompute),
            settings=settings_of(steps=5, recompute=recompute),
        )  # fmt: skip
    assert same(state(one), state(other))


@pytest.mark.parametrize(("place", "hint"), [(0, "look at the model"), (1, r"lower lr \(0.001\)")])
def test_a_value_that_is_not_finite_stops_it(place, hint, tmp_path):
    original, first, _ = models()
    values = [1.0, 1.0]
    values[place] = float("nan")
    with pytest.raises(StageError, match=f"value nan after step {2 * place} of 2") as caught:
        run_align(first, original, ScriptedJudge(*values), tmp_path, settings=settings_of(steps=2))
    assert hint.split()[0] in caught.value.hint


class _Stopping(ScriptedJudge):
    """Stops everything when it is asked for the last time, as the end of a process does."""

    def measure(self, module):
        value = super().measure(module)
        if len(self.seen) == len(self.values):
            raise KeyboardInterrupt
        return value


_SCRIPT = (1, 3, 2, 4, 3.5, 2)
"""At steps 0, 3, 5, 8, 10 and 12; states at 3, 6 and 9."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return (folder, encoder, Aligned) of an aligning that nobody stopped."""
    original, first, _ = models()
    folder = tmp_path_factory.mktemp("finished")
    found = run_align(first, original, ScriptedJudge(*_SCRIPT), folder, settings=settings_of(steps=12))
    return folder, state(first), found


@pytest.fixture
def whole(finished, tmp_path):
    """Return (encoder, Aligned) of it; its folder is a copy, `whole` in `tmp_path`."""
    shutil.copytree(finished[0], tmp_path / "whole")
    return finished[1:]


@pytest.mark.parametrize(("stop", "start"), [(1, 0), (2, 0), (3, 3), (4, 6), (5, 9), (6, 9)])
def test_going_on_ends_with_the_same_bytes(stop, start, whole, tmp_path):
    given = settings_of(steps=12)
    original, first, _ = models()
    with pytest.raises(KeyboardInterrupt):
        run_align(first, original, _Stopping(*_SCRIPT[:stop]), tmp_path / "cut", settings=given)
    left = _SCRIPT[sum(step <= start for step in (0, 3, 5, 8, 10, 12)) :] if start else _SCRIPT
    again = narrower(original)
    found = run_align(again, original, ScriptedJudge(*left), tmp_path / "cut", settings=given)
    assert found.resumed_at == start
    assert same(state(again), whole[0])
    assert (found.losses, found.rates, found.epochs, found.best_step) == (
        whole[1].losses, whole[1].rates, whole[1].epochs, whole[1].best_step
    )  # fmt: skip


def test_what_is_finished_is_not_done_again(whole, tmp_path):
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"aligned.json", "best-8.safetensors"}
    original, again, _ = models()
    told = Told()
    given = {"settings": settings_of(steps=12), "progress": told}
    found = run_align(again, original, ScriptedJudge(), tmp_path / "whole", **given)
    assert same(state(again), whole[0]) and not told.warnings
    assert found.resumed_at == 12
    assert (found.losses, found.rates, found.epochs) == (whole[1].losses, whole[1].rates, whole[1].epochs)


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-40])


def _edit(path):
    found = json.loads(path.read_text())
    found["aligned"]["best_step"] = 3
    path.write_text(json.dumps(found))


def _improve(path):
    found = json.loads(path.read_text())
    found["aligned"]["losses"][0] = 0.0
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("best-8.safetensors", _shorten),
        ("best-8.safetensors", lambda path: path.unlink()),
        ("aligned.json", _shorten),
        ("aligned.json", _edit),
        ("aligned.json", _improve),
        ("aligned.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_end_is_told_and_done_again(name, damage, whole, tmp_path):
    damage(tmp_path / "whole" / name)
    original, again, _ = models()
    told = Told()
    given = {"settings": settings_of(steps=12), "progress": told}
    found = run_align(again, original, ScriptedJudge(*_SCRIPT), tmp_path / "whole", **given)
    assert same(state(again), whole[0]) and found.resumed_at == 0
    assert len(told.warnings) == 1 and "the aligning is done again" in told.warnings[0]


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"key": "other"}, {"train": MemoryScenes(10, seed=2)}, {"phase": "outputs"}]
)
def test_what_another_aligning_left_is_not_used(changes, whole, tmp_path):
    original, again, _ = models()
    told = Told()
    found = run_align(
        again, original, ScriptedJudge(*_SCRIPT), tmp_path / "whole", settings=settings_of(steps=12),
        progress=told, **changes,
    )  # fmt: skip
    assert found.resumed_at == 0 and "not the record of this aligning" in told.warnings[0]


def test_another_student_is_another_aligning(whole, tmp_path):
    original, first, _ = models()
    told = Told()
    with torch.no_grad():
        first.vision_encoder.pos_embed[0, 0, 0, 0] += 1e-3
    found = run_align(
        first, original, ScriptedJudge(*_SCRIPT), tmp_path / "whole", settings=settings_of(steps=12),
        progress=told,
    )  # fmt: skip
    assert found.resumed_at == 0 and told.warnings


def test_without_a_gradient_nothing_moves(tmp_path):
    """The optimizer is Adam without decay: a student that has nothing to learn keeps its weights."""
    # Eager: there attention is computed alike with gradients and without.
    original, student = tiny_sam(attention="eager"), tiny_sam(attention="eager")
    settings = settings_of(steps=2, features=False, lr=0.1)
    run_align(student, original, ScriptedJudge(1, 2, 3), tmp_path, settings=settings)
    assert same(state(student), state(original))
