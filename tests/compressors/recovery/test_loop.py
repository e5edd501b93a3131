"""The loop: what it computes, what it leaves behind, what it refuses."""

import pytest
import torch
from compress.compressors.recovery.ema import MovingAverage
from compress.compressors.recovery.schedule import learning_rate
from compress.errors import PlanError, StageError
from safetensors.torch import load_file
from torch import nn


def _values(trainable):
    return {name: item.detach().clone() for name, item in trainable.parameters().items()}


def _largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_it_is_adamw_on_the_schedule(regression, trained, settings, tmp_path):
    given = settings(steps=6, weight_decay=0.2, clip_norm=0.5, warmup=0.34, beta2=0.9)
    ours = regression()
    result = trained(ours, tmp_path, given)
    by_hand = regression()
    by_hand.module.requires_grad_(True)
    weights = [item for name, item in by_hand.parameters().items() if name.endswith("weight")]
    biases = [item for name, item in by_hand.parameters().items() if name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.2}, {"params": biases, "weight_decay": 0.0}], betas=(0.9, 0.9)
    )
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given, step, 6)
        optimizer.zero_grad()
        loss, _ = by_hand.loss(by_hand.batch(step, 0, 1))
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.module.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-6)
    assert _largest_difference(_values(ours), _values(by_hand)) < 1e-6


def test_the_loss_falls_far(regression, trained, settings, tmp_path):
    result = trained(regression(), tmp_path, settings(steps=150, lr=3e-2))
    assert result.losses[-1] < 0.02 * result.losses[0]


def test_parts_of_a_batch_make_the_whole(regression, trained, settings, tmp_path):
    whole, parts = regression(), regression()
    one = trained(whole, tmp_path / "1", settings())
    two = trained(parts, tmp_path / "2", settings(accumulate=2))
    assert _largest_difference(_values(whole), _values(parts)) < 1e-6
    assert one.losses == pytest.approx(two.losses, rel=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator(
    regression, trained, settings, tmp_path
):
    one, other, different = (regression(dropout=0.4) for _ in range(3))
    before = torch.get_rng_state()
    trained(one, tmp_path / "1", settings())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    trained(other, tmp_path / "2", settings())
    trained(different, tmp_path / "3", settings(), seed=4)
    assert _largest_difference(_values(one), _values(other)) == 0.0
    assert _largest_difference(_values(one), _values(different)) > 0.0  # other dropout


def test_the_module_comes_back_as_it_was(regression, trained, settings, tmp_path):
    trainable = regression(dropout=0.1, dtype=torch.bfloat16)
    before = dict(trainable.module.named_parameters())
    trainable.module[0].weight.requires_grad_(True)
    trained(trainable, tmp_path, settings())
    after = dict(trainable.module.named_parameters())
    assert all(after[name] is before[name] and after[name].grad is None for name in before)
    assert {item.dtype for item in after.values()} == {torch.bfloat16}
    assert [name for name, item in after.items() if item.requires_grad] == ["0.weight"]
    assert not any(child.training for child in trainable.module.modules())
    assert not hasattr(trainable.module, "_is_accelerate_prepared")


def test_weights_are_trained_in_float32_and_rounded_once(regression, trained, settings, tmp_path):
    rounded, wide = regression(dtype=torch.bfloat16), regression(dtype=torch.bfloat16)
    wide.module.float()
    # Steps that are too small for bfloat16 one by one: there they would all be lost.
    slow = settings(steps=40, lr=2e-5, weight_decay=0.0)
    before = _values(rounded)
    trained(rounded, tmp_path / "1", slow)
    trained(wide, tmp_path / "2", slow)
    expected = {name: item.to(torch.bfloat16) for name, item in _values(wide).items()}
    assert all(torch.equal(item, expected[name]) for name, item in _values(rounded).items())
    assert any(not torch.equal(item, before[name]) for name, item in _values(rounded).items())


def test_only_what_is_named_is_trained(regression, trained, settings, tmp_path):
    trainable = regression(dtype=torch.bfloat16)
    frozen = {name: item.clone() for name, item in trainable.module[0].named_parameters()}
    last = {f"2.{name}": item for name, item in trainable.module[2].named_parameters()}
    kept = {name: item.clone() for name, item in last.items()}
    trainable.parameters = lambda: last
    trainable.loss = lambda batch: (trainable.module[2](torch.ones(4, 16)).square().mean(), {})
    trained(trainable, tmp_path, settings())
    assert all(torch.equal(item, frozen[name]) for name, item in trainable.module[0].named_parameters())
    assert not any(torch.equal(item, kept[name]) for name, item in last.items())
    assert trainable.module[0].weight.dtype == torch.bfloat16


def test_nothing_to_train_is_an_error(regression, trained, settings, tmp_path):
    trainable = regression()
    trainable.parameters = dict
    with pytest.raises(StageError, match="nothing to train"):
        trained(trainable, tmp_path, settings())


def test_the_moving_average_is_as_its_formula(regression, trained, settings, tmp_path):
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage({"w": parameter}, decay=0.25)
    expected = 1.0
    for step, value in enumerate([3.0, -2.0, 5.0, 4.0]):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.tensors["w"].item() == pytest.approx(expected)
    assert average.decay(0) == 0.1
    average.apply()
    assert parameter.item() == pytest.approx(expected)


def test_with_an_average_the_average_is_the_result(regression, trained, settings, tmp_path):
    plain, averaged, by_hand = regression(), regression(), regression()
    losses = trained(plain, tmp_path / "1", settings(lr=5e-2)).losses
    assert trained(averaged, tmp_path / "2", settings(lr=5e-2, ema=0.9)).losses == losses
    # The weights after every step, from trainings that are cut off there, on one schedule.
    average = MovingAverage(by_hand.parameters(), 0.9)
    by_hand.parameters = lambda: dict(by_hand.module.named_parameters())
    stepped = regression()

    def loss(batch):
        for name, item in by_hand.parameters().items():
            item.data.copy_(stepped.module.get_parameter(name).detach())
        if loss.calls:
            average.update(loss.calls - 1)
        loss.calls += 1
        return type(stepped).loss(stepped, batch)

    loss.calls = 0
    stepped.loss = loss
    trained(stepped, tmp_path / "3", settings(lr=5e-2))
    for name, item in by_hand.parameters().items():
        item.data.copy_(stepped.module.get_parameter(name))
    average.update(19)
    assert _largest_difference(_values(averaged), average.tensors) < 1e-6
    assert _largest_difference(_values(plain), _values(averaged)) > 1e-3


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_its_step(what, regression, trained, settings, tmp_path):
    trainable = regression()
    steps_done = []

    def batch(step, part, parts):
        steps_done.append(step)
        inputs, targets = regression().batch(step, part, parts)
        return inputs, targets, step

    def loss(given):
        inputs, targets, step = given
        value = (trainable.module(inputs) - targets).square().mean()
        if step < 9:
            return value, {}
        # sqrt has an infinite slope at 0, and 0 * inf is not a number
        return (value * float("nan"), {}) if what == "loss" else (value + (value * 0).sqrt(), {})

    trainable.batch, trainable.loss = batch, loss
    with pytest.raises(StageError, match=f"the {what} of step 10 of 20 is not finite") as caught:
        trained(trainable, tmp_path, settings())
    assert "lower lr (0.01)" in caught.value.hint
    assert steps_done[-1] <= 10  # one batch is made ahead
    assert all(item.isfinite().all() for item in trainable.module.parameters())
    kept = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    assert len(kept) == 1  # of step 6


def test_bfloat16_arithmetic_differs_and_learns(regression, trained, settings, tmp_path):
    narrow, wide = regression(), regression()
    result = trained(narrow, tmp_path / "1", settings(steps=150, lr=3e-2, precision="bfloat16"))
    trained(wide, tmp_path / "2", settings(steps=150, lr=3e-2))
    assert result.losses[-1] < 0.05 * result.losses[0]
    assert _largest_difference(_values(narrow), _values(wide)) > 0.0
    assert narrow.module[0].weight.dtype == torch.float32
    # The accelerator of one training does not decide the precision of the next.
    again = regression()
    trained(again, tmp_path / "3", settings(steps=150, lr=3e-2))
    assert _largest_difference(_values(again), _values(wide)) == 0.0


def test_float16_needs_a_gpu(regression, trained, settings, tmp_path):
    with pytest.raises(PlanError, match="float16 needs a GPU"):
        trained(regression(), tmp_path, settings(precision="float16"))


def test_progress_tells_step_loss_and_rate(regression, trained, settings, tmp_path):
    from compress.progress import SilentProgress

    class Recorded(SilentProgress):
        def __init__(self):
            self.totals, self.details = [], []

        def start(self, label, total):
            self.totals.append(total)

        def advance(self, units=1, detail=""):
            self.details.append(detail)

    progress = Recorded()
    result = trained(regression(), tmp_path, settings(), progress=progress)
    assert progress.totals == [20] and len(progress.details) == 20
    assert progress.details[4] == f"loss {result.losses[4]:.4g}, lr {result.rates[4]:.3g}, step 5 of 20"


def test_every_part_of_every_step_has_dropout_of_its_own(regression, trained, settings, tmp_path):
    def masks(folder, seed=3, **changes):
        trainable, seen = regression(dropout=0.5), []
        handle = trainable.module[1].register_forward_hook(
            lambda module, inputs, output: seen.append((output == 0) & (inputs[0] != 0))
        )
        trained(trainable, tmp_path / folder, settings(steps=4, batch_size=8, **changes), seed=seed)
        handle.remove()
        return [mask.flatten().tolist() for mask in seen]

    found = masks("1", accumulate=2)
    assert len(found) == 8 and all(sum(mask) for mask in found)
    distinct = {tuple(mask) for mask in found}
    assert len(distinct) == 8, "no step repeats another, and no part"
    assert masks("2", accumulate=2) == found
    assert not distinct & {tuple(mask) for mask in masks("3", seed=4, accumulate=2)}


@pytest.mark.parametrize("steps", [6, 12])
def test_no_state_is_written_after_the_last_step(steps, regression, trained, settings, tmp_path):
    """The result is there by then; the state is as large as three models."""
    trained(regression(), tmp_path, settings(steps=steps))
    kept = [load_file(path)["losses"] for path in tmp_path.iterdir()]
    assert [len(losses) for losses in kept] == ([] if steps == 6 else [6])


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float16, r"finetune: 2\.bias has the value 7\.001e\+04 after training, too large for float16"),
        (torch.bfloat16, None),
        (torch.float32, None),
    ],
)
def test_weights_that_are_too_large_for_their_type(dtype, message, regression, trained, settings, tmp_path):
    """float16 ends at 65504, which the arithmetic of the training does not know."""
    trainable = regression(dtype=dtype)
    trainable.loss = lambda batch: (-trainable.module(batch[0].to(trainable.module[0].weight)).mean(), {})
    given = settings(steps=1, lr=10.0, warmup=0.0, weight_decay=0.0, clip_norm=None)
    enlarge = trainable.batch

    def batch(step, part, parts):
        trainable.module[2].bias.data.fill_(7e4)  # as a long training would
        return enlarge(step, part, parts)

    trainable.batch = batch
    if message is None:
        trained(trainable, tmp_path, given)
        assert trainable.module[2].bias.isfinite().all()
    else:
        with pytest.raises(StageError, match=message) as found:
            trained(trainable, tmp_path, given)
        assert "dtype: bfloat16 or float32" in str(found.value.hint)


def test_a_last_step_that_breaks_the_weights_is_refused(regression, trained, settings, tmp_path):
    trainable = regression()

    def batch(step, part, parts):
        if step == 4:
            trainable.module[0].weight.data[0, 0] = float("inf")
        return regression().batch(step, part, parts)

    trainable.batch = batch
    # The loss does not see what breaks: as after the last update.
    trainable.loss = lambda given: ((trainable.module[2].bias - 1).square().mean(), {})
    with pytest.raises(StageError, match=r"0\.weight is not finite after the last step"):
        trained(trainable, tmp_path, settings(steps=5))


def test_parameters_may_have_rates_of_their_own(regression, trained, settings, tmp_path):
    keys = {"steps": 1, "weight_decay": 0.0, "warmup": 0.0, "clip_norm": None, "lr": 1e-3}
    ours = regression()
    before = _values(ours)
    factors = {"0.weight": 10.0, "2.bias": 0.0}
    trained(ours, tmp_path, settings(**keys), factors=factors)
    for name, value in _values(ours).items():
        moved = (value - before[name]).abs().max().item()  # the first step of Adam is as long as its rate
        assert moved == pytest.approx(1e-3 * factors.get(name, 1.0), rel=1e-3, abs=1e-9), name


def test_what_is_noted_on_the_way_survives_a_kill(regression, trained, settings, tmp_path):
    def noting(done, weights):
        return [done, weights["2.bias"][0].item()] if done % 2 == 0 else None

    keys = {"steps": 8, "ema": 0.5, "checkpoint_every": 3}
    whole = regression()
    expected = trained(whole, tmp_path / "1", settings(**keys), watch=noting).rows
    assert [row[0] for row in expected] == [2, 4, 6, 8]
    assert expected[-1][1] == whole.parameters()["2.bias"][0].item()  # the average became the weights

    def killed(done, weights):
        if done == 5:
            raise KeyboardInterrupt
        return noting(done, weights)

    with pytest.raises(KeyboardInterrupt):
        trained(regression(), tmp_path / "2", settings(**keys), watch=killed)
    result = trained(regression(), tmp_path / "2", settings(**keys), watch=noting)
    assert result.resumed_at == 3 and result.rows == expected
