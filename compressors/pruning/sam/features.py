"""What the layers of a Segment Anything encoder compute inside, of a student and of its teacher.

A distance is added up where the student's feature arises, in the layer, so that no feature of the student
is kept for it. What is in memory during a step, beside weights, gradients and moments:

- from the teacher's pass on: its watched features of all layers, in the type of the arithmetic
  (`Targets`), and its output; they are freed with the step's graph.
- with `recompute`: the student's residual stream before every layer, and what one layer needs on its way
  back, the last one first; the neck's activations. Without: the activations of all layers.
- a distance keeps the student's and the teacher's feature by reference until that layer's way back, in
  float32 (copies where the arithmetic is in another type).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .recomputing import again

Watched = Literal["inside", "stream"]
"""inside: q, k, v and what comes out of the activation of every feed-forward network, which pruning the
embedding leaves comparable; stream: the tokens before the first layer, and after the attention and at the
end of every layer, which pruning the bottleneck leaves comparable."""
Forward = Callable[[Tensor], Tensor]
Targets = Sequence[Sequence[Tensor]]
"""Layer -> the teacher's features, in the order in which the layer computes them."""


def encoder_of(module: nn.Module) -> nn.Module:
    """Return the image encoder of a whole model; an encoder is its own."""
    found = getattr(module, "vision_encoder", module)
    assert isinstance(found, nn.Module)
    return found


def output_of(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Return the embedding [b, channels, s, s] of images [b, 3, S, S], in the type of the arithmetic."""
    weight = next(encoder.parameters())
    found: Tensor = encoder(pixels.to(weight.device, weight.dtype)).last_hidden_state
    return found


@contextmanager
def layers_run_by(encoder: nn.Module, run: Callable[[int, Forward, Tensor], Tensor]) -> Iterator[None]:
    """Let `run(index, forward, hidden)` stand in for the forward of every layer; afterwards all is as before.

    Args:
        encoder: a stock encoder, of any widths.
        run: calls `forward(hidden)`, the layer's own, and returns what that returns.
    """
    layers: list[nn.Module] = list(_layers(encoder))
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = partial(run, index, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


@contextmanager
def watching(layer: nn.Module, watched: Watched) -> Iterator[list[Tensor]]:
    """Yield a list that gets a layer's features in the next forward, in the order of `groups`; no hook stays.

    Of "stream" these are the stream after the attention alone: what goes in and out the caller has.
    """
    found: list[Tensor] = []

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])

    def keep_output(_: nn.Module, __: Any, output: Tensor) -> None:
        found.append(output)

    handles = []
    try:
        if watched == "inside":
            handles.append(layer.get_submodule("attn.qkv").register_forward_hook(keep_output))
            handles.append(layer.get_submodule("mlp.lin2").register_forward_pre_hook(keep_input))
        else:
            handles.append(layer.get_submodule("layer_norm2").register_forward_pre_hook(keep_input))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def groups(layer: nn.Module, index: int, watched: Watched) -> tuple[str, ...]:
    """Return which mean each feature of a layer is part of.

    "inside": q, k, v of the layers with windows, those of the global layers, and the inner channels have a
    mean each; "stream": all features have one.
    """
    if watched == "inside":
        return ("windowed" if getattr(layer, "window_size", 0) else "global", "inner")
    return ("stream",) * (3 if index == 0 else 2)


def _compute(
    layer: nn.Module, index: int, watched: Watched, forward: Forward, hidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return (what a layer puts out, its features)."""
    with watching(layer, watched) as found:
        output = forward(hidden)
    if watched == "stream":
        # The tokens with their positions are what goes into the first layer.
        found = [*([hidden] if index == 0 else []), *found, output]
    return output, found


@torch.no_grad()
def teach(encoder: nn.Module, pixels: Tensor, watched: Watched) -> tuple[Tensor, Targets]:
    """Return a teacher's output [b, channels, s, s] and its features, without gradients.

    Args:
        encoder: frozen, in evaluation mode.
        pixels: [b, 3, S, S].
        watched: of which features.
    """
    layers = list(_layers(encoder))
    targets: list[list[Tensor]] = []

    def run(index: int, forward: Forward, hidden: Tensor) -> Tensor:
        output, found = _compute(layers[index], index, watched, forward, hidden)
        targets.append(found)
        return output

    with layers_run_by(encoder, run):
        return output_of(encoder, pixels), targets


@dataclass
class Squares:
    """Sums of squared differences, group by group.

    Attributes:
        sums: group -> one sum per feature, float32 scalars with their graph.
        counts: group -> how many elements all of them are of.
    """

    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, group: str, total: Tensor, count: int) -> None:
        """Take in one feature."""
        self.sums.setdefault(group, []).append(total)
        self.counts[group] = self.counts.get(group, 0) + count

    def means(self) -> dict[str, Tensor]:
        """Return group -> mean square over the concatenation of its features."""
        return {group: torch.stack(sums).sum() / self.counts[group] for group, sums in self.sums.items()}


def compare(
    encoder: nn.Module, pixels: Tensor, watched: Watched, targets: Targets, *, recompute: bool
) -> tuple[Tensor, Squares]:
    """Return a student's output [b, channels, s, s] and how far its features are from a teacher's.

    Args:
        encoder: takes gradients.
        pixels: [b, 3, S, S], those that the teacher saw.
        watched: of which features.
        targets: see `teach`.
        recompute: compute every layer again on the way back.
    """
    layers, squares = list(_layers(encoder)), Squares()

    def run(index: int, forward: Forward, hidden: Tensor) -> Tensor:
        wanted = targets[index]

        # Distances are a result of what is recomputed, not a side effect: the second time must not count.
        def body(tokens: Tensor) -> tuple[Tensor, Tensor]:
            output, found = _compute(layers[index], index, watched, forward, tokens)
            pairs = zip(found, wanted, strict=True)
            return output, torch.stack([squared_distance(ours, theirs) for ours, theirs in pairs])

        output, sums = again(body, hidden) if recompute else body(hidden)
        names = groups(layers[index], index, watched)
        for name, total, target in zip(names, sums.unbind(), wanted, strict=True):
            squares.add(name, total, target.numel())
        return output

    with layers_run_by(encoder, run):
        return output_of(encoder, pixels), squares


def squared_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the sum of squared differences, float32; only the first takes a gradient."""
    # A step is rehearsed on `meta` for its memory, and there is no autocast there.
    with nullcontext() if ours.is_meta else torch.autocast(ours.device.type, enabled=False):
        return functional.mse_loss(ours.float(), theirs.detach().float(), reduction="sum")


def _layers(encoder: nn.Module) -> Iterator[nn.Module]:
    return encoder.get_submodule("layers").children()
