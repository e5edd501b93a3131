"""Losses against the formulas written out, and what becomes of images."""

import math

import numpy as np
import pytest
import torch
from compress.compressors.recovery.augmentation import draw, mix, transform
from compress.compressors.recovery.classification import (
    Classification,
    Teacher,
    distillation_loss,
    label_loss,
)
from compress.compressors.recovery.keeping import KeptImages
from compress.compressors.recovery.schedule import item_order
from compress.progress import SilentProgress
from compress.recipes.recovery import DistillSettings


def _softmax(row):
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def _logits(seed, count=5, classes=4):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def _target(label, smoothing, classes=4):
    return [smoothing / classes + (1 - smoothing) * (index == label) for index in range(classes)]


def _cross_entropy(logits, targets):
    return sum(
        -sum(wanted * math.log(got) for wanted, got in zip(target, _softmax(row), strict=True))
        for row, target in zip(logits.tolist(), targets, strict=True)
    ) / len(targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_labels(smoothing):
    logits, labels = _logits(0), [3, 0, 0, 2, 1]
    expected = _cross_entropy(logits, [_target(label, smoothing) for label in labels])
    found = label_loss(logits, torch.tensor(labels), None, 1.0, smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_mixed_labels_are_learnt_by_their_shares():
    logits, labels, partners, share = _logits(1), [3, 0, 0, 2, 1], [1, 0, 2, 3, 1], 0.7
    targets = [
        [share * one + (1 - share) * two for one, two in zip(_target(a, 0.1), _target(b, 0.1), strict=True)]
        for a, b in zip(labels, partners, strict=True)
    ]
    found = label_loss(logits, torch.tensor(labels), torch.tensor(partners), share, 0.1)
    assert found.item() == pytest.approx(_cross_entropy(logits, targets), rel=1e-5)


@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_soft_distillation_is_the_divergence_from_the_teacher(heat):
    ours, theirs = _logits(2), _logits(3)
    expected = 0.0
    for one, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        got, wanted = _softmax([value / heat for value in one]), _softmax([value / heat for value in other])
        expected += sum(q * (math.log(q) - math.log(p)) for p, q in zip(got, wanted, strict=True)) / 5
    settings = DistillSettings(temperature=heat)
    assert distillation_loss(ours, theirs, settings).item() == pytest.approx(heat**2 * expected, rel=1e-4)
    assert distillation_loss(theirs, theirs, settings).item() == pytest.approx(0.0, abs=1e-6)


def test_hard_distillation_takes_the_best_class_without_smoothing():
    ours, theirs = _logits(4), _logits(5)
    best = [max(range(4), key=row.__getitem__) for row in theirs.tolist()]
    expected = _cross_entropy(ours, [_target(label, 0.0) for label in best])
    found = distillation_loss(ours, theirs, DistillSettings(mode="hard"))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_mirroring_and_moving_by_hand():
    image = torch.arange(16 * 16, dtype=torch.float32).reshape(1, 1, 16, 16)
    still = torch.zeros(1, 2)
    assert torch.equal(transform(image, torch.tensor([False]), still), image)
    assert torch.equal(transform(image, torch.tensor([True]), still), image.flip(-1))
    # One eighth of 16 is 2: down by 2, to the right by 1 (half of it); borders are repeated.
    moved = transform(image, torch.tensor([False]), torch.tensor([[1.0, 0.5]]))[0, 0]
    assert torch.equal(moved[2:, 1:], image[0, 0, :-2, :-1])
    assert torch.equal(moved[0, 1:], image[0, 0, 0, :-1]) and torch.equal(moved[1, 1:], moved[0, 1:])
    assert torch.equal(moved[:, 0], moved[:, 1])
    both = transform(image, torch.tensor([True]), torch.tensor([[-1.0, -1.0]]))[0, 0]
    assert torch.equal(both[:-2, :-2], image[0, 0].flip(-1)[2:, 2:])


def test_every_image_of_a_batch_is_changed_by_itself():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mirrored = torch.tensor([True, False, True, False])
    moved = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-0.5, 0.5], [0.0, 0.0]])
    alone = [transform(images[i : i + 1], mirrored[i : i + 1], moved[i : i + 1]) for i in range(4)]
    assert torch.equal(transform(images, mirrored, moved), torch.cat(alone))


def test_what_is_drawn_is_drawn_for_the_whole_batch(settings):
    given = settings(mixup=0.4, augment=["flip", "shift"], batch_size=12)
    order = item_order(1, 30)
    whole = draw(given, order, 1, 5)
    parts = [draw(given, order, 1, 5).part(index, 3) for index in range(3)]
    assert torch.equal(torch.cat([part.items for part in parts]), whole.items)
    assert torch.equal(torch.cat([part.partners.moved for part in parts]), whole.partners.moved)
    assert {part.share for part in parts} == {whole.share}
    assert sorted(whole.partners.items.tolist()) == sorted(whole.items.tolist())
    partner_of = dict(zip(whole.items.tolist(), whole.moved.tolist(), strict=True))
    pairs = zip(whole.partners.items.tolist(), whole.partners.moved.tolist(), strict=True)
    assert all(partner_of[item] == moved for item, moved in pairs)  # an image is changed once, not twice
    assert not torch.equal(draw(given, order, 1, 6).moved, whole.moved)
    assert not torch.equal(draw(given, order, 2, 5).moved, whole.moved)


def test_only_what_is_asked_for_is_changed(settings):
    order = item_order(0, 30)
    still = draw(settings(augment=[]), order, 0, 0)
    assert not still.mirrored.any() and not still.moved.any() and still.partners is None
    flipped = draw(settings(augment=["flip"], batch_size=64), order, 0, 0)
    assert 20 < flipped.mirrored.sum() < 44 and not flipped.moved.any()
    shifted = draw(settings(augment=["shift"], batch_size=64), order, 0, 0)
    assert shifted.moved.abs().max() <= 1 and shifted.moved.std() > 0.4 and not shifted.mirrored.any()


def test_shares_of_mixing_are_of_the_beta_distribution(settings):
    given = settings(mixup=0.2, batch_size=2)
    shares = np.array([draw(given, item_order(0, 30), 0, step).share for step in range(800)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    assert shares.var() == pytest.approx(1 / 5.6, abs=0.02)


def test_a_part_of_a_batch_is_mixed_from_the_images(images, vit, settings):
    given = settings(mixup=1.0, augment=["flip"], batch_size=6)
    data = images()
    learning = Classification(vit(), given, data, None, seed=2)
    part = learning.batch(4, 1, 2)
    drawn = draw(given, item_order(2, 24), 2, 4).part(1, 2)
    for row in range(3):
        first, second = data.values[drawn.items[row]], data.values[drawn.partners.items[row]]
        first = first.flip(-1) if drawn.mirrored[row] else first
        second = second.flip(-1) if drawn.partners.mirrored[row] else second
        expected = drawn.share * first + (1 - drawn.share) * second
        assert torch.allclose(part.pixels[row], expected, atol=1e-6)
    assert torch.equal(part.partners, data.labels[drawn.partners.items])
    assert torch.equal(mix(torch.ones(2), torch.zeros(2), 0.25), torch.full((2,), 0.25))


def test_both_losses_count_by_their_weight(images, vit, settings):
    data, student, original = images(), vit(seed=0), vit(seed=1)
    given = settings(distill={"weight": 0.3, "temperature": 2.0}, augment=[], label_smoothing=0.2)
    learning = Classification(student, given, data, Teacher(original, given), seed=0)
    part = learning.batch(0, 0, 1)
    loss, shown = learning.loss(part)
    logits, answers = student(pixel_values=part.pixels).logits, original(pixel_values=part.pixels).logits
    labels = label_loss(logits, data.labels[part.drawn.items], None, 1.0, 0.2)
    distilled = distillation_loss(logits, answers, given.distill)
    assert loss.item() == pytest.approx(0.7 * labels.item() + 0.3 * distilled.item(), rel=1e-5)
    assert shown["labels"].item() == pytest.approx(labels.item(), rel=1e-5)
    assert shown["original"].item() == pytest.approx(distilled.item(), rel=1e-5)


def _deit(seed):
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    config = DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeiTForImageClassificationWithTeacher(config).eval()


@pytest.mark.parametrize("weight", [None, 0.5, 1.0])
def test_a_deit_learns_with_two_heads(weight, images, settings):
    distill = None if weight is None else {"weight": weight, "mode": "hard"}
    given = settings(distill=distill, augment=[], label_smoothing=0.0)
    data, student, original = images(), _deit(0), _deit(1)
    teacher = None if weight is None else Teacher(original, given)
    learning = Classification(student, given, data, teacher, seed=0)
    part = learning.batch(0, 0, 1)
    loss, _ = learning.loss(part)
    output, labels = student(pixel_values=part.pixels), data.labels[part.drawn.items]
    best = original(pixel_values=part.pixels).logits.argmax(-1)
    entropy = torch.nn.functional.cross_entropy
    both = (output.cls_logits, output.distillation_logits)
    expected = {
        None: sum(entropy(logits, labels) for logits in both) / 2,
        0.5: 0.5 * entropy(output.cls_logits, labels) + 0.5 * entropy(output.distillation_logits, best),
        1.0: sum(entropy(logits, best) for logits in both) / 2,
    }[weight]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert student.cls_classifier.weight.grad.abs().sum() > 0
    assert student.distillation_classifier.weight.grad.abs().sum() > 0


def test_answers_are_computed_once_where_images_do_not_change(images, vit, settings):
    data, original, calls = images(), vit(seed=1), []
    original.register_forward_hook(lambda *_: calls.append(None))
    given = settings(distill={}, augment=[], steps=20)
    teacher = Teacher(original, given)
    teacher.prepare(data, 20, SilentProgress())
    assert len(calls) == 3
    learning = Classification(vit(), given, data, teacher, seed=0)
    part = learning.batch(7, 0, 1)
    kept = teacher.logits(part)
    assert len(calls) == 3
    assert torch.allclose(kept, original(pixel_values=part.pixels).logits, atol=1e-6)
    changing = Teacher(original, settings(distill={}, augment=["flip"]))
    calls.clear()
    changing.prepare(data, 20, SilentProgress())
    assert not calls
    changing.logits(part)
    assert len(calls) == 1


@pytest.mark.parametrize("budget", [10**9, 0])
def test_images_are_kept_where_there_is_room(budget, images):
    data = images()
    kept = KeptImages(data, budget)
    data.seen.zero_()
    for indices in ([3, 4, 3, 20], [4, 5], [20]):
        assert torch.equal(kept.pixels(indices), data.values[indices])
    assert int(data.seen.max()) == (1 if budget else 2)
    assert len(kept) == 24 and torch.equal(kept.labels, data.labels)


def test_a_tiny_set_is_learnt_by_heart(images, vit, settings, trained, tmp_path):
    data, module = images(), vit()
    given = settings(steps=60, lr=1e-2, augment=[], label_smoothing=0.0)
    result = trained(Classification(module, given, data, None, seed=0), tmp_path, given)
    assert result.losses[0] > 0.8 and result.losses[-1] < 0.05
    assert torch.equal(module(pixel_values=data.values).logits.argmax(-1), data.labels)


def test_a_student_comes_to_answer_as_its_teacher_without_labels(images, vit, settings, trained, tmp_path):
    data, student, original = images(), vit(seed=0), vit(seed=1)
    data.labels = None
    given = settings(steps=80, lr=1e-2, distill={"weight": 1.0}, mixup=0.2)
    learning = Classification(student, given, data, Teacher(original, given), seed=0)
    before = (student(pixel_values=data.values).logits - original(pixel_values=data.values).logits).square()
    trained(learning, tmp_path, given)
    after = (student(pixel_values=data.values).logits - original(pixel_values=data.values).logits).square()
    assert after.mean() < 0.3 * before.mean()


def test_dropout_mixing_and_parts_go_on_to_the_same_bytes(images, vit, settings, trained, tmp_path):
    given = settings(mixup=0.3, augment=["flip", "shift"], distill={"weight": 0.5}, accumulate=2, ema=0.9)

    def learning():
        return Classification(vit(dropout=0.2), given, images(), Teacher(vit(seed=1), given), seed=7)

    whole, cut, resumed = learning(), learning(), learning()
    trained(whole, tmp_path / "whole", given)
    batch = cut.batch

    def stopping(step, part, parts):
        if (step, part) == (14, 1):
            raise KeyboardInterrupt
        return batch(step, part, parts)

    cut.batch = stopping
    with pytest.raises(KeyboardInterrupt):
        trained(cut, tmp_path / "cut", given)
    assert trained(resumed, tmp_path / "cut", given).resumed_at == 12
    pairs = zip(whole.module.parameters(), resumed.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
