import pytest
import torch
from compress.runtime import integer, prepacked

needs_kernel = pytest.mark.skipif(not prepacked.is_available(), reason="no exact int8 kernel on this CPU")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(rows, columns, *, bits=8, zero=True, token_zero=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, 1, generator=generator) * 0.01 + 0.001
    zeros = torch.randint(-half, half, (rows, 1), generator=generator, dtype=torch.int16) if zero else None
    return integer.integer_weight(q, scale, zeros, bits, token_zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (6, True), (4, True), (8, False), (4, False)])
@pytest.mark.parametrize("shape", [(1, 7), (5, 72), (300, 1151)])
def test_tokens_are_the_rounded_quotients(dtype, bits, symmetric, shape):
    x = (draw(*shape) * 3 + 0.5).to(dtype)
    tokens = integer.quantize_tokens(x, bits, symmetric, total=True)
    top = 2 ** (bits - 1) - 1
    exact, scale = x.double(), tokens.scale.double()
    if symmetric:
        torch.testing.assert_close(scale, exact.abs().amax(1, keepdim=True) / top, rtol=1e-6, atol=0)
        level = tokens.q.double()
    else:
        low, high = exact.amin(1, keepdim=True).clamp_max(0), exact.amax(1, keepdim=True).clamp_min(0)
        torch.testing.assert_close(scale, (high - low) / (2 * top + 1), rtol=1e-6, atol=0)
        level = tokens.q.double() + (0 if tokens.zero is None else tokens.zero.double())
    # Half a step away at most, but for the ends of a grid that is shifted to whole numbers.
    assert ((level - exact / scale).abs() <= (0.5001 if symmetric else 1.0001)).all()
    assert int(tokens.q.abs().max()) <= (top if symmetric else 2 * top + 1)
    assert torch.equal(tokens.total, tokens.q.sum(1, keepdim=True, dtype=torch.int32).float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_unsigned_tokens_are_the_signed_ones_shifted(symmetric):
    x = draw(300, 1152)
    signed = integer.quantize_tokens(x, 8, symmetric)
    unsigned = integer.quantize_tokens(x, 8, symmetric, unsigned=True)
    assert torch.equal(unsigned.q.int() - 128, signed.q.int())
    assert torch.equal(unsigned.scale, signed.scale)


def test_halves_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    assert integer.quantize_tokens(x, 8, True).q.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("columns", [64, 72, 1152])
def test_products_are_exact_at_the_ends_of_the_range(rows, columns):
    a = torch.full((rows, columns), 127, dtype=torch.int8)
    b = torch.full((48, columns), 127, dtype=torch.int8)
    a[:, ::3], b[::2] = -128, -128
    assert torch.equal(integer.matmul(a, b).long(), a.long() @ b.long().t())


def test_products_are_exact_without_vnni_too(monkeypatch):
    monkeypatch.setattr(integer, "cpu_products_are_exact", lambda: False)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, 200), generator=generator, dtype=torch.int8) for n in (17, 48))
    assert torch.equal(integer.matmul(a, b).long(), a.long() @ b.long().t())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "zero"), [(8, True), (8, False), (4, True)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 48), (9, 72, 33), (600, 260, 1000)])
def test_equals_the_portable_product(dtype, bits, zero, symmetric, shape):
    count, columns, rows = shape
    laid_out = weight(rows, columns, bits=bits, zero=zero, token_zero=not symmetric)
    x, bias = draw(count, columns).to(dtype), draw(rows, seed=1)
    got = prepacked.linear(x, prepacked.pack(laid_out, bias), 8, symmetric, dtype)
    tokens = integer.quantize_tokens(x, 8, symmetric, total=True)
    expected = integer.linear(tokens, laid_out, bias, dtype)
    assert got.dtype == dtype
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < (2e-6 if dtype == torch.float32 else 2e-3)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(700, 261, 1003), (2100, 129, 250)])
def test_a_row_is_the_same_to_the_last_bit_in_any_company(threads, dtype, shape):
    count, columns, rows = shape
    packed = prepacked.pack(weight(rows, columns, token_zero=True), draw(rows, seed=1))
    x = draw(count, columns).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = {grid: prepacked.linear(x, packed, 8, grid, dtype) for grid in (True, False)}
        for start, stop in ((0, 1), (5, 7), (0, 64), (100, 333), (count - 1, count)):
            for grid, expected in whole.items():
                alone = prepacked.linear(x[start:stop], packed, 8, grid, dtype)
                assert torch.equal(alone, expected[start:stop])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(prepacked.linear(x, packed, 8, g, dtype), y) for g, y in whole.items())


@needs_kernel
def test_no_tokens_and_inputs_with_gradients():
    packed = prepacked.pack(weight(48, 64), None)
    assert prepacked.linear(torch.empty(0, 64), packed, 8, True, torch.float32).shape == (0, 48)
    x = draw(3, 64).requires_grad_()
    assert not prepacked.linear(x, packed, 8, True, torch.float32).requires_grad


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_alone_is_turned_into_floats(rows, dtype):
    q = weight(700, 512).q
    x = draw(rows, 512).to(dtype)
    expected = x.double() @ q.double().t()
    error = (integer.float_linear(x, q).double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 3e-3)
