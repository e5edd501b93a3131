"""The windows of a convolution: which pixels an output reads, laid out as rows of a matrix.

A convolution is a matrix product of its windows with the weight [out, in * height * width]. The
windows of a whole image are as many times larger than the image as a kernel has pixels, so they are
laid out for a few rows of the output at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .manifest import KernelScheme

Part = tuple[slice, slice]
"""Items of a batch, and rows of their output images."""


def kernel_of(conv: nn.Conv2d) -> KernelScheme | None:
    """Return the window of a convolution.

    Returns:
        None where it is no matrix product of one weight with zero-padded windows: several groups,
        padding by name or with other values, or a window beyond the bounds of a manifest.
    """
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    size, stride, padding, dilation = (
        (int(pair[0]), int(pair[1])) for pair in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    )
    if max(*size, *stride, *padding, *dilation) > 64:
        return None
    return KernelScheme(size=size, stride=stride, padding=padding, dilation=dilation)


def area(kernel: KernelScheme) -> int:
    """Return how many pixels a window reads."""
    return kernel.size[0] * kernel.size[1]


def output_size(height: int, width: int, kernel: KernelScheme) -> tuple[int, int]:
    """Return (height, width) of the output of an image of this size.

    Raises:
        ValueError: the window is larger than the padded image.
    """
    lengths = []
    for axis, length in enumerate((height, width)):
        reach = kernel.dilation[axis] * (kernel.size[axis] - 1) + 1
        left = length + 2 * kernel.padding[axis] - reach
        if left < 0:
            raise ValueError(f"a window of {reach} pixels does not fit an image of {height} x {width}")
        lengths.append(left // kernel.stride[axis] + 1)
    return lengths[0], lengths[1]


def padded(x: Tensor, kernel: KernelScheme) -> Tensor:
    """Return x [batch, height, width, channels] with the kernel's padding of zeros around it."""
    high, wide = kernel.padding
    return F.pad(x, (0, 0, wide, wide, high, high)) if high or wide else x


def parts(batch: int, size: tuple[int, int], columns: int, elements: int) -> Iterator[Part]:
    """Cut the output so that the windows of a part have at most `elements` values, or are one row.

    Args:
        batch: items.
        size: (height, width) of the output.
        columns: values of a window.
        elements: values at a time.
    """
    height, width = size
    rows = max(1, elements // max(1, width * columns))
    items = max(1, rows // height)
    rows = min(rows, height)
    for first in range(0, batch, items):
        for top in range(0, height, rows):
            yield slice(first, min(first + items, batch)), slice(top, min(top + rows, height))


def windows(x: Tensor, kernel: KernelScheme, part: Part, width: int, *, channels_first: bool) -> Tensor:
    """Lay out the windows of a part of the output.

    Args:
        x: [batch, height, width, channels], padded.
        kernel: of the convolution.
        part: which outputs.
        width: of the output.
        channels_first: order of a row's values: (channel, row, column) as in a stored weight, else
            (row, column, channel), which is faster to lay out.

    Returns:
        [items * rows * width, channels * height * width of the kernel], of x's dtype.
    """
    items, rows = part
    count = rows.stop - rows.start
    down, right = kernel.stride
    pixels = []
    for row in range(kernel.size[0]):
        top = rows.start * down + row * kernel.dilation[0]
        lines = slice(top, top + down * (count - 1) + 1, down)
        for column in range(kernel.size[1]):
            left = column * kernel.dilation[1]
            pixels.append(x[items, lines, left : left + right * (width - 1) + 1 : right])
    columns = x.shape[-1] * area(kernel)
    if len(pixels) == 1:
        return pixels[0].reshape(-1, columns)
    return torch.stack(pixels, dim=4 if channels_first else 3).reshape(-1, columns)
