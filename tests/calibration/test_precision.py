"""Computing in another precision leaves no trace."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.content import hash_weights
from compress.calibration.precision import computing_in
from torch import nn


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    made[1].weight = made[0].weight
    made[2].float()
    made.shared = nn.Parameter(made[0].bias.data, requires_grad=False)  # another object, the same memory
    return made


def test_it_widens_and_comes_back_bit_for_bit():
    made = model()
    before, objects = hash_weights(made), list(made.parameters())
    dtypes = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    with pytest.raises(KeyError), computing_in(made, torch.float32):
        floating = [tensor for tensor in made.state_dict().values() if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in floating} == {torch.float32}
        assert made[1].weight is made[0].weight
        assert made.shared.data_ptr() == made[0].bias.data_ptr()
        assert hash_weights(made) != before
        raise KeyError
    assert hash_weights(made) == before
    assert {name: tensor.dtype for name, tensor in made.state_dict().items()} == dtypes
    assert all(one is other for one, other in zip(objects, made.parameters(), strict=True))
    assert made.shared.data_ptr() == made[0].bias.data_ptr()
    assert made[2].num_batches_tracked.dtype == torch.int64


def test_it_never_narrows():
    made = model()
    before = hash_weights(made)
    with pytest.raises(ValueError, match="cannot hold torch.float32"), computing_in(made, torch.bfloat16):
        pass
    with computing_in(made, None):
        assert hash_weights(made) == before
    assert hash_weights(made) == before
