"""Names of experts in a checkpoint, in the module, and between the two. Torch-free.

A stock module has one tensor for the gates and ups of all experts of a layer and one for their downs; most
checkpoints have three tensors per expert, as every reader of such models knows them. Here a stored tensor
of one expert is called alike whatever the class: `...mlp.experts.3.gate_proj.weight`, a part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import SourceError
from .moe_classes import MOE_CLASSES, is_moe_class

Value = TypeVar("Value")
Shape = tuple[int, ...]

_FUSED = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<leaf>gate_up_proj|down_proj)$")
_PART = re.compile(
    r"^(?P<experts>.*\.mlp\.experts)\.(?P<expert>\d{1,6})\.(?P<leaf>gate_proj|up_proj|down_proj)\.weight$"
)
_LINEAR = re.compile(
    r"^(?P<experts>.*\.mlp\.experts)\.(?P<expert>\d{1,6})\.(?P<leaf>gate_proj|up_proj|down_proj)$"
)
_STORED_PART = re.compile(r"^(.*)\.block_sparse_moe\.experts\.(\d{1,6})\.(w[123])\.weight$")
_LEAVES: Mapping[str, str] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SHORT: Mapping[str, str] = {leaf: short for short, leaf in _LEAVES.items()}
_BLOCK = ".block_sparse_moe."
_SKIPPED: Mapping[str, re.Pattern[str]] = {
    # The layer that predicts further tokens, in checkpoints of 61 layers; the stock class skips it.
    "DeepseekV3ForCausalLM": re.compile(r"^model\.layers\.61\."),
}


@dataclass(frozen=True)
class Part:
    """One expert's share of a fused tensor.

    Attributes:
        fused: name of the fused tensor [experts, rows, columns].
        expert: its index.
        half: 0 or 1: the first or the second half of the rows; None: all of them.
    """

    fused: str
    expert: int
    half: int | None

    @property
    def name(self) -> str:
        """What the part is called."""
        leaf = "down_proj" if self.half is None else ("gate_proj", "up_proj")[self.half]
        return f"{self.fused.rpartition('.')[0]}.{self.expert}.{leaf}.weight"

    def shape(self, fused: Shape) -> Shape:
        """Return [rows, columns] of the part, of the shape of the fused tensor."""
        return (fused[1] if self.half is None else fused[1] // 2, fused[2])

    def rows(self, fused: Shape) -> slice:
        """Return the rows of the expert's slice that are the part."""
        rows = self.shape(fused)[0]
        return slice((self.half or 0) * rows, ((self.half or 0) + 1) * rows)


def part_of(name: str) -> Part | None:
    """Return what of which fused tensor a name stands for; None for the name of a whole tensor."""
    match = _PART.match(name)
    if match is None:
        return None
    leaf = match["leaf"]
    fused = "down_proj" if leaf == "down_proj" else "gate_up_proj"
    half = {"gate_proj": 0, "up_proj": 1, "down_proj": None}[leaf]
    return Part(f"{match['experts']}.{fused}", int(match["expert"]), half)


def expert_linear(name: str) -> tuple[str, int, str] | None:
    """Return of which experts, of which of them, and which layer a module's name is; None of any other.

    Such as ("model.layers.0.mlp.experts", 3, "gate_proj"): one of a token's experts, which no token may meet.
    """
    match = _LINEAR.match(name)
    return None if match is None else (match["experts"], int(match["expert"]), match["leaf"])


def parts_of(class_name: object, name: str, shape: Shape) -> dict[str, Part]:
    """Return part -> what it is of the tensor `name`; empty where stock code stores that tensor whole."""
    match = _FUSED.match(name)
    if match is None or not is_moe_class(class_name) or MOE_CLASSES[str(class_name)].naming == "fused":
        return {}
    halves = (None,) if match["leaf"] == "down_proj" else (0, 1)
    parts = (Part(name, expert, half) for expert in range(shape[0]) for half in halves)
    return {part.name: part for part in parts}


def stored_shapes(
    class_name: object, shapes: Mapping[str, Shape], present: Mapping[str, object]
) -> dict[str, Shape]:
    """Return the tensors that a checkpoint must have, of those that its module has.

    Args:
        class_name: of the stock class; of any other class than a mixture of experts: `shapes` itself.
        shapes: of the module's tensors.
        present: what the checkpoint has: a fused tensor that is stored whole is expected whole.
    """
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        parts = {} if name in present else parts_of(class_name, name, shape)
        found.update({part: piece.shape(shape) for part, piece in parts.items()} if parts else {name: shape})
    return found


def by_module_name(class_name: str, tensors: Mapping[str, Value], where: str) -> dict[str, Value]:
    """Return the tensors of a checkpoint under the names of the module, and of parts, in their order.

    Raises:
        SourceError: two stored tensors are one tensor of the module, or parts and the whole are stored.
    """
    named: dict[str, Value] = {}
    for stored, value in tensors.items():
        if class_name in _SKIPPED and _SKIPPED[class_name].match(stored):
            continue
        name = module_name(class_name, stored)
        if name in named:
            raise SourceError(
                f"{where}: tensor {name!r} is stored under two names", hint="fetch the checkpoint again"
            )
        named[name] = value
    for name in named:
        part = part_of(name)
        # One without content is there to stop other readers; see `validate.guard_name`.
        if part is not None and part.fused in named and not _is_empty(named[part.fused]):
            raise SourceError(
                f"{where}: {part.fused!r} is stored as a whole, and expert by expert as well",
                hint="the checkpoint was put together from two; fetch it again",
            )
    return named


def _is_empty(value: object) -> bool:
    """Tell whether a tensor, by whatever stands for it, has no elements."""
    return 0 in getattr(value, "shape", ())


def module_name(class_name: str, stored: str) -> str:
    """Return the name in the module, or of a part, of a tensor of a checkpoint."""
    if MOE_CLASSES[class_name].naming != "w123" or _BLOCK not in stored:
        return stored
    match = _STORED_PART.match(stored)
    if match is not None:
        return f"{match[1]}.mlp.experts.{match[2]}.{_LEAVES[match[3]]}.weight"
    router = MOE_CLASSES[class_name].router
    return stored.replace(_BLOCK, ".mlp.").replace(".mlp.gate.", f".mlp.{router}.")


def stored_name(class_name: str, name: str) -> str:
    """Return the name that stock code gives a tensor of the module, or a part, when it saves it."""
    if MOE_CLASSES[class_name].naming != "w123":
        return name
    part = _PART.match(name)
    if part is not None:
        block = part["experts"].replace(".mlp.", _BLOCK)
        return f"{block}.{part['expert']}.{_SHORT[part['leaf']]}.weight"
    router = MOE_CLASSES[class_name].router
    return name.replace(f".mlp.{router}.", f"{_BLOCK}gate.")
