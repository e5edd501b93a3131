"""Rounded layers on disk, folded transforms, and layers that compute as candidates: bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from compress.calibration.content import hash_weights
from compress.calibration.sensitivity_probe import Candidate as Asked
from compress.compressors.quantization.balance import Transform
from compress.compressors.quantization.building import Original, layer_of, rounded, settled
from compress.compressors.quantization.mixed.bank import Bank, Candidate
from compress.compressors.quantization.mixed.folding import (
    Transforms,
    fold_all,
    read_transforms,
    write_transforms,
)
from compress.compressors.quantization.mixed.quantizer import BankQuantizer, Rounding
from compress.compressors.quantization.scheme import survey_linears
from compress.recipes.stages import MixdqSettings
from compress.runtime.integer import fake_quantize_tokens
from compress.runtime.manifest import ActivationScheme, FirstToken, QuantizedModule
from compress.runtime.rotation import Rotation, random_signs
from torch import nn

SETTINGS = MixdqSettings(budget={"mean_bits": 4.0})
NAME = "blocks.0.ff"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scheme_of(bits, **changes):
    return QuantizedModule(
        shape=(24, 32), bits=bits, symmetric=True, bias=True, method="mixdq",
        activation=ActivationScheme(bits=8), **changes,
    )  # fmt: skip


@pytest.fixture
def linear():
    made = nn.Linear(32, 24)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))
    return made


@pytest.fixture
def transform():
    scale = 1 + torch.rand(32, generator=generator(2))
    return Transform(0.5, scale, random_signs(32, generator(3)), 16)


def fill(bank, linear, transform, bits=(2, 4, 8)):
    bank.prepare()
    original = Original(NAME, linear.weight.detach(), linear.bias.detach(), transform)
    made = {}
    for number in bits:
        scheme = settled(scheme_of(number), original)
        tensors = rounded(original, scheme, SETTINGS, torch.float32)
        made[f"w{number}"] = Candidate(scheme, tensors, {"sqnr_db": float(number)})
    bank.write(NAME, made)
    return made


def test_what_is_read_is_what_was_written(tmp_path, linear, transform):
    bank = Bank(tmp_path / "bank", torch.float32)
    assert not bank.has(NAME)
    made = fill(bank, linear, transform)
    assert bank.has(NAME)
    assert bank.labels(NAME) == ("w2", "w4", "w8")
    for label, candidate in made.items():
        found = bank.read(NAME, label)
        assert found.scheme == candidate.scheme
        assert found.facts == candidate.facts
        assert found.tensors.keys() == candidate.tensors.keys()
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in candidate.tensors.items())
    with pytest.raises(KeyError):
        bank.read(NAME, "w3")


def test_the_same_layer_gives_the_same_file(tmp_path, linear, transform):
    contents = []
    for folder in ("a", "b"):
        fill(Bank(tmp_path / folder, torch.float32), linear, transform)
        contents.append((tmp_path / folder / f"{NAME}.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_half_written_files_are_cleared(tmp_path, linear, transform):
    bank = Bank(tmp_path / "bank", torch.float32)
    fill(bank, linear, transform)
    torn = bank.folder / f".{NAME}.safetensors.partial-999999999-0123abcd"
    torn.write_bytes(b"x")
    bank.prepare()
    assert not torn.exists()
    assert bank.has(NAME)


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty"])
def test_a_damaged_file_counts_as_absent(tmp_path, linear, transform, damage):
    bank = Bank(tmp_path / "bank", torch.float32)
    fill(bank, linear, transform)
    file = bank.folder / f"{NAME}.safetensors"
    whole = file.read_bytes()
    broken = {
        "cut": whole[:-7],
        "flip": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "header": whole.replace(b"mixdq", b"mixdk", 1),
        "empty": b"",
    }
    file.write_bytes(broken[damage])
    assert not bank.has(NAME)
    fill(bank, linear, transform)
    assert bank.has(NAME)
    assert file.read_bytes() == whole


WRITER = """
import sys
from pathlib import Path
import torch
from compress.compressors.quantization.mixed.bank import Bank, Candidate
from compress.runtime.manifest import QuantizedModule
bank = Bank(Path(sys.argv[1]), torch.float32)
bank.prepare()
scheme = QuantizedModule(shape=(1024, 1024), bits=8, symmetric=True, bias=True, method="mixdq")
for index in range(10**6):
    bank.write(f"layer.{index}", {"w8": Candidate(scheme, {"weight": torch.full((1024, 1024), index)}, {})})
"""


def test_what_a_killed_process_has_written_is_whole(tmp_path):
    folder = tmp_path / "bank"
    bank = Bank(folder, torch.float32)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)]) as writer:
        deadline = time.monotonic() + 60
        while not (folder / "layer.4.safetensors").exists():
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(writer.pid, signal.SIGKILL)
    bank.prepare()
    files = sorted(folder.iterdir())
    assert len(files) >= 5
    for file in files:
        assert file.name.startswith("layer.")
        assert bank.has(file.stem)
        index = int(file.stem.rpartition(".")[2])
        assert bool((bank.read(file.stem, "w8").tensors["weight"] == index).all())
    assert not bank.has(f"layer.{len(files)}")


def test_a_weight_candidate_is_the_banks_layer_with_its_input_as_it_is(tmp_path, linear, transform):
    bank = Bank(tmp_path / "bank", torch.float32)
    made = fill(bank, linear, transform)
    x = torch.randn(3, 5, 32, generator=generator(4))
    before = linear(x)
    for label, candidate in made.items():
        scheme = candidate.scheme.model_copy(update={"activation": None})
        layer = layer_of(scheme, torch.float32, dict(candidate.tensors), linear.bias)
        with BankQuantizer(bank)(NAME, linear, Asked("weight", label, int(label[1:]))):
            assert torch.equal(linear(x), layer.reference_forward(x))
    assert "forward" not in linear.__dict__
    assert torch.equal(linear(x), before)


def test_an_input_candidate_rounds_behind_scale_and_rotation(tmp_path, linear, transform):
    bank = Bank(tmp_path / "bank", torch.float32)
    fill(bank, linear, transform)
    x = torch.randn(3, 5, 32, generator=generator(4))
    asked = Asked("activation", "a4", 4, ActivationScheme(bits=4, symmetric=False).model_dump(mode="json"))
    with BankQuantizer(bank)(NAME, linear, asked):
        found = linear(x)
    rows = fake_quantize_tokens(transform.on_inputs(x.reshape(-1, 32)), 4, False)
    expected = nn.functional.linear(rows, transform.on_weight(linear.weight), linear.bias).view(3, 5, 24)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, linear(x), atol=1e-2)


def test_a_stored_first_token_is_not_rounded(tmp_path, linear):
    bank = Bank(tmp_path / "bank", torch.float32)
    bank.prepare()
    scheme = scheme_of(4, first_token=FirstToken(sha256="0" * 64))
    bank.write(NAME, {"w4": Candidate(scheme, {"weight": torch.zeros(24, 16, dtype=torch.uint8)}, {})})
    x = torch.randn(3, 5, 32, generator=generator(4))
    before = linear(x)
    asked = Asked("activation", "a4", 4, ActivationScheme(bits=4, scope="tensor").model_dump(mode="json"))
    with BankQuantizer(bank)(NAME, linear, asked):
        found = linear(x)
    assert torch.equal(found[:, 0], before[:, 0])
    # Nor does it widen the grid of the others.
    rest = fake_quantize_tokens(x[:, 1:].reshape(1, -1), 4, True).view(3, 4, 32)
    torch.testing.assert_close(found[:, 1:], linear(rest))
    assert not torch.allclose(found[:, 1:], before[:, 1:], atol=1e-2)


@pytest.mark.parametrize(("scope", "grids"), [("token", 6), ("sample", 2), ("tensor", 1)])
def test_what_shares_a_scale(scope, grids):
    x = torch.randn(2, 3, 16, generator=generator(7)) * torch.tensor([1.0, 50.0])[:, None, None]
    x = x * torch.tensor([1.0, 4.0, 9.0])[None, :, None]
    found = Rounding(ActivationScheme(bits=8, scope=scope))(x)
    expected = fake_quantize_tokens(x.reshape(grids, -1), 8, True).view(x.shape)
    assert torch.equal(found, expected)


def test_rounding_without_error_is_the_identity():
    x = torch.arange(-127, 128).float().repeat(2, 1)
    assert torch.equal(Rounding(ActivationScheme(bits=8))(x), x)
    sign = random_signs(64, generator())
    rotated = Rounding(ActivationScheme(bits=8), torch.full((64,), 2.0), Rotation(sign, 64))
    y = torch.randn(4, 64, generator=generator(1))
    assert float((rotated(y) - y).norm() / y.norm()) < 0.02


def test_folding_changes_no_output_and_comes_again_bit_for_bit(opened, outputs, tmp_path):
    model = opened()
    exact = outputs(model)
    survey = survey_linears(model.family, model.module, SETTINGS, {})
    decided = {}
    for index, group in enumerate(survey.groups):
        width = model.module.get_submodule(group.targets[0]).in_features
        scale = 1 + 9 * torch.rand(width, generator=generator(index))
        sign = random_signs(width, generator(index)) if index % 2 else None
        decided[group.targets[0]] = Transform(0.5, scale, sign, 16 if index % 2 else None)
    fold_all(model.module, survey.groups, decided)
    assert float((outputs(model) - exact).norm() / exact.norm()) < 1e-5

    write_transforms(tmp_path / "t.safetensors", decided)
    again = opened()
    read = read_transforms(tmp_path / "t.safetensors")
    assert read.keys() == decided.keys()
    fold_all(again.module, survey_linears(again.family, again.module, SETTINGS, {}).groups, read)
    assert hash_weights(again.module) == hash_weights(model.module)


def test_a_folded_scale_is_not_applied_twice(opened):
    model = opened()
    groups = survey_linears(model.family, model.module, SETTINGS, {}).groups
    folded = next(group for group in groups if group.fold is not None)
    free = next(group for group in groups if group.fold is None)
    scale = torch.full((64,), 2.0)
    decided = {group.targets[0]: Transform(0.5, scale) for group in (folded, free)}
    spread = Transforms.of(decided, groups)
    assert spread.layer(folded.targets[0]).scale is None
    assert torch.equal(spread.absorbed(folded.targets[0]), scale)
    assert torch.equal(spread.layer(free.targets[0]).scale, scale)
    assert spread.absorbed(free.targets[0]) is None
    assert spread.exponent(folded.targets[0]) == spread.exponent(free.targets[0]) == 0.5
    assert spread.layer("unknown") == Transform()
