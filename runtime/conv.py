"""The quantized convolution: stored as a matrix of integers, convolved in integers when it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import integer, prepacked_conv
from .linear import QuantizedLinear
from .manifest import QuantizedModule
from .windows import area, output_size, padded, parts, windows

_PART_ELEMENTS = 2**24
"""Integers of windows that lie in memory at a time: 16 MiB, and twice that where int32 sums are added."""


class QuantizedConv2d(QuantizedLinear):
    """A convolution with an integer weight: y = Q(x) * W^ + bias, of one group and padded with zeros.

    W^ is stored as the matrix [out, in * height * width] of the weight [out, in, height, width]; see
    `linear.tensor_shapes`. Q has one scale for all pixels that a window may read: one per item of
    the batch, found while the layer runs, or one that calibration found. A pixel is rounded before
    windows are laid out, and zero stays zero, so the padding is exact.

    Args:
        scheme: how it is stored and executed; `scheme.kernel` is its window.
        dtype: of the bias.
    """

    def __init__(self, scheme: QuantizedModule, dtype: torch.dtype) -> None:
        if scheme.kernel is None:
            raise ValueError("a convolution's scheme has a kernel")
        super().__init__(scheme, dtype)
        self.window = scheme.kernel
        self.kernel_size, self.stride = self.window.size, self.window.stride
        self.padding, self.dilation, self.groups = self.window.padding, self.window.dilation, 1
        self.out_channels = self.out_features
        self.in_channels = self.in_features // area(self.window)

    def _forget(self) -> None:
        super()._forget()
        self._convolution: prepacked_conv.PackedConv | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_convolution": None}

    def kernels(self, matrix: Tensor) -> Tensor:
        """Return a matrix [out, in * height * width] as the weight [out, in, height, width]."""
        return matrix.view(self.out_channels, self.in_channels, *self.kernel_size)

    def _float_conv(self, x: Tensor) -> Tensor:
        """Convolve with a weight that is turned into floats for this call alone."""
        weight = self.kernels(self.dequantized_weight()).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def _quantize(self, x: Tensor, *, unsigned: bool = False) -> integer.Tokens:
        """Quantize x [batch, channels, height, width].

        Returns:
            Levels of the shape of x, channels last in memory; scale, and zero where there is one,
            [batch, 1]. An item that no grid covers, because of a NaN or an infinity, has the scale NaN.
        """
        last = x.is_contiguous(memory_format=torch.channels_last)
        flat = (x.permute(0, 2, 3, 1) if last else x).reshape(x.shape[0], -1)
        items = _marked(self.quantize_rows(flat, unsigned=unsigned))
        if last:
            q = items.q.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        else:
            q = _channels_last(items.q.view(x.shape))
        return items._replace(q=q)

    def reference_forward(self, x: Tensor) -> Tensor:
        """Compute with rounded floats in float32: what `forward` must reproduce.

        Args:
            x: [batch, in, height, width] float.

        Returns:
            float32 [batch, out, height, width].
        """
        x = x.float()
        if self.scheme.activation is not None:
            items = self._quantize(x)
            level = items.q.float()
            if items.zero is not None:
                level = level + items.zero.view(-1, 1, 1, 1)
            x = level * items.scale.view(-1, 1, 1, 1)
        return self._float_conv(x)

    def reference_windows(self, rows: Tensor) -> Tensor:
        """Compute the outputs of single windows with rounded floats.

        Args:
            rows: [rows, in * height * width] float: any windows. They are rounded on one grid together,
                as the pixels of an image are.

        Returns:
            float32 [rows, out].
        """
        if self.scheme.activation is not None:
            rows = integer.dequantized(self.quantize_rows(rows.reshape(1, -1))).view(rows.shape)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rows.float(), self.dequantized_weight(), bias)

    def _lay_out(self) -> integer.IntegerWeight:
        weight = super()._lay_out()
        if weight.scale.shape[0] > 1:
            return weight
        # Windows are laid out faster with the channels last; groups of channels would be torn apart.
        q = weight.q.view(self.out_channels, self.in_channels, -1).transpose(1, 2)
        return weight._replace(q=q.reshape(weight.q.shape).contiguous())

    def _convolvable(self, x: Tensor) -> prepacked_conv.PackedConv | None:
        """Return the weight in oneDNN's layout; None where its convolution cannot take it."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or self.scale.shape[1] > 1:
            return None
        if self._convolution is None and prepacked_conv.is_available(self.in_features):
            weight = super()._lay_out()
            zero = None if weight.zero is None else weight.zero[0]
            self._convolution = prepacked_conv.pack(
                self.kernels(weight.q), weight.scale[0], zero, self.bias, self.window
            )
        return self._convolution

    def _by_windows(self, x: Tensor) -> Tensor:
        """Multiply windows by the weight, some rows of the output at a time: [batch, height, width, out]."""
        weight = self._laid_out()
        groups = weight.scale.shape[0]
        items = self._quantize(x)
        size = output_size(x.shape[2], x.shape[3], self.window)
        y = torch.empty(x.shape[0], *size, self.out_channels, dtype=x.dtype, device=x.device)
        image = self._padded(items)
        for part in parts(x.shape[0], size, self.in_features, _PART_ELEMENTS):
            rows = windows(image, self.window, part, size[1], channels_first=groups > 1)
            each = rows.shape[0] // (part[0].stop - part[0].start)
            tokens = integer.Tokens(
                rows,
                items.scale[part[0]].repeat_interleave(each, dim=0),
                None if items.zero is None else items.zero[part[0]].repeat_interleave(each, dim=0),
                None,
            )
            if weight.zero is not None and groups == 1:
                total = rows.sum(dim=-1, keepdim=True, dtype=torch.int32).float()
                tokens = tokens._replace(total=total)
            y[part] = integer.linear(tokens, weight, self.bias, x.dtype).view(y[part].shape)
        return y

    def _padded(self, items: integer.Tokens) -> Tensor:
        """Return the levels [batch, height, width, channels] with the level of zero around them."""
        image = items.q.permute(0, 2, 3, 1)
        if items.zero is None:
            return padded(image, self.window)
        # Differences to the level of zero would not fit int8, so the border is filled in afterwards.
        around = padded(image, self.window)
        inside = padded(torch.ones_like(image[:1, ..., :1], dtype=torch.bool), self.window)
        return torch.where(inside, around, items.zero.neg().to(torch.int8).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with integer products.

        Args:
            x: [batch, in, height, width] float32, float16 or bfloat16.

        Returns:
            [batch, out, height, width] in x's dtype. Where activations are quantized it is channels
            last in memory, as from a stock convolution whose weight is: the next one is faster then.
            An item with a NaN comes out NaN, and so does one with an infinity that has a grid of its own.

        Raises:
            ValueError: x has another shape.
        """
        x, batched = self._batched(x)
        y = self._convolved(x)
        return y if batched else y[0]

    def _batched(self, x: Tensor) -> tuple[Tensor, bool]:
        """Return x with a batch axis, as a stock convolution takes it without one, and whether it had one."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x of shape {list(x.shape)}; expected [batch, {self.in_channels}, height, width], or that"
                " without batch"
            )
        return (x, True) if x.dim() == 4 else (x[None], False)

    def _convolved(self, x: Tensor) -> Tensor:
        if self.scheme.activation is None:
            return self._float_conv(x)
        if x.shape[0] == 0:
            size = output_size(x.shape[2], x.shape[3], self.window)
            return x.new_empty(0, self.out_channels, *size)
        convolution = self._convolvable(x)
        if convolution is None:
            return self._by_windows(x).permute(0, 3, 1, 2)
        items = self._quantize(x, unsigned=True)
        return prepacked_conv.convolve(items.q, *_grids(items), convolution, x.dtype)

    def extra_repr(self) -> str:
        """Describe the scheme in one line."""
        activation = f"A{self.scheme.activation.bits}" if self.scheme.activation else "A16"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size},"
            f" stride={self.stride}, padding={self.padding}, W{self.scheme.bits}{activation}"
        )


def _marked(items: integer.Tokens) -> integer.Tokens:
    """Give items without a grid the scale NaN, which makes NaN of all outputs, and some zero."""
    usable = items.scale.isfinite()
    zero = None if items.zero is None else torch.where(usable, items.zero, 0)
    return items._replace(scale=torch.where(usable, items.scale, torch.nan), zero=zero)


def _channels_last(q: Tensor) -> Tensor:
    """Return an image [batch, channels, height, width] with its channels last in memory."""
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return q.contiguous(memory_format=torch.channels_last)
    # Matrix by matrix is several times faster where the rows of an image lie a power of two apart.
    batch, channels, height, width = q.shape
    last = torch.empty(batch, height, width, channels, dtype=q.dtype)
    for item, target in zip(q.view(batch, channels, -1), last.view(batch, -1, channels), strict=True):
        target.copy_(item.t())
    return last.permute(0, 3, 1, 2)


def _grids(items: integer.Tokens) -> tuple[list[float], list[int]]:
    """Return scales and levels of zero of levels stored as q + 128: one each where all items share them."""
    scales: list[float] = items.scale.flatten().tolist()
    zeros = [prepacked_conv.OFFSET] * len(scales)
    if items.zero is not None:
        zeros = [prepacked_conv.OFFSET - int(zero) for zero in items.zero.flatten().tolist()]
    if len(set(zip(scales, zeros, strict=True))) == 1:
        return scales[:1], zeros[:1]
    return scales, zeros
