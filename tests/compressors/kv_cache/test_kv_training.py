"""Training of factors: the loss, the optimizer, rounding, independence of attentions, and resuming."""

from __future__ import annotations

import math

import pytest
import torch
from compress.compressors.kv_cache import training
from compress.compressors.kv_cache.energies import Energy
from compress.compressors.kv_cache.factorise import KvFactors, factorise, mean_square_error, spectrum_of
from compress.compressors.kv_cache.planning import attentions_of
from compress.compressors.kv_cache.ranks import scheme_of, uniform_ranks
from compress.compressors.kv_cache.rounded import Rounding
from compress.compressors.kv_cache.training import LayerTraining, reconstruction_loss, train
from compress.errors import StageError
from compress.progress import SilentProgress
from compress.runtime.tensor_hashes import tensors_sha256

from .conftest import settings

HIDDEN, WIDTH = 12, 8


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def weights():
    return tuple(torch.randn(WIDTH, HIDDEN, generator=seeded(i)) for i in range(2))


@pytest.fixture
def x():
    """One sequence whose channels differ in size: [1, 4096, h]."""
    return torch.randn(1, 4096, HIDDEN, generator=seeded(5)) * torch.logspace(-0.5, 0.5, HIDDEN)


def factors_for(weights, x, rank, init):
    rows = x[0].double()
    energy = Energy(rows.T @ rows / len(rows), rows.abs().mean(dim=0), len(rows))
    pairs, error = [], 0.0
    for weight in weights:
        weight = weight.double()
        spectrum = spectrum_of(weight, energy.gram)
        pairs.append(factorise(weight, energy, spectrum, rank, init, alpha=0.5, generator=seeded()))
        error += mean_square_error(weight, pairs[-1], energy.gram)
    return KvFactors(*pairs), error


def test_the_loss_is_the_sum_of_two_mean_squares(weights, x):
    rows, (factors, error) = x[0], factors_for(weights, x, 3, "asvd")
    found = reconstruction_loss(rows, weights, factors.tensors(), None)
    by_hand = sum(
        (rows @ w.T - rows @ pair.a.T @ pair.b.T).square().mean()
        for w, pair in zip(weights, (factors.k, factors.v), strict=True)
    )
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(found) == pytest.approx(error, rel=1e-4)


def test_rounding_lies_between_the_factors_keys_along_tokens_and_values_along_channels(weights):
    rounding = Rounding(bits=2, key_group=4, value_group=2)
    factors, _ = factors_for(weights, torch.randn(1, 64, HIDDEN, generator=seeded(1)), 4, "svd")
    rows = torch.randn(8, HIDDEN, generator=seeded(2))
    c_k, c_v = rows @ factors.k.a.T, rows @ factors.v.a.T

    def rounded(groups):
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / 3
        return torch.round((groups - low) / scale) * scale + low

    keys = rounded(c_k.T.reshape(4, 2, 4)).reshape(4, 8).T @ factors.k.b.T
    values = rounded(c_v.reshape(8, 2, 2)).reshape(8, 4) @ factors.v.b.T
    expected = (rows @ weights[0].T - keys).square().mean() + (rows @ weights[1].T - values).square().mean()
    found = reconstruction_loss(rows, weights, factors.tensors(), rounding)
    assert float(found) == pytest.approx(float(expected), rel=5e-3)  # the grid itself is in float16
    assert float(found) > 1.05 * float(reconstruction_loss(rows, weights, factors.tensors(), None))


def test_gradients_pass_through_the_rounding_but_at_the_ends_of_a_group(weights):
    rounding = Rounding(bits=4, key_group=4, value_group=3)
    c = torch.tensor([[0.0, 9.0, 0.3], [1.0, 7.0, 0.1], [2.2, 5.0, 0.9], [5.0, 1.0, 0.5]], requires_grad=True)
    rounding.keys(c).sum().backward()
    assert c.grad.tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 0], [0, 0, 1]]
    c.grad = None
    rounding.values(c).sum().backward()
    assert c.grad.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0]]


def stepped(weights, factors, x, rounding=None, **keys):
    found = LayerTraining(factors, weights, settings(**keys), rounding)
    with torch.no_grad():
        while not found.done:
            found.take(x)
    return found


def test_a_step_is_adamw_with_a_linear_decay_and_a_clipped_gradient(weights, x):
    factors, _ = factors_for(weights, x, 3, "random")
    found = stepped(weights, factors, x * 30, steps=3, lr=0.01, batch_tokens=512)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in factors.tensors().items()}
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in parameters.items()}
    for number in range(3):
        rows = (x * 30)[0, 512 * number : 512 * (number + 1)]
        loss = reconstruction_loss(rows, weights, parameters, None)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert norm > 2  # so that clipping matters
        for name, parameter in parameters.items():
            gradient = gradients[name] / (norm + 1e-6)
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient.square())
            step = first / (1 - 0.9 ** (number + 1))
            root = (second / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
            with torch.no_grad():
                parameter -= 0.01 * (1 - number / 3) * step / root
    for name, tensor in found.result("x").tensors().items():
        torch.testing.assert_close(tensor, parameters[name].detach(), rtol=1e-4, atol=1e-5)


def test_training_ends_at_the_closed_form_and_never_below_it(weights, x):
    _, best = factors_for(weights, x, 3, "whiten")
    rows = x[0].double()
    gram = rows.T @ rows / len(rows)
    for init, reach in (("asvd", 1.01), ("svd", 1.01)):
        factors, before = factors_for(weights, x, 3, init)
        trained = stepped(weights, factors, x, steps=400, lr=0.01, batch_tokens=1024).result("x")
        after = sum(
            mean_square_error(w.double(), pair, gram)
            for w, pair in zip(weights, (trained.k, trained.v), strict=True)
        )
        assert 0.99 * best <= after <= reach * best < before


def test_random_factors_stay_worst_after_equally_many_steps(weights, x):
    rows = x[0].double()
    gram = rows.T @ rows / len(rows)
    after = {}
    for init in ("whiten", "asvd", "svd", "random"):
        factors, before = factors_for(weights, x, 4, init)
        trained = stepped(weights, factors, x, steps=60, lr=0.005, batch_tokens=256).result("x")
        after[init] = sum(
            mean_square_error(w.double(), pair, gram)
            for w, pair in zip(weights, (trained.k, trained.v), strict=True)
        )
        assert after[init] < 1.02 * before
    assert max(after, key=after.get) == "random"


def test_training_through_the_rounding_lowers_the_rounded_loss(weights, x):
    rounding = Rounding(bits=2, key_group=32, value_group=2)
    factors, _ = factors_for(weights, x, 4, "whiten")
    before = float(reconstruction_loss(x[0], weights, factors.tensors(), rounding))
    keys = {"steps": 100, "lr": 0.003, "batch_tokens": 1024, "bits": 2}
    trained = stepped(weights, factors, x, rounding, **keys).result("x")
    assert float(reconstruction_loss(x[0], weights, trained.tensors(), rounding)) < 0.97 * before


def test_tokens_are_taken_as_they_come_in_batches_of_one_size(weights, x):
    factors, _ = factors_for(weights, x, 3, "asvd")
    keys = {"steps": 6, "lr": 0.01, "batch_tokens": 100}
    whole = stepped(weights, factors, x, **keys).result("x")
    found = LayerTraining(factors, weights, settings(**keys), None)
    taken = [found.take(part) for part in x[:, :900].split(70, dim=1)]
    assert sum(taken) == 6
    assert taken[:4] == [0, 1, 1, 0]
    for name, tensor in found.result("x").tensors().items():
        assert torch.equal(tensor, whole.tensors()[name])
    assert found.take(x) == 0  # it is done


def test_only_whole_groups_of_a_sequence_are_rounded_together(weights):
    factors, _ = factors_for(weights, torch.randn(1, 64, HIDDEN, generator=seeded(1)), 4, "svd")
    found = LayerTraining(factors, weights, settings(steps=2, bits=4, batch_tokens=32), Rounding(4, 8, 2))
    sequences = torch.randn(2, 21, HIDDEN, generator=seeded(3))
    assert found.take(sequences) == 1  # 16 tokens of each
    assert found.tokens == 32
    assert found.take(torch.randn(2, 7, HIDDEN, generator=seeded(4))) == 0
    assert found.tokens == 32


# --- a model's attentions -----------------------------------------------------------------------


def prepared(model, **keys):
    found = settings(**{"removed": 0.5, "init": "asvd", "steps": 8, "lr": 0.01, "batch_tokens": 32, **keys})
    sites = attentions_of(model.config).compressible
    scheme = scheme_of(sites, uniform_ranks(sites, found), found)
    start = {}
    for site in sites:
        energy = Energy(torch.eye(48).double(), torch.ones(48).double(), 1)
        pairs = []
        for side, rank in zip("kv", uniform_ranks(sites, found)[site.name], strict=True):
            weight = model.module.get_submodule(f"{site.name}.{side}_proj").weight.double()
            spectrum = spectrum_of(weight, energy.gram)
            pairs.append(factorise(weight, energy, spectrum, rank, "asvd", alpha=0.5, generator=seeded()))
        start[site.name] = KvFactors(*pairs)
    return found, scheme, start


def trained(model, recorded, folder, only=None, **keys):
    found, scheme, start = prepared(model, **keys)
    chosen = start if only is None else {name: start[name] for name in only}
    folder.mkdir(exist_ok=True)
    return train(model, chosen, scheme, found, recorded, folder, SilentProgress())


def same(one, other):
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_attentions_are_independent_and_no_weight_changes(opened, calibration, tmp_path, monkeypatch):
    model = opened()
    recorded = calibration(model)
    before = tensors_sha256(model.module.state_dict())
    both = trained(model, recorded, tmp_path / "both")
    names = list(both.factors)
    alone = trained(model, recorded, tmp_path / "alone", only=names[1:])
    assert same(both.factors[names[1]], alone.factors[names[1]])
    monkeypatch.setattr(training, "STATE_BUDGET_BYTES", 1)
    one_by_one = trained(model, recorded, tmp_path / "single")
    assert all(same(both.factors[name], one_by_one.factors[name]) for name in names)
    assert tensors_sha256(model.module.state_dict()) == before
    assert all(parameter.grad is None for parameter in model.module.parameters())
    start = prepared(model)[2]
    assert not any(same(start[name], both.factors[name]) for name in names)


def test_a_killed_training_goes_on_and_ends_at_the_same_bytes(opened, calibration, tmp_path, monkeypatch):
    model = opened()
    recorded = calibration(model)
    whole = trained(model, recorded, tmp_path / "whole")
    monkeypatch.setattr(training, "STATE_BUDGET_BYTES", 1)
    monkeypatch.setattr(training, "INPUT_BUDGET_BYTES", 0)
    replays = 0
    observe = type(recorded).observe

    def killed(self, *arguments):
        nonlocal replays
        replays += 1
        if replays == 4:  # 8 steps of 32 tokens are three replays of 120
            raise KeyboardInterrupt
        observe(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(type(recorded), "observe", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(model, recorded, tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["model.layers.0.self_attn.safetensors"]
    again = trained(model, recorded, tmp_path / "killed")
    assert (whole.kept, again.kept) == (0, 1)
    assert all(same(whole.factors[name], again.factors[name]) for name in whole.factors)


@pytest.mark.parametrize(("budget", "replays"), [(2 * 120 * 48 * 4, 1), (2 * 120 * 48 * 4 - 1, 3), (0, 3)])
def test_inputs_that_fit_are_kept_and_give_the_same_bytes(
    opened, calibration, tmp_path, monkeypatch, budget, replays
):
    model = opened()
    recorded = calibration(model)
    expected = trained(model, recorded, tmp_path / "expected")
    monkeypatch.setattr(training, "INPUT_BUDGET_BYTES", budget)
    count, observe = 0, type(recorded).observe

    def counting(*arguments):
        nonlocal count
        count += 1
        observe(*arguments)

    monkeypatch.setattr(type(recorded), "observe", counting)
    found = trained(model, recorded, tmp_path / "found")  # 8 steps of 32 of 120 tokens
    assert count == replays
    assert all(same(found.factors[name], expected.factors[name]) for name in expected.factors)


@pytest.mark.parametrize("damage", [b"", b"not tensors"])
def test_damaged_files_are_trained_again(opened, calibration, tmp_path, damage):
    model = opened()
    recorded = calibration(model)
    whole = trained(model, recorded, tmp_path / "state")
    path = tmp_path / "state" / "model.layers.1.self_attn.safetensors"
    content = path.read_bytes()
    path.write_bytes(damage or content[:-4] + b"\0\0\0\1")
    again = trained(model, recorded, tmp_path / "state")
    assert again.kept == 1
    assert all(same(whole.factors[name], again.factors[name]) for name in whole.factors)
    assert path.read_bytes() == content


def test_a_calibration_without_a_whole_group_is_refused(opened, calibration, tmp_path):
    model = opened()
    with pytest.raises(StageError, match="no sequence of the calibration has the 32 tokens") as caught:
        trained(model, calibration(model), tmp_path / "state", bits=4)
    assert "length: 32" in caught.value.hint


def test_a_training_that_diverges_is_refused(opened, calibration, tmp_path):
    model = opened()
    with torch.no_grad():
        model.module.model.layers[0].input_layernorm.weight.mul_(1e30)
    with pytest.raises(StageError, match=r"layers\.0\.self_attn: the training of its factors diverged"):
        trained(model, calibration(model), tmp_path / "state")


def test_a_state_takes_what_is_planned():
    layer = prepared_layer()
    found = settings(steps=1, batch_tokens=128)
    weights = 48 + 24
    assert training.state_bytes(layer, found) == 4 * (4 * weights * 18 + 2 * 48 * 24 + 128 * 48)
    assert training.state_bytes(replace_rank(layer), found) > training.state_bytes(layer, found)


def prepared_layer():
    from compress.runtime.kv.scheme import KvLayer

    return KvLayer(hidden=48, width=24, rank_k=8, rank_v=10, value_group=5)


def replace_rank(layer):
    return layer.model_copy(update={"rank_k": 9})
