"""The experts of a mixture as linear layers of their own, so that each of them can be quantized.

Stock modules hold the gates and ups of all experts of a layer in one tensor [experts, 2 * inner, width],
and their downs in another, [experts, width, inner]. Here the same matrices are the weights of linears:
`0.gate_proj`, `0.up_proj`, `0.down_proj`, `1.gate_proj`, ... They compute what the stock class computes
where it goes expert by expert: same arguments, same order of the sums.

Names of the weights are those of parts; see `moe_names`. A mixture is split where one of its layers is
quantized, and only there: so the names of quantized layers say which modules are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .linear import QuantizedLinear
from .moe_names import expert_linear

_LAYERS = "model.layers"
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


class Expert(nn.Module):
    """One gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Make linears around matrices, without copying them.

        Args:
            gate, up: [inner, width].
            down: [width, inner].
        """
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)

    def forward(self, x: Tensor, act: nn.Module) -> Tensor:
        """Compute [tokens, width] of [tokens, width]."""
        inner: Tensor = act(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(inner)
        return out


class LinearExperts(nn.Module):
    """All experts of one layer; takes the place of the stock module that holds them.

    Attributes:
        num_experts: how many there are.
        act_fn: of the gates.
    """

    def __init__(self, stock: nn.Module) -> None:
        """Take over the matrices of a stock module, in the same memory.

        Args:
            stock: of which `why_fused` has nothing to say.
        """
        super().__init__()
        gate_up, down = stock.get_parameter(_GATE_UP), stock.get_parameter(_DOWN)
        inner = gate_up.shape[1] // 2
        self.num_experts = gate_up.shape[0]
        for expert in range(self.num_experts):
            halves = gate_up[expert, :inner], gate_up[expert, inner:]
            self.add_module(str(expert), Expert(*halves, down[expert]))
        self.act_fn: nn.Module = stock.act_fn  # type: ignore[assignment]
        self.config: Any = stock.config
        self._stock_class: Any = type(stock)
        self.train(stock.training)

    def experts(self) -> list[Expert]:
        """Return the experts in order."""
        return [child for child in self.children() if isinstance(child, Expert)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token through its experts and add up what they answer.

        Args:
            hidden_states: [tokens, width].
            top_k_index: [tokens, chosen] int64; an index that is the number of experts stands for none.
            top_k_weights: [tokens, chosen].

        Returns:
            [tokens, width] in the dtype of `hidden_states`.
        """
        total = torch.zeros_like(hidden_states)
        chosen = top_k_index.t()
        experts = self.experts()
        for expert in torch.unique(chosen).tolist():
            if expert >= len(experts):
                continue
            place, token = torch.where(chosen == expert)
            answer = experts[expert](hidden_states[token], self.act_fn)
            answer = answer * top_k_weights[token, place, None]
            total.index_add_(0, token, answer.to(total.dtype))
        return total

    def fused(self) -> nn.Module:
        """Return the stock module with these matrices, copied.

        Raises:
            TypeError: a layer is quantized.
        """
        halves = [torch.cat([_weight(e.gate_proj), _weight(e.up_proj)]) for e in self.experts()]
        downs = [_weight(expert.down_proj) for expert in self.experts()]
        with torch.device("meta"):
            stock: nn.Module = self._stock_class(self.config)
        for name, slices in ((_GATE_UP, halves), (_DOWN, downs)):
            stacked = torch.stack(slices)
            stock.register_parameter(name, nn.Parameter(stacked, requires_grad=False))
        stock.num_experts = self.num_experts  # type: ignore[assignment]
        return stock.train(self.training)


def why_fused(experts: nn.Module) -> str | None:
    """Return why the experts of a stock module cannot be linears, as a sentence without an end; or None."""
    if f"{_GATE_UP}_bias" in experts._parameters:
        return "their gates and ups are interleaved in one tensor, transposed, with biases"
    return None


def split_experts(module: nn.Module, listed: Collection[str] | None = None) -> None:
    """Let experts be linears, in place, where they can; those that are stay as they are.

    Args:
        module: of the stock class of a mixture of experts, with or without memory.
        listed: names of linears: only the experts of which one is among them; None: all.
    """
    wanted = None if listed is None else {found[0] for name in listed if (found := expert_linear(name))}
    for name, block in _mixtures(module):
        experts = block.get_submodule("experts")
        split = isinstance(experts, LinearExperts) or why_fused(experts) is not None
        if not split and (wanted is None or f"{name}.experts" in wanted):
            block.experts = LinearExperts(experts)


def fuse_experts(module: nn.Module) -> None:
    """Let experts of which no layer is quantized be what the stock class has, in place."""
    for _, block in _mixtures(module):
        experts = block.get_submodule("experts")
        quantized = any(isinstance(child, QuantizedLinear) for child in experts.modules())
        if isinstance(experts, LinearExperts) and not quantized:
            block.experts = experts.fused()


def _mixtures(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and block of every layer with experts."""
    for index, layer in module.get_submodule(_LAYERS).named_children():
        block = getattr(layer, "mlp", None)
        if isinstance(block, nn.Module) and hasattr(block, "experts"):
            yield f"{_LAYERS}.{index}.mlp", block


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear


def _weight(linear: nn.Module) -> Tensor:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{type(linear).__name__}: quantized experts cannot be fused")
    return linear.weight.detach()
