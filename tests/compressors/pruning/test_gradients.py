"""Summed gradients: equal to one pass over all samples, whatever the parts; nothing is left behind."""

from types import SimpleNamespace

import pytest
import torch
from compress.compressors.pruning.gradients import accumulate
from compress.errors import StageError
from compress.progress import SilentProgress
from torch import nn


class Toy(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 6), nn.Linear(6, 3), nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.requires_grad_(False)

    def forward(self, x):
        return self.second(self.drop(torch.tanh(self.first(x))))


class Batches:
    """Cross-entropy over random samples, in parts of a given size."""

    def __init__(self, part=2, samples=8, stop_at=None, spoil=None):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(samples, 4, generator=generator), torch.arange(samples) % 3
        self.part, self.stop_at, self.spoil, self.seen = part, stop_at, spoil, []
        self.key, self.samples, self.parts = f"toy-{part}", samples, samples // part

    def losses(self, model, start=0):
        for part in range(start, self.parts):
            if part == self.stop_at:
                raise KeyboardInterrupt
            self.seen.append(part)
            rows = slice(part * self.part, (part + 1) * self.part)
            dtype = model.module.first.weight.dtype
            output = model.module(self.x[rows].to(dtype)).float()
            loss = nn.functional.cross_entropy(output, self.y[rows], reduction="sum")
            yield (loss * float("nan") if part == self.spoil else loss), self.part


NAMES = ("first.weight", "second.weight")


def run(module, objective, names=NAMES, folder=None, **options):
    return accumulate(
        SimpleNamespace(module=module), objective, names, folder=folder, progress=SilentProgress(), **options
    )


def in_one_pass(module, objective):
    weights = [module.first.weight.float().requires_grad_(), module.second.weight.float().requires_grad_()]
    hidden = torch.tanh(nn.functional.linear(objective.x, weights[0], module.first.bias.float()))
    output = nn.functional.linear(hidden, weights[1], module.second.bias.float())
    loss = nn.functional.cross_entropy(output, objective.y, reduction="sum")
    return torch.autograd.grad(loss, weights), float(loss.detach())


@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_parts_add_up_to_one_pass(part):
    module, objective = Toy(), Batches(part)
    found = run(module, objective)
    expected, loss = in_one_pass(module, objective)
    for name, value in zip(NAMES, expected, strict=True):
        assert torch.allclose(found.of(name), value, atol=1e-6)
        assert found.of(name).dtype == torch.float32
    assert found.samples == 8
    assert found.loss == pytest.approx(loss / 8)


def test_the_model_is_as_it_was():
    module = Toy()
    module.train()
    module.second.eval()
    module.first.bias.requires_grad_(True)
    module.first.bias.grad = torch.ones(6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    run(module, Batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    flags = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert flags == {"first.bias"}
    assert (module.training, module.first.training, module.second.training) == (True, True, False)


def test_it_works_where_gradients_are_switched_off():
    with torch.no_grad():
        assert run(Toy(), Batches()).of("first.weight").any()
    module, objective = Toy(), Batches()
    with torch.inference_mode():
        assert run(module, objective).samples == 8


@pytest.mark.parametrize("kind", ["interrupted", "not finite"])
def test_nothing_is_left_behind_by_an_error(kind):
    module = Toy()
    objective = Batches(stop_at=2) if kind == "interrupted" else Batches(spoil=2)
    with pytest.raises(KeyboardInterrupt if kind == "interrupted" else StageError):
        run(module, objective)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.training
    output = module(torch.zeros(1, 4))  # no hook is left either
    assert not output.requires_grad


def test_a_killed_run_goes_on_to_equal_bytes(tmp_path):
    whole = run(Toy(), Batches())
    with pytest.raises(KeyboardInterrupt):
        run(Toy(), Batches(stop_at=3), folder=tmp_path, save_every_seconds=0.0)
    again = Batches()
    found = run(Toy(), again, folder=tmp_path)
    assert again.seen == list(range(again.seen[0], 4))
    assert again.seen[0] > 0  # written at least once; not oftener than the disk is fast
    assert all(torch.equal(found.of(name), whole.of(name)) for name in NAMES)
    assert (found.loss, found.samples) == (whole.loss, whole.samples)
    third = Batches()
    assert torch.equal(run(Toy(), third, folder=tmp_path).of(NAMES[0]), whole.of(NAMES[0]))
    assert third.seen == []


@pytest.mark.parametrize("change", ["weights", "samples", "tensors", "damage"])
def test_a_sum_of_something_else_is_not_gone_on_with(tmp_path, change):
    run(Toy(), Batches(), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    if change == "damage":
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    objective = Batches(4 if change == "samples" else 2)
    names = NAMES[:1] if change == "tensors" else NAMES
    run(Toy(1 if change == "weights" else 0), objective, names, folder=tmp_path)
    assert len(objective.seen) == objective.parts
    assert len(list(tmp_path.iterdir())) == 1


def test_half_precision_is_summed_in_float32():
    exact = run(Toy(), Batches(1))
    for dtype in (torch.bfloat16, torch.float16):
        module = Toy().to(dtype)
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        parameters = list(module.parameters())
        found = run(module, Batches(1)).of("first.weight")
        assert found.dtype == torch.float32
        after = module.state_dict()
        assert all(after[name].dtype == dtype and torch.equal(after[name], weights[name]) for name in weights)
        assert all(ours is theirs for ours, theirs in zip(parameters, module.parameters(), strict=True))
        error = (found - exact.of("first.weight")).norm() / found.norm()
        assert 0 < float(error) < (0.02 if dtype == torch.bfloat16 else 1e-3)


def test_float16_weights_keep_gradients_that_float16_has_not():
    module = Toy().to(torch.float16)
    found = run(module, Tiny()).of("first.weight")
    assert 0 < float(found.abs().max()) < 1e-9  # the least float16 is 6e-8


class Tiny(Batches):
    def losses(self, model, start=0):
        for loss, samples in super().losses(model, start):
            yield loss * 1e-12, samples


def test_a_tensor_of_two_names_is_summed_once():
    module = Toy()
    module.third = module.second
    found = run(module, Batches(), ("second.weight", "third.weight"))
    assert torch.equal(found.of("second.weight"), run(Toy(), Batches()).of("second.weight"))
    assert torch.equal(found.of("second.weight"), found.of("third.weight"))


class Constant(Batches):
    def losses(self, model, start=0):
        for loss, samples in super().losses(model, start):
            yield loss - loss, samples


class Infinite(Batches):
    """A finite loss with a gradient that is not."""

    def losses(self, model, start=0):
        for loss, samples in super().losses(model, start):
            yield loss + (model.module.second.weight.sum() * 0).sqrt(), samples


def test_what_gives_no_scores_is_told():
    with pytest.raises(StageError, match="zero") as caught:
        run(Toy(), Constant())
    assert "magnitude" in caught.value.hint
    with pytest.raises(StageError, match="loss of part 2 of 4 .* is nan"):
        run(Toy(), Batches(spoil=1))
    with pytest.raises(StageError, match="gradient of part 1 of 4 .* not finite for second.weight"):
        run(Toy(), Infinite())
    with pytest.raises(StageError, match=r"no parameter .* third\.weight"):
        run(Toy(), Batches(), ("first.weight", "third.weight"))
    with pytest.raises(StageError, match="no calibration samples"):
        run(Toy(), Batches(samples=0))


def test_progress_tells_the_loss():
    seen = []

    class Recorder(SilentProgress):
        def start(self, label, total):
            seen.append((label, total))

        def advance(self, units=1, detail=""):
            seen.append((units, detail.split()[0]))

    accumulate(SimpleNamespace(module=Toy()), Batches(), NAMES, folder=None, progress=Recorder())
    assert seen == [("gradients", 4), *[(1, "loss")] * 4]
