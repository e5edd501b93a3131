"""A router whose weights are mapped to the experts that are left (EEP, arXiv 2407.00945, equation 5).

    p  = softmax of the logits of all experts that there once were, float32
    p' = mapping @ p
    the `top_k` largest of p' are chosen, and weighed as the stock class weighs what it chose

The mapping comes after the softmax; multiplied into the router's weight it would be another model. Its
entries may be negative, and so a sum by which chosen weights are divided may come near zero, or be
negative. The divisor keeps its sign and is held to at least `LEAST_SHARE` of the sum of the absolute
weights: where no weight is negative that changes nothing, and no token's weights can add up to more than
1 / `LEAST_SHARE`. If all chosen weights are zero they stay zero. The published code divides as it comes.

What stock routers return as logits, and stock models record and take a loss of where they are told to
(`output_router_logits`), is the logarithm of p' here: its softmax is p' again where nothing is negative.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import PlanError
from .mapped_routing import check_mappable
from .moe_classes import MOE_CLASSES

LEAST_SHARE = 2.0**-10
_TINY = torch.finfo(torch.float32).tiny
_NORMALISED = frozenset({"MixtralForCausalLM", "GptOssForCausalLM"})
_IN_FLOAT32 = frozenset({"MixtralForCausalLM", "DeepseekV2ForCausalLM"})


class MappedRouter(nn.Module):
    """Called with [..., width] it returns, per token, logits, weights and indices, as stock routers do.

    Instances are of a class that derives from this one and from the stock router's, by which stock models
    know whose logits to record.

    Attributes:
        weight: [1, router's experts, width]; by its first axis no stock class can take a checkpoint of it for
            one of its own, also where all experts are left.
        bias: [router's experts], or None.
        mapping: [experts, router's experts] float32.
        top_k: experts per token.
        num_experts: among which it chooses.
        normalise: the chosen weights are divided by their sum.
        scale: by which they are multiplied in the end.
    """

    def __init__(
        self, router: nn.Module, weight: Tensor, bias: Tensor | None, mapping: Tensor, name: str
    ) -> None:
        """Take over a stock router's parameters and what it computes with.

        Args:
            router: of the stock class.
            weight, bias: of the new router, [router's experts, width] and [router's experts]; not copied.
            mapping: [experts, router's experts].
            name: of the stock class.
        """
        nn.Module.__init__(self)  # not the stock router's, which makes parameters of its own
        self.class_name = name
        self.weight = _parameter(weight[None])
        self.bias = None if bias is None else _parameter(bias)
        self.mapping = _parameter(mapping)
        self.top_k = int(router.top_k)  # type: ignore[arg-type]
        self.num_experts = mapping.shape[0]
        self.normalise = bool(getattr(router, "norm_topk_prob", name in _NORMALISED))
        self.scale = float(getattr(router, "routed_scaling_factor", 1.0))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logarithms of the mapped weights [tokens, experts], weights and indices [tokens, top_k].

        Args:
            hidden_states: [..., width].
        """
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight = self.weight[0]
        if self.class_name == "DeepseekV2ForCausalLM":  # the stock router multiplies in float32
            states, weight = states.float(), weight.float()
        logits = functional.linear(states, weight, self.bias)
        weights = functional.softmax(logits, dim=-1, dtype=torch.float32)
        weights = functional.linear(weights, self.mapping.float())
        recorded = weights.clamp_min(_TINY).log().to(logits.dtype)
        weights, indices = torch.topk(weights, self.top_k, dim=-1)
        if self.normalise:
            weights = weights / divisor(weights)
        weights = weights * self.scale
        return recorded, weights if self.class_name in _IN_FLOAT32 else weights.to(logits.dtype), indices


def divisor(weights: Tensor) -> Tensor:
    """Return what weights [..., chosen] are divided by so that they add up to 1, [..., 1]; never zero."""
    total = weights.sum(dim=-1, keepdim=True)
    least = (LEAST_SHARE * weights.abs().sum(dim=-1, keepdim=True)).clamp_min(_TINY)
    return torch.where(total.abs() < least, torch.copysign(least, total), total)


def mapped(router: nn.Module, mapping: Tensor, class_name: str, *, active: int | None = None) -> MappedRouter:
    """Return a router that computes with `mapping` what the stock router would, without changing that one.

    Weight and bias are those of the stock router, in the same memory.

    Args:
        router: of the stock class, with a row for every column of `mapping`.
        mapping: [experts that are left, router's experts]; kept in float32, on the router's device.
        class_name: stock class of the model, such as "MixtralForCausalLM".
        active: experts per token; None: as many as the router picks now.

    Raises:
        PlanError: routers of this class cannot be mapped, the mapping does not fit or is not finite, or
            more experts are to be picked than are left.
    """
    check_router(router, class_name)
    weight, bias = router.get_parameter("weight"), getattr(router, "bias", None)
    if mapping.ndim != 2 or mapping.shape[1] != weight.shape[0] or not mapping.shape[0]:
        raise PlanError(
            f"a mapping {list(mapping.shape)} of the router's weights; it needs a column for each of the"
            f" {weight.shape[0]} experts that the router weighs, and a row for every expert that is left"
        )
    if not bool(torch.isfinite(mapping).all()):
        raise PlanError("a mapping of the router's weights that is not finite")
    values = mapping.detach().to(device=weight.device, dtype=torch.float32).clone()
    made = _class_of(router)(router, weight, bias, values, class_name)
    if active is not None:
        made.top_k = active
    if not 1 <= made.top_k <= made.num_experts:
        raise PlanError(f"{made.top_k} experts per token, of {made.num_experts} experts")
    return made.train(router.training)


def put_mapped_routers(module: nn.Module, class_name: str, router_experts: int) -> None:
    """Put empty mapped routers into a stock module, to be filled.

    Args:
        module: of the stock class, with the number of experts that are left.
        class_name: of the stock class.
        router_experts: that the routers weigh.
    """
    attribute = MOE_CLASSES[class_name].router
    for layer in module.get_submodule("model.layers").children():
        block = layer.get_submodule("mlp")
        if not hasattr(block, "experts"):
            continue
        router = block.get_submodule(attribute)
        weight, bias = router.get_parameter("weight"), getattr(router, "bias", None)
        made = _class_of(router)(
            router,
            weight.new_zeros(router_experts, weight.shape[1]),
            None if bias is None else bias.new_zeros(router_experts),
            weight.new_zeros((weight.shape[0], router_experts), dtype=torch.float32),
            class_name,
        )
        setattr(block, attribute, made.train(router.training))


def check_router(router: nn.Module, class_name: str) -> None:
    """Refuse a router that cannot be mapped.

    Raises:
        PlanError: saying why.
    """
    if isinstance(router, MappedRouter):
        raise PlanError("the router is mapped already", hint="start from the model as it was before")
    check_mappable({"_class_name": class_name, "topk_method": getattr(router, "topk_method", "greedy")})


def _class_of(router: nn.Module) -> type[MappedRouter]:
    stock = type(router)
    return type(f"Mapped{stock.__name__}", (MappedRouter, stock), {})


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
