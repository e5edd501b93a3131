import copy

import pytest
import torch
from compress.compressors.quantization.grid import Grid, find_steps, round_to_nearest
from compress.runtime import first_token, static
from compress.runtime.linear import QuantizedLinear
from compress.runtime.manifest import ActivationScheme, FirstToken, QuantizedModule
from torch import nn

ROWS, COLUMNS = 32, 64


def weights(seed=0):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) / 8


def text(batch=2, tokens=9, seed=1, feature=None):
    """Return text features [batch, tokens, channels] that start with `feature`."""
    x = torch.randn(batch, tokens, COLUMNS, generator=torch.Generator().manual_seed(seed))
    if feature is not None:
        x[:, 0] = feature
    return x


def planted():
    """Return a first token that is 60 times as large as the others."""
    return 60 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(7))


def make(feature=None, *, static_range=None, activation=True, dtype=torch.float32):
    """Return a layer that stores its output for `feature`, and computes the rest on the given grid."""
    weight, bias = weights(), torch.arange(ROWS) / 100.0
    kind = Grid(8, True, "minmax", None)
    steps = find_steps(weight, kind)
    act = None
    if activation:
        act = ActivationScheme(bits=8, symmetric=False, scope="tensor" if static_range else "token")
    stored = FirstToken(sha256=first_token.digest(feature)) if feature is not None else None
    scheme = QuantizedModule(
        shape=(ROWS, COLUMNS),
        bits=8,
        symmetric=True,
        bias=True,
        method="rtn",
        activation=act,
        first_token=stored,
    )
    tensors = {"qweight": round_to_nearest(weight, steps, kind), "scale": steps.scale, "bias": bias.to(dtype)}
    if static_range:
        scale, zero = static.grid_of_range(*static_range, 8, False)
        tensors |= {"activation_scale": scale, "activation_zero_point": zero}
    if feature is not None:
        output = nn.functional.linear(feature, weight, bias).to(dtype)
        tensors |= {"first_token_input": feature, "first_token_output": output}
    return QuantizedLinear.from_tensors(scheme, dtype, tensors)


def sqnr_db(exact, got):
    return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))


def exact(x):
    return nn.functional.linear(x, weights(), torch.arange(ROWS) / 100.0)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 2, 77])
def test_the_first_token_is_stored_and_the_rest_is_what_it_was(batch, tokens):
    feature = planted()
    layer, plain = make(feature, static_range=(-4, 4)), make(static_range=(-4, 4))
    x = text(batch, tokens, feature=feature)
    y = layer(x)
    assert y.shape == (batch, tokens, ROWS)
    assert all(torch.equal(row, layer.first_token_output) for row in y[:, 0])
    assert torch.equal(y[:, 1:], plain(x)[:, 1:])
    torch.testing.assert_close(y, layer.reference_forward(x), rtol=1e-5, atol=1e-5)


def test_a_planted_outlier_ruins_a_grid_for_the_whole_tensor_but_not_the_stored_one():
    feature = planted()
    x = text(4, 77, feature=feature)
    naive = make(static_range=(float(x.min()), float(x.max())))
    ours = make(feature, static_range=(float(x[:, 1:].min()), float(x[:, 1:].max())))
    dynamic = make()
    wanted = exact(x)
    behind = {
        name: sqnr_db(wanted[:, 1:], layer(x)[:, 1:])
        for name, layer in (("naive", naive), ("ours", ours), ("dynamic", dynamic))
    }
    assert behind["ours"] - behind["naive"] >= 25
    assert behind["naive"] < 10
    assert behind["dynamic"] > 35
    # The outlier's own output is so large that a figure over all tokens hides what happened.
    assert sqnr_db(wanted, naive(x)) > behind["naive"] + 12


def test_another_first_token_is_computed_row_by_row_and_never_gets_the_stored_output():
    feature = planted()
    layer = make(feature, static_range=(-4, 4))
    x = text(4, 9, feature=feature)
    x[1, 0] = 0  # what a pipeline puts in the place of an empty prompt
    x[2, 0] = planted().flip(0)
    x[3, 0, 3] = float("nan")
    y = layer(x)
    assert torch.equal(y[0, 0], layer.first_token_output)
    assert torch.equal(y[1, 0], layer.bias)
    assert sqnr_db(exact(x)[2, 0], y[2, 0]) > 35
    assert y[3, 0].isnan().all()
    assert y[:, 1:].isfinite().all()
    finite = x[:3]
    torch.testing.assert_close(layer(finite), layer.reference_forward(finite), rtol=1e-5, atol=1e-4)


def test_rounding_of_the_text_encoder_is_the_same_token_and_a_small_change_is_not():
    feature = planted()
    layer = make(feature, static_range=(-4, 4))
    for dtype in (torch.float16, torch.bfloat16):
        x = text(1, 3, feature=feature.to(dtype).float()).to(dtype)
        assert torch.equal(layer(x)[0, 0], layer.first_token_output.to(dtype))
    x = text(1, 3, feature=feature * 1.05)
    assert not torch.equal(layer(x)[0, 0], layer.first_token_output)
    assert sqnr_db(exact(x)[0, 0], layer(x)[0, 0]) > 35


def test_outlier_channels_alone_do_not_make_it_the_same_token():
    feature = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(3))
    feature[5] = 800.0
    other = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(4))
    other[5] = 800.0
    assert first_token.distance(feature, feature) == 0
    assert first_token.distance(other, feature) > first_token.TOLERANCE
    assert (other - feature).norm() / feature.norm() < first_token.TOLERANCE


@pytest.mark.parametrize("options", [{}, {"activation": False}], ids=["per token", "weight only"])
def test_stores_beside_other_activations_too(options):
    feature = planted()
    layer, plain = make(feature, **options), make(**options)
    x = text(3, 5, feature=feature)
    assert torch.equal(layer(x)[:, 1:], plain(x)[:, 1:])
    assert torch.equal(layer(x)[2, 0], layer.first_token_output)
    x[:, 0] = 1.0
    torch.testing.assert_close(layer(x)[:, 0], plain(x)[:, 0])


def test_with_scales_per_token_it_changes_nothing_material():
    feature = planted()
    x = text(4, 77, feature=feature)
    stored, plain = make(feature)(x), make()(x)
    assert torch.equal(stored[:, 1:], plain[:, 1:])
    assert sqnr_db(stored[:, 0], plain[:, 0]) > 40


def test_an_input_without_tokens_is_refused():
    layer = make(planted(), static_range=(-4, 4))
    with pytest.raises(ValueError, match=r"\[batch, tokens, channels\]"):
        layer(torch.randn(5, COLUMNS))


def test_no_rows():
    layer = make(planted(), static_range=(-4, 4))
    assert layer(torch.empty(0, 7, COLUMNS)).shape == (0, 7, ROWS)


def test_casting_keeps_the_token_and_casts_the_output():
    layer = make(planted(), static_range=(-4, 4)).to(torch.bfloat16)
    assert layer.first_token_input.dtype == torch.float32
    assert layer.first_token_output.dtype == torch.bfloat16
    assert first_token.digest(layer.first_token_input) == layer.scheme.first_token.sha256


def test_example_inputs_take_the_stored_token_into_one_row():
    feature = planted()
    module = nn.Sequential(make(feature, static_range=(-4, 4)))
    inputs = {"encoder_hidden_states": text(), "timestep": torch.ones(2)}
    changed = first_token.put_first(first_token.feature_of(module), inputs)
    assert torch.equal(changed["encoder_hidden_states"][0, 0], feature)
    assert torch.equal(changed["encoder_hidden_states"][1], inputs["encoder_hidden_states"][1])
    assert not torch.equal(inputs["encoder_hidden_states"][0, 0], feature)
    assert first_token.feature_of(nn.Linear(2, 2)) is None
    assert first_token.put_first(None, inputs) is inputs
    assert first_token.put_first(feature, {"timestep": torch.ones(2)}).keys() == {"timestep"}


@pytest.mark.slow
def test_compiles_as_one_graph():
    feature = planted()
    layer = make(feature, static_range=(-4, 4))
    x = text(3, 9, feature=feature)
    x[1, 0] = 2.0
    expected = copy.deepcopy(layer)(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=2e-5, atol=1e-4)
    assert torch.equal(compiled(x)[0, 0], layer.first_token_output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_a_cpu_gives():
    feature = planted()
    layer = make(feature, static_range=(-4, 4))
    x = text(3, 9, feature=feature)
    x[1, 0] = 2.0
    expected = layer(x)
    got = copy.deepcopy(layer).cuda()(x.cuda()).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(got[0, 0], expected[0, 0])
