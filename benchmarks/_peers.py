"""Other libraries' quantization of the same module, each optional: a missing one is told, not hidden.

Every function changes and returns the module that it is given; what it cannot do it raises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _common import attempt, say, version
from torch import Tensor, nn

Forward = Callable[[nn.Module], Tensor]
Chosen = Callable[[str], bool]


@dataclass(frozen=True)
class Peer:
    """Another library's way to quantize.

    Attributes:
        label: row of the table.
        library: its distribution name.
        quantize: called with (module, names, forward): the linears to change, and what runs the module
            once, for static scales.
        compiles_itself: whether it calls torch.compile on its own.
    """

    label: str
    library: str
    quantize: Callable[[nn.Module, list[str], Forward], nn.Module]
    compiles_itself: bool = False


def _torchao_w8a8(module: nn.Module, names: list[str], forward: Forward) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    chosen = set(names)
    quantize_(module, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)
    return module


def _quanto(weights: str, activations: str | None) -> Callable[[nn.Module, list[str], Forward], nn.Module]:
    def quantize(module: nn.Module, names: list[str], forward: Forward) -> nn.Module:
        from optimum import quanto

        kinds: dict[str, Any] = {"weights": getattr(quanto, weights)}
        if activations:
            kinds["activations"] = getattr(quanto, activations)
        quanto.quantize(module, include=names, **kinds)
        if activations:
            with quanto.Calibration(streamline=False):
                forward(module)
        quanto.freeze(module)
        return module

    return quantize


def _sdnq(weights_dtype: str) -> Callable[[nn.Module, list[str], Forward], nn.Module]:
    def quantize(module: nn.Module, names: list[str], forward: Forward) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        # It matches names of parameters, not of modules.
        others = [name for name, _ in module.named_parameters() if name.removesuffix(".weight") not in names]
        result = sdnq_post_load_quant(
            module,
            weights_dtype=weights_dtype,
            use_quantized_matmul=True,
            group_size=-1,
            torch_dtype=next(module.parameters()).dtype,
            modules_to_not_convert=others,
        )
        if not isinstance(result, nn.Module):
            raise TypeError(f"sdnq returned {type(result).__name__}")
        return result

    return quantize


PEERS = (
    Peer("torchao W8A8", "torchao", _torchao_w8a8),
    Peer("quanto W8 weight-only", "optimum-quanto", _quanto("qint8", None)),
    Peer("quanto W8A8 static", "optimum-quanto", _quanto("qint8", "qint8")),
    Peer("sdnq int8 W8A8", "sdnq", _sdnq("int8"), compiles_itself=True),
    Peer("sdnq int4 W4A8", "sdnq", _sdnq("int4"), compiles_itself=True),
)


def prepare(peer: Peer, module: nn.Module, forward: Forward, chosen: Chosen) -> nn.Module | None:
    """Return a copy of `module` with the linears that `chosen` names quantized.

    None, with a printed line that says why, where that is not possible.
    """
    if version(peer.library) == "not installed":
        say(f"{peer.label}: {peer.library} is not installed (make bench-peers)")
        return None
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and chosen(name)]

    def quantize() -> nn.Module:
        with torch.no_grad():
            result = peer.quantize(copy.deepcopy(module), names, forward).eval()
            forward(result)
        return result

    return attempt(peer.label, quantize)
