"""Running the end of a model: what a change in block k cannot reach is not computed again.

The model's own forward runs; its first blocks hand out outputs that were kept instead of computing
them. So no model is taken apart or described a second time, and whatever stands before, between and
after the blocks computes as ever. Whether a model allows this is tried out and compared bit by bit, not
assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..runtime.moe_names import expert_linear

Call = Mapping[str, Any]
"""Keyword arguments of one forward, on the model's device."""

Mode = Literal["last", "all", "whole"]
"""What is kept of the blocks that are left out: the last one's output, every one's, or nothing, where the
model cannot be entered at a block and runs as a whole."""

# What a forward raises that was handed something of the wrong shape or kind.
_MISFITS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Kept:
    """The outputs of the first blocks in one call.

    Attributes:
        entry: how many blocks are left out; the next one computes.
        outputs: block -> what it returned.
    """

    entry: int
    outputs: Mapping[int, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory that the outputs take."""
        return sum(tensor.nbytes for value in self.outputs.values() for tensor in _tensors(value))


class SuffixRunner:
    """Runs a model from a block on.

    Args:
        module: in evaluation mode.
        blocks: in the order in which one forward calls them, each once.
        probe: a call on which it is tried out what has to be kept.
        names: of the layers that will be changed; they decide where the model is entered.

    Attributes:
        mode: what is kept.
        entries: layer -> the first block that a change of this layer can reach; the number of blocks
            for a layer that only runs after all of them.

    Raises:
        StageError: a layer does not exist or is never reached.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], probe: Call, names: Sequence[str]
    ) -> None:
        self.module, self.blocks = module, list(blocks)
        self.mode: Mode = "whole"
        self.entries = dict.fromkeys(names, 0)
        reference, ordered = self._trace(probe)
        if ordered and self.blocks:
            self.mode = self._find_mode(probe, reference)
        if self.mode == "whole":
            self.entries = dict.fromkeys(names, 0)

    @torch.no_grad()
    def keep(self, call: Call, entry: int) -> Kept:
        """Run the first `entry` blocks and keep what a run from there on needs."""
        if self.mode == "whole" or entry == 0:
            return Kept(0)
        outputs: dict[int, Any] = {}

        def see(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                outputs[index] = output
                if index == entry - 1:
                    raise _Enough

            return hook

        first = entry - 1 if self.mode == "last" else 0
        with ExitStack() as stack:
            for index in range(first, entry):
                stack.callback(self.blocks[index].register_forward_hook(see(index)).remove)
            try:
                self.module(**call, return_dict=False)
            except _Enough:
                return Kept(entry, outputs)
        raise StageError(f"block {entry - 1} did not run, although it did before")

    @torch.no_grad()
    def run(self, call: Call, kept: Kept) -> Tensor:
        """Run the model as it is now and return its first output; what `kept` holds is not computed.

        Args:
            call: the one that `kept` belongs to.
            kept: of `keep`, made when no block before `kept.entry` computed anything else than now.
        """
        if kept.entry == 0:
            output: Tensor = self.module(**call, return_dict=False)[0]
            return output
        last = kept.outputs[kept.entry - 1]
        with ExitStack() as stack:
            for index in range(kept.entry):
                # NaN for what `_find_mode` has shown to be of no effect: it could not go unnoticed.
                output = kept.outputs[index] if index in kept.outputs else _poison(last)
                stack.enter_context(_answering(self.blocks[index], output))
            entered: Tensor = self.module(**call, return_dict=False)[0]
            return entered

    @torch.no_grad()
    def _trace(self, call: Call) -> tuple[Tensor, bool]:
        """Run once, find the entries, and tell whether the blocks ran in order, each once."""
        started: list[int] = []
        running: list[int] = []
        nested = False
        reached: dict[str, int] = {}

        def before_block(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                nonlocal nested
                nested = nested or bool(running)
                started.append(index)
                running.append(index)

            return hook

        def before_layer(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                reached.setdefault(name, running[0] if running else len(started))

            return hook

        def after_block(*_: Any) -> None:
            running.pop()

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_pre_hook(before_block(index)).remove)
                stack.callback(block.register_forward_hook(after_block).remove)
            for name in self.entries:
                layer = _layer(self.module, name)
                stack.callback(layer.register_forward_pre_hook(before_layer(name)).remove)
            reference: Tensor = self.module(**call, return_dict=False)[0]
        self._enter(reached)
        return reference, not nested and started == list(range(len(self.blocks)))

    def _enter(self, reached: Mapping[str, int]) -> None:
        """Set the entries from the blocks in which layers were reached."""
        tied = _tied(self.module, list(self.entries))
        for name in self.entries:
            if name not in reached and expert_linear(name) is None:
                raise StageError(f"{name}: no recorded call reaches this layer")
            # Of an expert that no token of this call meets, the block is known all the same.
            block = reached[name] if name in reached else self._block_of(name)
            # Somebody else may read the same weight, anywhere.
            self.entries[name] = 0 if name in tied else block

    def _block_of(self, name: str) -> int:
        """Return the index of the block that a layer is inside of."""
        layer = _layer(self.module, name)
        inside = (
            index for index, block in enumerate(self.blocks) if any(m is layer for m in block.modules())
        )
        return next(inside, len(self.blocks))

    def _find_mode(self, call: Call, reference: Tensor) -> Mode:
        """Return the least that has to be kept so that every entry gives the same output, bit by bit."""
        modes: tuple[Mode, ...] = ("last", "all")
        for self.mode in modes:
            if all(self._agrees(call, entry, reference) for entry in sorted(set(self.entries.values()))):
                return self.mode
        return "whole"

    def _agrees(self, call: Call, entry: int, reference: Tensor) -> bool:
        kept = self.keep(call, entry)
        try:
            # Twice: a model that writes into what it was handed answers differently the second time.
            outputs = [self.run(call, kept), self.run(call, kept)]
        except _MISFITS:
            return False
        return all(torch.equal(output, reference) for output in outputs)


class _Enough(Exception):
    """Ends a forward when the last block that was asked for has answered."""


@contextmanager
def _answering(block: nn.Module, output: Any) -> Iterator[None]:
    """Let a block return `output` without computing."""
    own = "forward" in block.__dict__
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        if own:
            block.__dict__["forward"] = before
        else:
            del block.__dict__["forward"]


def _tied(module: nn.Module, names: Sequence[str]) -> set[str]:
    """Return those layers whose weight another module holds as well."""
    owners: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners[parameter.data_ptr()] = owners.get(parameter.data_ptr(), 0) + 1
    pointers = {
        name: [item.data_ptr() for item in _layer(module, name).parameters(recurse=False)] for name in names
    }
    return {name for name, held in pointers.items() if any(owners[pointer] > 1 for pointer in held)}


def _layer(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise StageError(f"{name}: the model has no such layer") from None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _poison(value: Any) -> Any:
    """Return NaN in the shape of an output; it takes no memory."""
    if isinstance(value, Tensor):
        nan = torch.full((), torch.nan, device=value.device)
        return nan.to(value.dtype).expand(value.shape) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _poison(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_poison(item) for item in value)
    return value
