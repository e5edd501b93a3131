import copy
import itertools

import pytest
import torch
from compress.runtime.linear import QuantizedLinear, tensor_shapes
from compress.runtime.manifest import ActivationScheme, QuantizedModule, RotationScheme
from compress.runtime.packing import pack
from pydantic import ValidationError

ROWS, COLUMNS = 48, 64


def scheme(**changes):
    values = {
        "shape": (ROWS, COLUMNS), "bits": 8, "symmetric": True, "bias": True, "method": "rtn",
        "activation": ActivationScheme(bits=8),
    }  # fmt: skip
    return QuantizedModule(**{**values, **changes})


def make(seed=0, dtype=torch.float32, **changes):
    """Return a layer with random content of the given scheme."""
    generator = torch.Generator().manual_seed(seed)
    made = scheme(**changes)
    half = 1 << (made.bits - 1)
    tensors = {}
    for name, (shape, kind) in tensor_shapes(made, dtype).items():
        if name == "qweight":
            q = torch.randint(-half, half, made.shape, generator=generator, dtype=torch.int8)
            tensors[name] = q if made.bits == 8 else pack(q, made.bits)
        elif name == "zero_point":
            tensors[name] = torch.randint(-half + 1, half, shape, generator=generator).to(kind)
        elif name == "rotation_sign":
            tensors[name] = (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(kind)
        else:
            tensors[name] = (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(kind)
    return QuantizedLinear.from_tensors(made, dtype, tensors)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


OPTIONS = list(
    itertools.product(
        (8, 6, 4, 3, 2),
        (True, False),
        (None, 16),
        (None, (8, True), (8, False), (6, True), (4, True), (4, False)),
    )
)


@pytest.mark.parametrize(("bits", "symmetric", "group", "activation"), OPTIONS)
def test_integer_path_equals_the_fake_quantized_reference(bits, symmetric, group, activation):
    act = ActivationScheme(bits=activation[0], symmetric=activation[1]) if activation else None
    layer = make(bits=bits, symmetric=symmetric, group_size=group, activation=act)
    x = torch.randn(2, 9, COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.3
    y = layer(x)
    assert y.shape == (2, 9, ROWS)
    assert relative(y, layer.reference_forward(x)) < 5e-6
    half_x = x.bfloat16()
    assert layer(half_x).dtype == torch.bfloat16
    assert relative(layer(half_x), layer.reference_forward(half_x)) < 5e-3


@pytest.mark.parametrize("changes", [
    {"input_scale": True},
    {"rotation": RotationScheme(block=64)},
    {"rotation": RotationScheme(block=16), "input_scale": True, "low_rank": 3},
    {"bias": False, "low_rank": 2},
    {"activation": None, "input_scale": True, "rotation": RotationScheme(block=32)},
])  # fmt: skip
def test_transforms_and_branch(changes):
    layer = make(**changes)
    x = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(1))
    assert relative(layer(x), layer.reference_forward(x)) < 5e-6
    bias = 0 if layer.bias is None else layer.bias
    dense = x @ layer.equivalent_weight().T + bias
    assert relative(layer(x), dense) < 0.03


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 5), (2, 3, 4)])
def test_any_leading_shape(lead):
    layer = make()
    x = torch.randn(*lead, COLUMNS)
    assert layer(x).shape == (*lead, ROWS)
    torch.testing.assert_close(layer(x).reshape(-1, ROWS), layer(x.reshape(-1, COLUMNS)))


def test_a_zero_token_and_a_nan_token_stay_to_themselves():
    layer = make()
    x = torch.randn(4, COLUMNS)
    clean = layer(x)
    x[1] = 0
    x[2, 5] = float("nan")
    y = layer(x)
    torch.testing.assert_close(y[1], layer.bias)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


def test_state_dict_round_trip_through_the_meta_device():
    layer = make(bits=4, symmetric=False, group_size=16, rotation=RotationScheme(block=16), low_rank=2)
    with torch.device("meta"):
        empty = QuantizedLinear(layer.scheme, torch.float32)
    assert {n: (tuple(t.shape), t.dtype) for n, t in empty.state_dict().items()} == tensor_shapes(
        layer.scheme, torch.float32
    )
    x = torch.randn(3, COLUMNS)
    expected = layer(x)
    empty.load_state_dict({n: t.clone() for n, t in layer.state_dict().items()}, assign=True)
    assert torch.equal(empty(x), expected)
    filled = make(
        seed=5, bits=4, symmetric=False, group_size=16, rotation=RotationScheme(block=16), low_rank=2
    )
    filled(x)  # lays its own weight out, which loading must forget
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_casting_the_model_leaves_the_grids_alone():
    layer = make(input_scale=True, activation=None)
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert layer.input_scale.dtype == torch.float32
    assert layer.qweight.dtype == torch.int8
    assert layer.bias.dtype == torch.bfloat16


def test_wrong_tensors_are_refused_by_name():
    layer = make()
    tensors = dict(layer.state_dict())
    with pytest.raises(ValueError, match="qweight"):
        QuantizedLinear.from_tensors(
            layer.scheme, torch.float32, {**tensors, "qweight": tensors["qweight"][:, :8]}
        )
    tensors.pop("scale")
    with pytest.raises(ValueError, match="this scheme stores"):
        QuantizedLinear.from_tensors(layer.scheme, torch.float32, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"bits": 4, "symmetric": False},
    {"bits": 8, "symmetric": False, "rotation": RotationScheme(block=64), "input_scale": True},
    {"activation": None},
])  # fmt: skip
def test_compiles_as_one_graph(changes):
    layer = make(**changes)
    x = torch.randn(2, 16, COLUMNS)
    expected = copy.deepcopy(layer)(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    compiled(x)
    torch.testing.assert_close(compiled(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("columns", "changes"),
    [
        (2**17, {}),
        (2**18, {"bits": 4, "symmetric": False}),
        (2**20, {"bits": 6, "activation": {"bits": 8}}),
        (2**18, {"group_size": 2**17}),
    ],
)
def test_sums_that_could_leave_32_bits_are_refused(columns, changes):
    fields = {
        "bits": 8,
        "symmetric": True,
        "activation": {"bits": 8},
        "bias": False,
        "method": "test",
    } | changes
    with pytest.raises(ValidationError, match=f"sums of {changes.get('group_size', columns)} products of"):
        QuantizedModule.model_validate({**fields, "shape": (8, columns)})
    QuantizedModule.model_validate({**fields, "shape": (8, columns), "group_size": 2**10})
    QuantizedModule.model_validate({**fields, "shape": (8, columns), "activation": None})


@pytest.mark.parametrize("columns", [2**16, 2**16 + 1024, 2**17 - 8])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_longest_rows_are_added_up_exactly(columns, rows):
    scheme = QuantizedModule.model_validate(
        {
            "shape": (8, columns),
            "bits": 8,
            "symmetric": True,
            "activation": {"bits": 8},
            "bias": False,
            "method": "t",
        }
    )
    tensors = {"qweight": torch.full((8, columns), 127, dtype=torch.int8), "scale": torch.ones(8, 1)}
    layer = QuantizedLinear.from_tensors(scheme, torch.float32, tensors)
    y = layer(torch.ones(rows, columns))
    assert torch.allclose(y, torch.full_like(y, 127.0 * columns), rtol=1e-6)
