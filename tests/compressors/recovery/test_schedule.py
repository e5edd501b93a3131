"""How long, how fast, in which order."""

from math import cos, pi

import pytest
import torch
from compress.compressors.recovery.optimizer import adamw
from compress.compressors.recovery.schedule import item_order, learning_rate, step_count


def test_steps_are_as_written_or_follow_from_epochs(settings):
    assert step_count(settings(steps=7), 100) == 7
    assert step_count(settings(epochs=3, batch_size=32), 100) == 10  # 300 / 32, rounded up
    assert step_count(settings(epochs=0.001, batch_size=32), 100) == 1


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine(settings):
    given = settings(steps=100, lr=1.0, min_lr=0.1, warmup=0.1)
    values = [learning_rate(given, step, 100) for step in range(101)]
    assert values[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert values[10] == pytest.approx(1.0)
    assert values[55] == pytest.approx(0.55)  # half of the way down
    assert values[40] == pytest.approx(0.1 + 0.45 * (1 + cos(pi / 3)))
    assert values[100] == pytest.approx(0.1)
    assert all(one > other for one, other in zip(values[10:], values[11:], strict=False))


def test_without_a_warm_up_it_begins_at_the_top(settings):
    assert learning_rate(settings(lr=0.5, warmup=0.0), 0, 20) == 0.5


def test_every_pass_shows_every_item_once_in_an_order_of_its_own():
    order = item_order(5, 10)
    shown = torch.cat([order(step, 4) for step in range(5)])  # 20 items: two passes
    first, second = shown[:10], shown[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_the_order_of_a_step_does_not_depend_on_the_steps_before():
    passing, jumping = item_order(5, 7), item_order(5, 7)
    before = [passing(step, 4) for step in range(9)]
    for step in (8, 0, 5):
        assert torch.equal(jumping(step, 4), before[step])
    assert not torch.equal(item_order(6, 7)(0, 4), before[0])


def test_a_batch_larger_than_the_data_repeats_it():
    batch = item_order(0, 3)(1, 8)
    assert torch.bincount(batch, minlength=3).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_only_matrices_decay(vit, settings):
    module = vit()
    optimizer = adamw(dict(module.named_parameters()), settings(weight_decay=0.3))
    decay = {id(item): group["weight_decay"] for group in optimizer.param_groups for item in group["params"]}
    found = {name: decay[id(item)] for name, item in module.named_parameters()}
    assert found["classifier.weight"] == 0.3
    assert found["vit.embeddings.patch_embeddings.projection.weight"] == 0.3
    shrinking = {name for name, value in found.items() if value}
    assert not {name for name in shrinking if "norm" in name or name.endswith("bias") or "token" in name}
    assert found["vit.embeddings.position_embeddings"] == found["vit.embeddings.cls_token"] == 0.0
    assert len(shrinking) == 2 * 6 + 2  # q, k, v, out, two of the MLP; patches and head


def test_weights_that_are_no_matrices_do_not_decay(settings):
    """Scales of norms are called weight as well: what has one axis, or none, keeps its size."""
    shapes = {
        "a.weight": (3,),
        "b.weight": (3, 2),
        "c.weight": (4, 3, 2, 2),
        "d.weight": (),
        "e.table": (2, 2),
    }
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    decaying, others = adamw(parameters, settings(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert [tuple(item.shape) for item in decaying["params"]] == [(3, 2), (4, 3, 2, 2)]
    assert [tuple(item.shape) for item in others["params"]] == [(3,), (), (2, 2)]
