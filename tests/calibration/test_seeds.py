"""Random numbers by name."""

import torch
from compress.calibration.seeds import generator_for, normal_rows


def test_every_row_has_numbers_of_its_own():
    rows = normal_rows((2, 3), (generator_for(7, "test", row) for row in range(3)))
    assert rows.shape == (3, 2, 3) and rows.dtype == torch.float32
    for row in range(3):
        assert torch.equal(rows[row], torch.randn(2, 3, generator=generator_for(7, "test", row)))
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(normal_rows([2, 3], [generator_for(7, "test", 2)])[0], rows[2])


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    normal_rows((4,), [generator_for(0, "test")])
    assert torch.equal(torch.get_rng_state(), state)
