"""What an observer is handed of a layer's input: tokens of a linear layer, windows of a convolution."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..runtime.conv import QuantizedConv2d
from ..runtime.manifest import KernelScheme
from ..runtime.moe_names import expert_linear
from ..runtime.windows import area, kernel_of, output_size, padded, parts, windows

WINDOW_ELEMENTS = 2**22
"""Values of windows that are laid out at a time, or one row of the output: 16 MiB of float32."""

View = tuple[Tensor, Tensor]
"""x [items, positions, channels] and the timesteps of the items, [items]."""


def views(name: str, layer: nn.Module, x: Tensor, timesteps: Tensor) -> Iterator[View]:
    """Yield a layer's input as rows that its weight matrix multiplies.

    A linear layer's come all at once. Those of a convolution are its windows, [items, positions,
    in * height * width] in the order of the stored weight; they come in parts, all of them over one
    call, each once: what is added up or sampled over rows is right, and memory stays bounded. An expert's
    come as if of one item: which tokens of which it meets differs from call to call.

    Args:
        name: of the layer, for errors.
        layer: a linear layer or a convolution, quantized or not.
        x: its input: [..., channels] grouped by item, or [items, channels, height, width].
        timesteps: [items].

    Raises:
        StageError: a convolution that is no matrix product of windows.
    """
    if not isinstance(layer, nn.Conv2d | QuantizedConv2d):
        if expert_linear(name) is not None:  # the tokens that meet an expert, of all items together
            yield x[None], timesteps[:1]
            return
        # Rows are grouped by sample wherever a layer flattens them, so this is exact.
        yield x.reshape(len(timesteps), -1, x.shape[-1]), timesteps
        return
    kernel = layer.window if isinstance(layer, QuantizedConv2d) else kernel_of(layer)
    if kernel is None:
        raise StageError(f"{name}: {layer} is no product of one weight with zero-padded windows")
    yield from _window_views(x.permute(0, 2, 3, 1), timesteps, kernel)


def _window_views(image: Tensor, timesteps: Tensor, kernel: KernelScheme) -> Iterator[View]:
    size = output_size(image.shape[1], image.shape[2], kernel)
    columns = image.shape[3] * area(kernel)
    image = padded(image, kernel)
    for part in parts(len(image), size, columns, WINDOW_ELEMENTS):
        rows = windows(image, kernel, part, size[1], channels_first=True)
        times = timesteps[part[0]]
        yield torch.unflatten(rows, 0, (len(times), -1)), times
