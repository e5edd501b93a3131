"""Where the error is made: every block is fed the original's own input, so errors do not pile up.

A block's figure is about what it *adds* to the residual stream; the stream itself would hide it. A block
of another shape behind than before (of a U-Net) has no such stream: its figure is about its output.
A linear's figure is the error of its output inside its block (so that of `attention.out` contains
the errors of q, k and v). The value projection is left out, and so is whatever else a channel scale may
be folded into: that changes its output, but not what comes of it. So are experts: the original has no linear
of them, and their tokens may be others; the figure of their block tells of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.base import OpenModel
from ..runtime.moe_names import expert_linear
from .metrics import decibels, powers

STREAMS = ("hidden_states", "encoder_hidden_states", "features", "skip")
"""Arguments of blocks: tokens or pixels, the text beside them, what ConvNeXt calls its pixels, and what an
earlier block of Hunyuan-DiT left for a later one."""
SKIPS = "res_hidden_states_tuple"
"""Argument of a U-Net's blocks on the way up: what the way down has left for them."""
_RESIDUAL = (f"in|{STREAMS[0]}", f"in|{STREAMS[2]}")
ROLES = frozenset(
    {
        *("attention.q", "attention.k", "attention.out", "cross.q", "cross.k", "cross.out"),
        *("ff.in", "ff.gate", "ff.out", "projection", "conv", "conv.shortcut"),
    }
)
_MAX_TOKENS = 64  # rows kept of a linear's output, per item


@dataclass
class Powers:
    """Running sums of signal and noise."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, signal: float, noise: float) -> None:
        """Add the powers of one more tensor."""
        self.signal += signal
        self.noise += noise

    @property
    def sqnr_db(self) -> float:
        """The ratio in dB."""
        return decibels(self.signal, self.noise)


Output = Tensor | tuple[Any, ...]
"""Of a block: the image; (text, image); or, on a U-Net's way down, (image, all images for the way up)."""


def _image_stream(output: Output) -> Tensor:
    """Return a block's image tokens or pixels."""
    image: Tensor = output if isinstance(output, Tensor) else output[-1 if _has_text(output) else 0]
    return image


def _has_text(output: Output) -> bool:
    """Tell whether the text is a stream of its own that the block changes, and not a condition alone."""
    return isinstance(output, tuple) and isinstance(output[-1], Tensor)


def _rows(output: Tensor) -> Tensor:
    """Return at most `_MAX_TOKENS` evenly spaced rows, of tokens or pixels, of a layer's output."""
    if output.ndim < 3:
        return output
    if output.ndim == 4:
        output = output.flatten(2).transpose(1, 2)
    return output[:, :: -(-output.shape[1] // _MAX_TOKENS)]


class _Tap(Protocol):
    """What is done at each watched module."""

    def block_input(self, name: str, arguments: dict[str, Any]) -> None:
        """See, and perhaps replace, the arguments of a block by name."""

    def block_output(self, name: str, output: Output) -> None:
        """See what a block returned."""

    def linear_output(self, name: str, output: Tensor) -> None:
        """See what a linear returned."""


@contextmanager
def _watched(model: OpenModel, tap: _Tap) -> Iterator[None]:
    """Call `tap` at every block and watched linear; all hooks are gone afterwards."""
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name, block in model.family.blocks(model.module):
            handles.append(
                block.register_forward_pre_hook(_block_pre_hook(name, block, tap), with_kwargs=True)
            )
            handles.append(block.register_forward_hook(_output_hook(name, tap.block_output)))
        passed_over = {name for fold in model.family.folds(model.module) for name in fold.producers}
        passed_over |= {site.name for site in model.linears() if expert_linear(site.name)}
        for site in model.linears():
            if site.block is not None and site.role in ROLES and site.name not in passed_over:
                hook = _output_hook(site.name, tap.linear_output)
                handles.append(model.module.get_submodule(site.name).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block_pre_hook(name: str, block: nn.Module, tap: _Tap) -> Callable[..., tuple[Any, Any]]:
    signature = inspect.signature(block.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        bound = signature.bind(*args, **kwargs)
        tap.block_input(name, bound.arguments)
        return bound.args, bound.kwargs

    return hook


def _output_hook(name: str, see: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(name, output)

    return hook


def _file(folder: Path, block: str) -> Path:
    return folder / f"{block}.safetensors"


class _Recorder:
    """Writes what `_Comparer` needs, block by block; memory holds the tensors of one block.

    ``in|STREAM`` and ``out`` [batch, tokens, channels] or images, ``rows|LAYER`` [batch, <= 64, outputs].
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Tensor] = {}

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._found[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def block_input(self, name: str, arguments: dict[str, Any]) -> None:
        for stream in STREAMS:
            if isinstance(arguments.get(stream), Tensor):
                self._keep(f"in|{stream}", arguments[stream])
        for index, skip in enumerate(arguments.get(SKIPS, ())):
            self._keep(f"in|{SKIPS}.{index}", skip)

    def block_output(self, name: str, output: Output) -> None:
        self._keep("out", _image_stream(output))
        if not _has_text(output):
            self._found.pop(f"in|{STREAMS[1]}", None)
        save_file(self._found, _file(self._folder, name))
        self._found = {}

    def linear_output(self, name: str, output: Tensor) -> None:
        self._keep(f"rows|{name}", _rows(output))


class _Comparer:
    """Replaces block inputs by the original's and adds up signal and noise, reading block by block.

    A block is compared with the one that it was in the original. A block whose stream was pruned to another
    width cannot be fed the original's input, and a layer that lost outputs cannot be compared: these get no
    figure.
    """

    def __init__(self, folder: Path, sums: dict[str, Powers], origin: Callable[[str], str]) -> None:
        self._folder = folder
        self._origin = origin
        self._recorded: dict[str, Tensor] = {}
        self._sums = sums
        self._comparable = True

    def block_input(self, name: str, arguments: dict[str, Any]) -> None:
        self._recorded = load_file(_file(self._folder, self._origin(name)))
        inputs = {stream: self._recorded.get(f"in|{stream}") for stream in STREAMS}
        self._comparable = all(
            original is None or original.shape == arguments[stream].shape
            for stream, original in inputs.items()
        )
        for stream, original in inputs.items():
            if original is not None and self._comparable:
                arguments[stream] = original.to(arguments[stream])
        if SKIPS in arguments:
            arguments[SKIPS] = tuple(
                self._recorded[f"in|{SKIPS}.{index}"].to(skip) for index, skip in enumerate(arguments[SKIPS])
            )

    def block_output(self, name: str, output: Output) -> None:
        if not self._comparable:
            return
        found = self._sums.setdefault(name, Powers())
        wanted = self._recorded["out"]
        entered = next(self._recorded[key] for key in _RESIDUAL if key in self._recorded)
        # Item by item: in double precision a whole batch of a large image would be most of the memory.
        for item, before, after in zip(wanted, entered, _image_stream(output).cpu(), strict=True):
            update = item.double() - before.double() if item.shape == before.shape else item.double()
            found.add(float(update.square().sum()), powers(item, after)[1])
        self._recorded = {}

    def linear_output(self, name: str, output: Tensor) -> None:
        before, after = self._recorded[f"rows|{self._origin(name)}"], _rows(output).cpu()
        if self._comparable and before.shape == after.shape:
            self._sums.setdefault(name, Powers()).add(*powers(before, after))


@torch.no_grad()
def record_layers(model: OpenModel, kwargs: Mapping[str, Any], folder: Path) -> None:
    """Run the original once and write what `compare_layers` needs: one file a block.

    Args:
        model: before any stage.
        kwargs: keyword arguments of one denoiser call, on the model's device.
        folder: empty or not there yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _watched(model, _Recorder(folder)):
        model.module(**kwargs)


@torch.no_grad()
def compare_layers(
    model: OpenModel, kwargs: Mapping[str, Any], folder: Path, sums: dict[str, Powers]
) -> None:
    """Run the compressed model on the original's block inputs and add up signal and noise.

    Args:
        model: after the stages; its blocks are those of the original, or some of them.
        kwargs: those that `record_layers` had.
        folder: that `record_layers` filled.
        sums: module name -> powers; added to, in the order of execution.
    """
    with _watched(model, _Comparer(folder, sums, model.original_name)):
        model.module(**kwargs)


def layer_rows(model: OpenModel, sums: Mapping[str, Powers]) -> list[dict[str, Any]]:
    """Return one row per block and watched linear, in forward order: `name, role, block, sqnr_db`.

    Args:
        model: whose layers they are.
        sums: of `compare_layers`.
    """
    roles = {site.name: site for site in model.linears()}
    blocks = {name: index for index, (name, _) in enumerate(model.family.blocks(model.module))}
    rows = []
    for name, value in sums.items():
        site = roles.get(name)
        rows.append(
            {
                "name": name,
                "role": site.role if site else "block",
                "block": site.block if site else blocks[name],
                "sqnr_db": round(value.sqnr_db, 3),
            }
        )
    return rows
