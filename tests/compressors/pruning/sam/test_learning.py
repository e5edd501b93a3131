"""One part of a batch: who runs, what is added up, where gradients go."""

import pytest
import torch
from compress.compressors.pruning.sam.features import encoder_of
from compress.compressors.pruning.sam.learning import Aligning, Teachers
from compress.compressors.recovery.keeping import KeptPixels
from torch import nn

from .learners import MemoryScenes, embedded, models, settings_of


def _learner(phase, student, original, previous=None, images=10, **settings):
    encoder_of(student).requires_grad_(True)
    return Aligning(
        encoder_of(student), Teachers(original, previous), phase, KeptPixels(MemoryScenes(images, seed=1)),
        settings_of(**settings), seed=3,
    )  # fmt: skip


class _Refusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *_):
        raise AssertionError("this model must not run")


def _features(student, teacher, pixels, phase):
    """Sum of the means of the formula, from hooks of its own."""
    values = []
    for module in (student, teacher):
        found, handles = {}, []
        for index, layer in enumerate(module.vision_encoder.layers):
            if phase == "embedding":
                kind = "global" if index == 2 else "windowed"
                handles.append(layer.attn.qkv.register_forward_hook(
                    lambda _, __, out, found=found, kind=kind: found.setdefault(kind, []).append(out)
                ))  # fmt: skip
                handles.append(layer.mlp.act.register_forward_hook(
                    lambda _, __, out, found=found: found.setdefault("inner", []).append(out)
                ))  # fmt: skip
            else:
                keep = lambda tensor, found=found: found.setdefault("E", []).append(tensor)  # noqa: E731
                handles.append(layer.register_forward_pre_hook(lambda _, given, keep=keep, index=index:
                    keep(given[0]) if index == 0 else None))  # fmt: skip
                handles.append(layer.layer_norm2.register_forward_pre_hook(
                    lambda _, given, keep=keep: keep(given[0])
                ))  # fmt: skip
                handles.append(layer.register_forward_hook(lambda _, __, out, keep=keep: keep(out)))
        embedded(module, pixels)
        for handle in handles:
            handle.remove()
        values.append({name: torch.cat([item.flatten() for item in items]) for name, items in found.items()})
    return sum((values[0][name] - values[1][name]).square().mean() for name in values[0])


def test_the_first_loss_is_the_formula():
    original, first, _ = models()
    learner = _learner("embedding", first, original)
    step, pixels = learner.batch(0, 0, 1)
    loss, shown = learner.loss((step, pixels))
    output = (embedded(first, pixels) - embedded(original, pixels)).square().mean()
    wanted = 0.5 * output + 0.5 * _features(first, original, pixels, "embedding")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert shown["output"].item() == pytest.approx(output.item(), rel=1e-5)


def test_the_second_loss_is_the_formula():
    original, first, second = models()
    learner = _learner("bottleneck", second, original, first)
    step, pixels = learner.batch(3, 0, 1)  # the second epoch begins with item 12 of 10
    loss, _ = learner.loss((step, pixels))
    ours, theirs, near = (embedded(module, pixels) for module in (second, original, first))
    features = _features(second, first, pixels, "bottleneck")
    wanted = 0.8 * (features + (ours - near).square().mean()) + 0.2 * (ours - theirs).square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_shares_follow_the_epochs_of_the_images():
    """Three steps of 4 are more than an epoch of 10."""
    original, first, second = models()
    learner = _learner("embedding", first, original)
    assert [learner.share(step) for step in (0, 24, 25, 60)] == [0.5, 0.5, 0.0, 0.0]
    later = _learner("bottleneck", second, original, first)
    assert [later.share(step) for step in (0, 2, 3, 5, 22, 23, 60)] == pytest.approx(
        [0.9, 0.9, 0.8, 0.7, 0.1, 0.0, 0.0]
    )


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("phase", "step", "changes"),
    [
        ("outputs", 0, {}),
        ("bottleneck", 30, {}),
        ("bottleneck", 0, {"features": False}),
        ("embedding", 0, {"feature_weight": 0.0}),
        ("embedding", 0, {"features": False}),
    ],
)
def test_without_a_share_no_feature_is_computed(phase, step, changes, recompute, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no features are asked for")

    for name in ("teach", "compare"):
        monkeypatch.setattr(f"compress.compressors.pruning.sam.learning.{name}", refuse)
    original, _, second = models()
    learner = _learner(phase, second, original, _Refusing(), recompute=recompute, **changes)
    _, pixels = learner.batch(step, 0, 1)
    loss, shown = learner.loss((step, pixels))
    wanted = (embedded(second, pixels) - embedded(original, pixels)).square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and not shown
    loss.backward()
    assert all(item.grad is not None for item in encoder_of(second).parameters())


@pytest.mark.parametrize("phase", ["embedding", "bottleneck"])
def test_teachers_never_get_gradients(phase):
    original, first, second = models()
    for teacher in (original, first):
        teacher.requires_grad_(True)  # even where somebody forgot to freeze them
    student = first if phase == "embedding" else second
    learner = _learner(phase, student, original, None if phase == "embedding" else first)
    loss, _ = learner.loss(learner.batch(0, 0, 1))
    loss.backward()
    assert all(item.grad is not None for item in encoder_of(student).parameters())
    teachers = [original] if phase == "embedding" else [original, first]
    assert not any(item.grad is not None for teacher in teachers for item in teacher.parameters())
    assert not any(item.grad is not None for item in student.mask_decoder.parameters())


def test_only_the_encoder_is_trained_and_it_stays_in_evaluation_mode():
    original, first, _ = models(attention_dropout=0.5, attention="eager")
    learner = _learner("embedding", first, original)
    assert list(learner.parameters()) == [name for name, _ in first.vision_encoder.named_parameters()]
    pixels = learner.batch(0, 0, 1)
    before, _ = learner.loss(pixels)
    learner.module.train()
    assert not any(module.training for module in first.vision_encoder.modules())
    assert torch.equal(learner.loss(pixels)[0], before)


def test_parts_are_parts_of_the_batch():
    original, first, _ = models()
    learner = _learner("embedding", first, original)
    for step in (0, 2):
        _, whole = learner.batch(step, 0, 1)
        parts = [learner.batch(step, part, 4)[1] for part in range(4)]
        assert whole.shape == (4, 3, 64, 64) and torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teachers_may_be_stored_in_half_precision(dtype):
    original, first, _ = models()
    learner = _learner("embedding", first, original.to(dtype))
    loss, _ = learner.loss(learner.batch(0, 0, 1))
    assert loss.dtype == torch.float32 and 0 < loss.item() < 100


@pytest.mark.parametrize("phase", ["embedding", "outputs"])
@pytest.mark.parametrize("recompute", [True, False])
def test_layers_run_again_on_the_way_back_where_they_are_recomputed(phase, recompute):
    original, first, _ = models()
    learner, runs = _learner(phase, first, original, recompute=recompute), []
    for layer in first.vision_encoder.layers:
        layer.attn.register_forward_pre_hook(lambda *_: runs.append(1))
    loss, _ = learner.loss(learner.batch(0, 0, 4))
    assert len(runs) == 3
    loss.backward()
    assert len(runs) == (6 if recompute else 3)
