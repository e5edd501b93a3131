import pytest
import torch
from compress.runtime.rotation import Rotation, block_for, factors, hadamard, has_hadamard, random_signs


@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, 36, 72, 128, 144, 1152, 1280, 1536, 2432, 3072, 4608])
def test_hadamard_is_orthogonal(order):
    matrix = hadamard(order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_factors_are_small():
    assert factors(1152) == (36, 32)
    assert factors(4608) == (36, 128)
    assert factors(3072) == (12, 256)
    assert factors(128) == (128,)


def test_no_matrix_is_an_error():
    assert not has_hadamard(6)
    with pytest.raises(ValueError, match="order 6"):
        hadamard(6)
    with pytest.raises(ValueError, match="blocks of 6"):
        Rotation(torch.ones(12), 6)


@pytest.mark.parametrize(
    ("columns", "block"), [(72, 72), (1152, 1152), (1152, 128), (4608, 4608), (4608, 128), (3072, 3072)]
)
def test_rotation_equals_the_dense_matrix_and_its_inverse_undoes_it(columns, block):
    generator = torch.Generator().manual_seed(3)
    sign = random_signs(columns, generator)
    rotation = Rotation(sign, block, torch.float64)
    x = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    dense = torch.block_diag(*[hadamard(block)] * (columns // block)) / block**0.5
    rotated = rotation(x)
    torch.testing.assert_close(rotated, (x * sign) @ dense)
    torch.testing.assert_close(rotation.inverse(rotated), x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_block_is_the_largest_power_of_two_up_to_128():
    assert [block_for(c) for c in (1152, 4608, 72, 64, 100)] == [128, 128, 8, 64, 4]
