"""What depends on what: the dependency graph of torch-pruning, read off a copy without weights.

torch-pruning finds dependencies by running the model once and walking autograd's graph. It does this here
on a copy whose tensors are on the meta device: no weight is read or changed, no flag, gradient or random
state of the model is touched, and planning can do the same before there are weights.

Of the library only the graph is used. What it would do by itself with it is left alone, for these reasons
(torch-pruning 1.6.1): parameters without gradients vanish from its graph, so the copy has all of them
trained; tensors given as inputs are first unpacked along the batch, so inputs go by name; its pruners share
dictionaries between models, so none is made.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...errors import StageError
from ...models.base import Family

Side = Literal["out", "in"]

_LAST_AXIS = 2**63  # what autograd stores for an axis counted from the end is beyond this


@dataclass(frozen=True)
class Op:
    """One layer, or bare parameter, that loses positions along an axis.

    Attributes:
        module: name of the layer; of a bare parameter, of the module that owns it.
        parameter: "weight", or the name of the bare parameter.
        kind: Linear, Conv, DepthwiseConv, LayerNorm, Embedding or Parameter.
        side: whether positions are outputs of the layer or inputs; what has both at once has outputs.
        axis: of the tensor.
        length: of that axis.
        bias: whether the layer has one, which follows its outputs.
        positions, roots: position along the axis, and the channel of the root that it depends on.
    """

    module: str
    parameter: str
    kind: str
    side: Side
    axis: int
    length: int
    bias: bool
    positions: tuple[int, ...]
    roots: tuple[int, ...]


class Trace:
    """The dependencies of a model.

    Attributes:
        ghost: the copy without weights.
        order: name of a module -> when it was first called.
    """

    def __init__(self, module: nn.Module, family: Family, ignored: Sequence[str] = ()) -> None:
        """Run a copy of the module once.

        Args:
            module: on any device, the meta device included; it is not changed.
            family: gives inputs, and replaces what hides dependencies.
            ignored: names of bare parameters that depend on nothing.

        Raises:
            StageError: the model does not run as it is.
        """
        import torch_pruning

        self.order: dict[str, int] = {}
        # The caller may have switched gradients off; the graph is made of them.
        with torch.inference_mode(False), torch.enable_grad():
            self.ghost = ghost_of(module)
            self._names = {id(child): name for name, child in self.ghost.named_modules()}
            self._parameters = {id(value): name for name, value in self.ghost.named_parameters()}
            inputs = family.example_inputs(self.ghost, 1, torch.Generator().manual_seed(0))
            skipped = [value for name, value in self.ghost.named_parameters() if name in ignored]
            with family.traceable(self.ghost):
                try:
                    self._graph = torch_pruning.DependencyGraph().build_dependency(
                        self.ghost, inputs, forward_fn=self._forward, ignored_params=skipped, verbose=False
                    )
                except RuntimeError as error:
                    raise StageError(
                        f"the model does not run with the shapes that it has: {_first_line(error)}"
                    ) from None
        _map_concatenations(self._graph)

    def reached(self, name: str, side: Side) -> list[Op]:
        """Return all layers and bare parameters that lose positions with the channels of one layer.

        Args:
            name: of a linear or convolution.
            side: whether its outputs or its inputs are the channels.

        Raises:
            StageError: the layer was not run, or a layer depends on it that cannot be cut.
        """
        layer = self.ghost.get_submodule(name)
        if layer not in self._graph.module2node:
            raise StageError(f"{name} takes no part in the model's forward pass, so nothing depends on it")
        pruner = self._graph.get_pruner_of_module(layer)
        out = side == "out"
        count = pruner.get_out_channels(layer) if out else pruner.get_in_channels(layer)
        function = pruner.prune_out_channels if out else pruner.prune_in_channels
        group = self._graph.get_pruning_group(layer, function, list(range(count)))
        # The library keeps the roots in an attribute of the item, not in the tuple.
        items = [group[index] for index in range(len(group))]
        ops = [op for item in items if (op := self._op(item, name)) is not None]
        last = len(self.order)
        return sorted(ops, key=lambda op: (self.order.get(op.module, last), op.side == "in", op.parameter))

    def _forward(self, ghost: nn.Module, inputs: dict[str, Any]) -> Any:
        handles = [
            child.register_forward_pre_hook(lambda _, __, name=name: self._called(name))
            for name, child in ghost.named_modules()
        ]
        try:
            return ghost(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, name: str) -> None:
        self.order.setdefault(name, len(self.order))

    def _op(self, item: Any, root: str) -> Op | None:
        target, positions, roots = item.dep.target.module, tuple(item.idxs), tuple(item.root_idxs)
        if id(target) in self._parameters:
            module, _, leaf = self._parameters[id(target)].rpartition(".")
            axis = int(item.dep.target.pruning_dim)
            return Op(module, leaf, "Parameter", "out", axis, target.shape[axis], False, positions, roots)
        name = self._names.get(id(target))
        if name is None or not list(target.parameters(recurse=False)):
            if isinstance(target, nn.LayerNorm):
                raise StageError(f"{name}: a norm without weights cannot follow the width of {root}")
            return None  # views, sums, activations: nothing to cut
        side: Side = "out" if self._graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        kind, axis = _kind_of(target, name, side)
        bias = side == "out" and getattr(target, "bias", None) is not None
        return Op(name, "weight", kind, side, axis, target.weight.shape[axis], bias, positions, roots)


def ghost_of(module: nn.Module) -> nn.Module:
    """Copy a module with all its tensors on the meta device, in evaluation mode, all parameters trained."""
    tensors: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta", requires_grad=False)
        tensors[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.is_floating_point())
    for buffer in module.buffers():
        tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, tensors).eval()


def _kind_of(layer: nn.Module, name: str, side: Side) -> tuple[str, int]:
    """Return the kind of layer, and the axis of its weight that a side is."""
    if isinstance(layer, nn.Linear):
        return "Linear", 0 if side == "out" else 1
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return "LayerNorm", 0
    if isinstance(layer, nn.Embedding):
        return "Embedding", 1
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return "Conv", 0 if side == "out" else 1
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels:
        return "DepthwiseConv", 0
    raise StageError(f"{name}: nothing is known of how to cut a {type(layer).__name__}")


def _map_concatenations(graph: Any) -> None:
    """Let concatenations along the last axis shift channels.

    torch-pruning takes every concatenation behind a bare parameter of three axes for one of tokens.
    """
    for node in graph.module2node.values():
        if node.type == graph.ops.OPTYPE.CONCAT and getattr(node.grad_fn, "_saved_dim", 0) >= _LAST_AXIS:
            node.enable_index_mapping = True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
