import copy
import itertools

import pytest
import torch
from compress.runtime import integer, prepacked, static
from compress.runtime.linear import QuantizedLinear, tensor_shapes
from compress.runtime.manifest import ActivationScheme, QuantizedModule, RotationScheme
from compress.runtime.packing import pack

ROWS, COLUMNS = 48, 64


def make(low=-2.0, high=3.0, seed=0, dtype=torch.float32, activation=(8, False), **changes):
    """Return a layer of random content whose static grid covers low to high."""
    generator = torch.Generator().manual_seed(seed)
    values = {"shape": (ROWS, COLUMNS), "bits": 8, "symmetric": True, "bias": True, "method": "rtn"}
    act = ActivationScheme(bits=activation[0], symmetric=activation[1], scope="tensor")
    made = QuantizedModule(**{**values, "activation": act, **changes})
    half = 1 << (made.bits - 1)
    scale, zero = static.grid_of_range(low, high, act.bits, act.symmetric)
    tensors = {"activation_scale": scale, "activation_zero_point": zero}
    for name, (shape, kind) in tensor_shapes(made, dtype).items():
        if name == "qweight":
            q = torch.randint(-half, half, made.shape, generator=generator, dtype=torch.int8)
            tensors[name] = q if made.bits == 8 else pack(q, made.bits)
        elif name == "zero_point":
            tensors[name] = torch.randint(-half + 1, half, shape, generator=generator).to(kind)
        elif name == "rotation_sign":
            tensors[name] = (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(kind)
        elif name not in tensors:
            tensors[name] = (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(kind)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return QuantizedLinear.from_tensors(made, dtype, tensors)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_grid_of_a_range_worked_by_hand():
    # -1.0 to 4.1 in 255 steps of 0.02; -1 is 50 steps below zero, so zero is the 50th level from below.
    scale, zero = static.grid_of_range(-1.0, 4.1, 8, False)
    assert scale.tolist() == pytest.approx([0.02])
    assert zero.tolist() == [128 - 50]
    x = torch.tensor([[-1.0, 0.0, 4.1, 0.021, -7.0, 9.0]])
    tokens = static.quantize(x, scale, zero, 8)
    assert tokens.q.tolist() == [[-128, -78, 127, -77, -128, 127]]
    assert integer.dequantized(tokens).flatten().tolist() == pytest.approx([-1, 0, 4.1, 0.02, -1, 4.1])


def test_the_grid_has_zero_on_it_and_the_paper_s_step():
    for low, high, bits in ((0.5, 3.0, 8), (-3.0, -0.5, 8), (-1.0, 2.0, 6), (-0.2, 5.0, 4)):
        scale, zero = static.grid_of_range(low, high, bits, False)
        assert float(scale) == pytest.approx((max(high, 0) - min(low, 0)) / (2**bits - 1))
        tokens = static.quantize(torch.zeros(1, 4), scale, zero, bits)
        assert integer.dequantized(tokens).abs().max() == 0
    scale, zero = static.grid_of_range(-4.0, 2.0, 8, True)
    assert (float(scale), zero) == (pytest.approx(4 / 127), None)
    assert static.grid_of_range(0.0, 0.0, 8, False)[0] > 0


GRIDS = list(itertools.product((8, 6, 4), (True, False)))


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_equals_the_dynamic_grid_of_a_row_with_the_same_range(bits, symmetric):
    x = torch.randn(1, 200, generator=torch.Generator().manual_seed(2)) + 0.4
    scale, zero = static.grid_of_range(float(x.min()), float(x.max()), bits, symmetric)
    ours, theirs = (
        static.quantize(x, scale, zero, bits, True),
        integer.quantize_tokens(x, bits, symmetric, True),
    )
    assert torch.equal(ours.q, theirs.q)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.total, theirs.total)
    assert (ours.zero is None) == (theirs.zero is None)
    assert ours.zero is None or torch.equal(ours.zero, theirs.zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_in_parts_equals_whole(bits, symmetric, dtype):
    x = (torch.randn(700, 300, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    scale, zero = static.grid_of_range(-2.0, 3.0, bits, symmetric)
    parts = static.quantize(x, scale, zero, bits, True)
    whole = static._quantize_whole(x, scale, None if zero is None else zero.float(), bits, True)
    assert torch.equal(parts.q, whole.q)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.total, whole.total)
    assert (parts.zero is None) == (whole.zero is None)
    assert parts.zero is None or torch.equal(parts.zero, whole.zero)
    unsigned = static.quantize(x, scale, zero, bits, unsigned=True)
    assert torch.equal(unsigned.q.short() - 128, parts.q.short())


WEIGHTS = list(itertools.product((8, 4, 2), (True, False), (None, 16)))


@pytest.mark.parametrize("activation", GRIDS)
@pytest.mark.parametrize(("bits", "symmetric", "group"), WEIGHTS)
def test_integer_path_equals_the_reference(bits, symmetric, group, activation, monkeypatch):
    layer = make(bits=bits, symmetric=symmetric, group_size=group, activation=activation)
    x = torch.randn(2, 9, COLUMNS, generator=torch.Generator().manual_seed(1)) * 2 + 0.3
    reference = layer.reference_forward(x)
    assert relative(layer(x), reference) < 2e-6
    monkeypatch.setattr(prepacked, "is_available", lambda: False)
    assert relative(copy.deepcopy(layer)(x), reference) < 2e-6


@pytest.mark.parametrize("changes", [
    {"rotation": RotationScheme(block=16), "input_scale": True},
    {"low_rank": 4, "activation": (8, True)},
    {"bits": 4, "group_size": 16, "rotation": RotationScheme(block=64), "low_rank": 2},
])  # fmt: skip
def test_with_transforms_and_a_branch(changes):
    layer = make(**changes)
    x = torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(4))
    assert relative(layer(x), layer.reference_forward(x)) < 2e-6


def test_many_rows_go_through_in_parts(monkeypatch):
    layer = make(symmetric=False)
    x = torch.randn(600, COLUMNS, generator=torch.Generator().manual_seed(5))
    whole = layer(x)
    monkeypatch.setattr(prepacked, "_FINISH_ELEMENTS", 1000)
    assert torch.equal(layer(x), whole)
    assert torch.equal(layer(x[100:103]), whole[100:103])
    assert layer(x[:0]).shape == (0, ROWS)


def test_what_lies_outside_takes_the_end_and_nan_stays_nan():
    layer = make(low=-1.0, high=1.04)
    x = torch.full((4, COLUMNS), 0.5)
    x[0] = 40.0
    x[1] = 1.04
    x[2, 7] = float("nan")
    y = layer(x)
    assert torch.equal(y[0], y[1])
    assert y[2].isnan().all()
    assert y[3].isfinite().all()
    assert layer.reference_forward(x)[2].isnan().all()


def test_dtypes_and_casting_leave_the_grid_alone():
    layer = make()
    for dtype in (torch.bfloat16, torch.float16):
        layer.to(dtype)
        assert layer.activation_scale.dtype == torch.float32
        assert layer.activation_zero_point.dtype == torch.int16
        x = torch.randn(5, COLUMNS).to(dtype)
        assert layer(x).dtype == dtype
        assert relative(layer(x), layer.reference_forward(x)) < 0.01
    assert torch.equal(layer.activation_scale, make().activation_scale)


@pytest.mark.slow
def test_compiles_as_one_graph():
    layer = make(activation=(4, False), symmetric=False)
    x = torch.randn(2, 16, COLUMNS)
    expected = copy.deepcopy(layer)(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    compiled(x)
    torch.testing.assert_close(compiled(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_a_gpu_gives_what_a_cpu_gives(bits, symmetric):
    layer = make(activation=(bits, symmetric), symmetric=False)
    x = torch.randn(3, 7, COLUMNS, generator=torch.Generator().manual_seed(6)) * 2
    expected = layer.reference_forward(x)
    assert relative(layer.cuda()(x.cuda()).cpu(), expected) < 1e-5
