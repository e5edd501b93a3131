"""Quantized convolutions against stock ones with rounded floats."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Iterator

import pytest
import torch
from compress.compressors.quantization.grid import Grid, find_steps, round_to_nearest
from compress.errors import SourceError
from compress.runtime import conv as conv_module
from compress.runtime import integer, packing, prepacked_conv, static
from compress.runtime.conv import QuantizedConv2d
from compress.runtime.linear import QuantizedLinear
from compress.runtime.manifest import ActivationScheme, KernelScheme, QuantizedModule
from compress.runtime.modules import quantized_layers, swap_linears
from compress.runtime.windows import kernel_of, output_size, padded, parts, windows
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

SHAPES = [
    # in, out, kernel, stride, padding, dilation, height, width
    (8, 5, 3, 1, 1, 1, 9, 7),
    (12, 6, 3, 2, 1, 1, 16, 16),
    (16, 24, 1, 1, 0, 1, 8, 8),
    (4, 7, (5, 2), (2, 1), (3, 0), (2, 3), 13, 11),
    (4, 3, 1, 2, 1, 1, 5, 6),
]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def quantize(
    conv: nn.Conv2d, bits: int, *, symmetric: bool = True, group_size: int | None = None,
    activation: ActivationScheme | None = None, stored: dict[str, Tensor] | None = None,
) -> QuantizedConv2d:  # fmt: skip
    weight = conv.weight.detach().float().flatten(1)
    grid = Grid(bits, symmetric, "minmax", group_size)
    steps = find_steps(weight, grid)
    q = round_to_nearest(weight, steps, grid)
    scheme = QuantizedModule(
        shape=tuple(weight.shape), bits=bits, group_size=group_size, symmetric=symmetric,
        activation=activation, bias=conv.bias is not None, kernel=kernel_of(conv), method="test",
    )  # fmt: skip
    tensors = {"qweight": q if bits == 8 else packing.pack(q, bits), "scale": steps.scale}
    if steps.zero is not None:
        tensors["zero_point"] = steps.zero
    if conv.bias is not None:
        tensors["bias"] = conv.bias.detach()
    tensors |= stored or {}
    return QuantizedConv2d.from_tensors(scheme, conv.weight.dtype, tensors)


def images(batch: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Items of different size and an offset, so that a shared scale or a lost zero point shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x * torch.arange(1, batch + 1).view(-1, 1, 1, 1) + 0.7


def sqnr_db(exact: Tensor, other: Tensor) -> float:
    noise = (exact.double() - other.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def rounded(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Round every item to its own grid, written out once more."""
    x, flat = x.double(), x.double().flatten(1)
    levels = 2 ** (bits - 1) - 1
    low, high = flat.amin(1).clamp_max(0).view(-1, 1, 1, 1), flat.amax(1).clamp_min(0).view(-1, 1, 1, 1)
    if symmetric:
        step = torch.maximum(-low, high) / levels
        return (x / step).round() * step
    step = (high - low) / (2 * levels + 1)
    zero = (low / step).round()
    return (x / step).round().clamp(zero, zero + 2 * levels + 1) * step


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_computes_what_a_stock_convolution_computes_with_rounded_floats(
    shape: tuple, symmetric: bool
) -> None:
    channels, outputs, kernel, stride, padding, dilation, height, width = shape
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation)
    x = images(3, channels, height, width)
    group_sizes = (None, channels * conv.weight[0, 0].numel() // 2)
    for bits, group_size, activation_bits in itertools.product((8, 6, 4, 3, 2), group_sizes, (None, 8, 4)):
        activation = None
        if activation_bits is not None:
            activation = ActivationScheme(bits=activation_bits, symmetric=symmetric, scope="sample")
        layer = quantize(conv, bits, symmetric=symmetric, group_size=group_size, activation=activation)
        weight = layer.kernels(layer.dequantized_weight())
        seen = x if activation_bits is None else rounded(x, activation_bits, symmetric).float()
        expected = F.conv2d(seen, weight, conv.bias, conv.stride, conv.padding, conv.dilation)
        for inputs in (x, x.contiguous(memory_format=torch.channels_last)):
            y = layer(inputs)
            assert y.shape == expected.shape
            assert sqnr_db(expected, y) > 110
        assert sqnr_db(expected, layer.reference_forward(x)) > 110


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("elements", [1, 400, 2**24])
def test_windows_in_parts_give_what_the_kernel_of_the_cpu_gives(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, elements: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1, stride=(1, 2))
    activation = ActivationScheme(bits=8, symmetric=symmetric, scope="sample")
    layers = [
        quantize(conv, bits, symmetric=symmetric, group_size=groups, activation=activation)
        for bits in (8, 4)
        for groups in (None, 18)
    ]
    x = images(3, 6, 8, 10)
    expected = [layer.reference_forward(x) for layer in layers]
    monkeypatch.setattr(conv_module, "_PART_ELEMENTS", elements)
    monkeypatch.setattr(prepacked_conv, "is_available", lambda columns: False)
    for layer, reference in zip(layers, expected, strict=True):
        assert sqnr_db(reference, layer(x)) > 110


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_stored_grid_is_the_same_for_all_items(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, bits: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1)
    x = images(3, 6, 8, 9)
    scale, zero = static.grid_of_range(-2.0, 4.0, bits, symmetric)
    activation = ActivationScheme(bits=bits, symmetric=symmetric, scope="tensor")
    stored = {"activation_scale": scale} | ({} if zero is None else {"activation_zero_point": zero})
    layer = quantize(conv, 8, activation=activation, stored=stored)
    offset = 0 if zero is None else int(zero)
    half = 2 ** (bits - 1)
    level = (x.double() / scale.double()).round().clamp(offset - half + symmetric, offset + half - 1)
    seen = (level * scale).float()
    expected = F.conv2d(seen, layer.kernels(layer.dequantized_weight()), conv.bias, padding=1)
    assert sqnr_db(expected, layer.reference_forward(x)) > 110
    assert sqnr_db(expected, layer(x)) > 110
    assert torch.equal(layer(x)[1:2], layer(x[1:2]))
    monkeypatch.setattr(prepacked_conv, "is_available", lambda columns: False)
    assert sqnr_db(expected, quantize(conv, 8, activation=activation, stored=stored)(x)) > 110


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, False)])
def test_items_wider_than_the_cache_are_quantized_alike(
    dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    width = 2 * integer.cache_rows(1) + 17
    x = images(2, 1, 1, width).view(2, width).to(dtype)
    x[:, 5], x[:, -3] = 7.0, -5.0
    whole = integer._quantize_whole(x, bits, symmetric, total=False)
    tokens = integer.quantize_tokens(x, bits, symmetric)
    assert torch.equal(tokens.scale, whole.scale)
    assert (tokens.zero is None) == (whole.zero is None)
    assert tokens.zero is None or torch.equal(tokens.zero, whole.zero)
    # Products are rounded once here and twice there, which differs for a few that lie half way.
    apart = (tokens.q.int() - whole.q.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3
    unsigned = integer.quantize_tokens(x, bits, symmetric, unsigned=True)
    assert torch.equal(unsigned.q.int() - 128, tokens.q.int())
    x[1, width // 2] = torch.nan
    assert integer.quantize_tokens(x, bits, symmetric).scale.isnan().tolist() == [[False], [True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1).to(dtype)
    x = images(2, 8, 10, 10).to(dtype)
    for activation in (None, ActivationScheme(bits=8, scope="sample")):
        layer = quantize(conv, 8, activation=activation)
        y = layer(x)
        assert y.dtype == dtype
        assert sqnr_db(layer.reference_forward(x), y) > (45 if dtype == torch.bfloat16 else 60)


def test_results_that_the_kernel_does_not_write_are_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantize(nn.Conv2d(8, 12, 3), 8, activation=ActivationScheme(bits=8, scope="sample"))
    x = images(2, 8, 6, 6).half()
    monkeypatch.setattr(prepacked_conv, "_writes", lambda dtype: dtype == torch.float32)
    y = layer(x)
    assert y.dtype == torch.float16
    assert sqnr_db(layer.reference_forward(x), y) > 60


def test_an_item_does_not_depend_on_its_batch() -> None:
    layer = quantize(nn.Conv2d(8, 12, 3, padding=1), 8, activation=ActivationScheme(bits=8, scope="sample"))
    x = images(4, 8, 9, 9)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


def test_the_largest_integers_are_added_up_exactly() -> None:
    conv = nn.Conv2d(256, 16, 3, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    layer = quantize(conv, 8, activation=ActivationScheme(bits=8, scope="sample"))
    y = layer(torch.full((1, 256, 5, 5), 3.0))
    assert torch.allclose(y, torch.full_like(y, 256 * 9 * 3.0), rtol=1e-6)


@pytest.mark.parametrize("kernel_of_the_cpu", [True, False])
@pytest.mark.parametrize("weight_symmetric", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scope", ["sample", "tensor"])
def test_an_input_that_is_not_finite_does_not_pass_for_numbers(
    monkeypatch: pytest.MonkeyPatch,
    scope: str,
    symmetric: bool,
    weight_symmetric: bool,
    kernel_of_the_cpu: bool,
) -> None:
    if not kernel_of_the_cpu:
        monkeypatch.setattr(prepacked_conv, "is_available", lambda columns: False)
    stored = {}
    if scope == "tensor":
        scale, zero = static.grid_of_range(-2.0, 4.0, 8, symmetric)
        stored = {"activation_scale": scale} | ({} if zero is None else {"activation_zero_point": zero})
    activation = ActivationScheme(bits=8, symmetric=symmetric, scope=scope)
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    layer = quantize(conv, 8, symmetric=weight_symmetric, activation=activation, stored=stored)
    x = images(3, 4, 6, 6)
    good = layer(x)
    for dtype, bad in itertools.product((torch.float32, torch.bfloat16), (torch.nan, torch.inf, -torch.inf)):
        x[1, 2, 3, 4] = bad
        y = layer(x.to(dtype))
        if dtype == torch.float32:
            assert torch.equal(y[::2], good[::2])
        assert torch.isfinite(y[::2]).all()
        if scope == "tensor" and bad is not torch.nan:
            assert torch.isfinite(y[1]).all()  # beyond the stored range, where all else takes its end too
            assert sqnr_db(layer.reference_forward(x)[1], y[1]) > 40
        else:
            assert y[1].isnan().all() and layer.reference_forward(x)[1].isnan().all()


@pytest.mark.parametrize("activation", [None, ActivationScheme(bits=8, symmetric=False, scope="sample")])
def test_shapes_are_taken_as_a_stock_convolution_takes_them(activation: ActivationScheme | None) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2)
    layer = quantize(conv, 8, activation=activation)
    x = images(2, 4, 7, 9)
    assert layer(x[:0]).shape == conv(x[:0]).shape
    assert torch.equal(layer(x[0]), layer(x[:1])[0]) and layer(x[0]).shape == conv(x[0]).shape
    for wrong in (
        torch.zeros(2, 5, 7, 9),
        torch.zeros(5, 7, 9),
        torch.zeros(7, 9),
        torch.zeros(1, 2, 4, 7, 9),
    ):
        shape = re.escape(str(list(wrong.shape)))
        with pytest.raises(ValueError, match=rf"shape {shape}; expected \[batch, 4, height, width\]"):
            layer(wrong)
        with pytest.raises(RuntimeError):
            conv(wrong)


def test_windows_that_could_leave_32_bits_are_not_given_to_the_kernel_of_the_cpu() -> None:
    most = 2**31 // (255 * 128)
    assert not prepacked_conv.is_available(most + 1)
    assert prepacked_conv.is_available(2**10) == prepacked_conv._probe()


def test_copies_pickles_and_casts_keep_the_grids() -> None:
    layer = quantize(nn.Conv2d(4, 6, 3), 4, activation=ActivationScheme(bits=8, scope="sample"))
    x = images(1, 4, 6, 6)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    assert layer.bfloat16().scale.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_compiled_it_computes_the_same() -> None:
    layer = quantize(nn.Conv2d(4, 6, 3, padding=1), 8, activation=ActivationScheme(bits=8, scope="sample"))
    x = images(2, 4, 6, 6)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
    assert sqnr_db(layer(x), compiled(x)) > 110
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [1, 300, 10**6])
def test_windows_are_those_of_unfold(shape: tuple, elements: int) -> None:
    channels, outputs, kernel, stride, padding, dilation, height, width = shape
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation)
    x, scheme = images(3, channels, height, width), kernel_of(conv)
    assert scheme is not None
    size = output_size(height, width, scheme)
    assert size == tuple(conv(x).shape[2:])
    expected = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2)
    image = padded(x.permute(0, 2, 3, 1), scheme)
    columns = expected.shape[-1]
    found = torch.full((3, *size, columns), torch.nan)
    for part in parts(3, size, columns, elements):
        rows = windows(image, scheme, part, size[1], channels_first=True)
        assert rows.numel() <= max(elements, size[1] * columns)
        found[part] = rows.view(found[part].shape)
    assert torch.equal(found.view(expected.shape), expected)


def test_a_window_larger_than_the_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 pixels does not fit an image of 2 x 9"):
        output_size(2, 9, KernelScheme(size=(3, 3)))


def test_what_is_no_single_product_has_no_kernel() -> None:
    assert kernel_of(nn.Conv2d(4, 4, 3, groups=2)) is None
    assert kernel_of(nn.Conv2d(4, 4, 3, padding="same")) is None
    assert kernel_of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")) is None
    assert kernel_of(nn.Conv2d(4, 4, 65)) is None


FIELDS = {"shape": (4, 36), "bits": 8, "symmetric": True, "bias": True, "method": "test"}
KERNEL = {"size": (3, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": {"size": (3, 5)}}, "no multiple of the kernel's 15 pixels"),
        ({"kernel": {"size": (3, 0)}}, "greater than or equal to 1"),
        ({"kernel": {"size": (3, 3), "dilation": (1, 10**6)}}, "less than or equal to 64"),
        ({"kernel": KERNEL, "input_scale": True}, "a convolution has no input_scale"),
        ({"kernel": KERNEL, "rotation": {"block": 4}}, "a convolution has no input_scale, rotation"),
        ({"kernel": KERNEL, "low_rank": 2}, "low_rank"),
        ({"kernel": KERNEL, "activation": {"bits": 8}}, "scope token is for linear layers"),
        ({"activation": {"bits": 8, "scope": "sample"}}, "scope sample is for convolutions"),
    ],
)
def test_a_manifest_with_an_impossible_convolution_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizedModule.model_validate({**FIELDS, **changes})


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean(dim=(2, 3)))


def test_round_trip_on_disk(tmp_path) -> None:
    torch.manual_seed(0)
    model = Pair()
    layer = quantize(model.conv, 3, symmetric=False, activation=ActivationScheme(bits=8, scope="sample"))
    model.conv = layer
    x = images(2, 4, 7, 5)
    expected = model(x)
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    with torch.device("meta"):
        fresh = Pair()
    swap_linears(fresh, {"conv": layer.scheme}, torch.float32)
    assert type(fresh.conv) is QuantizedConv2d
    assert quantized_layers(fresh).keys() == {"conv"}
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(fresh(x), expected)


def test_a_linear_layer_has_no_kernel_and_a_convolution_has_its_own() -> None:
    conv = quantize(Pair().conv, 8).scheme
    linear = QuantizedModule(shape=(3, 6), bits=8, symmetric=True, bias=True, method="test")
    model = Pair()
    swap_linears(model, {"head": linear}, torch.float32)
    assert type(model.head) is QuantizedLinear
    other = {"size": (3, 3), "padding": (0, 1)}
    cases = {
        "a Conv2d, not a Linear": {"conv": conv.model_copy(update={"kernel": None})},
        "a Linear, not a Conv2d": {"head": linear.model_copy(update={"kernel": KernelScheme(size=(1, 1))})},
        r"the manifest says \(6, 72\)": {"conv": conv.model_copy(update={"shape": (6, 72)})},
        "the manifest says size": {"conv": conv.model_copy(update={"kernel": KernelScheme(**other)})},
    }
    for message, schemes in cases.items():
        with pytest.raises(SourceError, match=message):
            swap_linears(Pair(), schemes, torch.float32)
