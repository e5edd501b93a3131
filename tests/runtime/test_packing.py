import pytest
import torch
from compress.runtime.packing import pack, packed_width, unpack
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 6]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_round_trip(bits, rows, columns, seed):
    half = 1 << (bits - 1)
    values = torch.randint(
        -half, half, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), values)


def test_low_bits_come_first():
    assert pack(torch.tensor([[-8, 7]]), 4).tolist() == [[0xF0]]
    assert pack(torch.tensor([[-2, -1, 0, 1]]), 2).tolist() == [[0xE4]]
    # 3 bits: 1, 2, 3 as a bit stream from the low end is 1 + 2 * 8 + 3 * 64 = 209, and 0 more.
    assert pack(torch.tensor([[-3, -2, -1]]), 3).tolist() == [[209, 0]]


def test_a_value_outside_the_range_is_refused():
    with pytest.raises(ValueError, match="range of 4 bits"):
        pack(torch.tensor([[8]]), 4)
    with pytest.raises(ValueError, match="5 bits"):
        pack(torch.tensor([[0]]), 5)
