"""Which routers can have their weights mapped to fewer experts, and what a config says of it. Torch-free.

A router that is mapped still weighs all experts that there once were; a matrix then makes the weights of
the experts that are left out of those. No stock class has it: see `mapped_router` for the arithmetic.

A config says so by `KEY`, and has a `model_type` and a class of its own, so that no stock class takes the
checkpoint for one of its own; the code of that class lies beside the weights. Nothing here runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import PlanError
from .moe_classes import MOE_CLASSES, is_moe_class

KEY = "eep_num_router_experts"
"""Of config.json: how many experts the routers weigh; the usual key says how many are left."""
MAPPING = "mapping"
"""Name of the matrix in the router; float32 whatever the model's dtype."""
MAPPABLE = (
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM",
    "GptOssForCausalLM", "DeepseekV2ForCausalLM",
)  # fmt: skip
STOCK_CLASSES: Mapping[str, str] = MappingProxyType({f"Eep{name}": name for name in MAPPABLE})
"""Class of its own, as `architectures` names it -> the stock class that it derives from."""
_WHY_NOT: Mapping[str, str] = {
    "PhimoeForCausalLM": "its router picks twice, each time by a softmax over what is close to the best, so"
    " that there are no weights of all experts to map",
    "DeepseekV3ForCausalLM": "its router takes a sigmoid of every expert, corrects the choice by a bias and"
    " chooses among groups of experts, none of which is the softmax that is mapped",
}


def mapping_problem(config: Mapping[str, Any]) -> str | None:
    """Return why the routers of a model cannot be mapped, as a sentence without an end; None where they can.

    Args:
        config: completed, with `_class_name`.
    """
    name = config["_class_name"]
    if not is_moe_class(name):
        return f"{name} has no router; those whose router can be mapped: {', '.join(MAPPABLE)}"
    if name in _WHY_NOT:
        return f"{name}: {_WHY_NOT[name]}"
    method = config.get("topk_method", MOE_CLASSES[name].defaults.get("topk_method", "greedy"))
    if method != "greedy":
        return (
            f"{name} with topk_method {method!r}: its router chooses among groups of experts first, and"
            " mapped weights are in none"
        )
    return None


def check_mappable(config: Mapping[str, Any]) -> None:
    """Refuse a model whose routers cannot be mapped.

    Args:
        config: completed, with `_class_name`.

    Raises:
        PlanError: saying why.
    """
    problem = mapping_problem(config)
    if problem:
        raise PlanError(f"router: free: {problem}", hint="leave router at onehot, which every class has")


def is_mapped(config: Mapping[str, Any]) -> bool:
    """Tell whether a config says that routers are mapped."""
    return KEY in config


def custom_class(class_name: str) -> str:
    """Return the class of its own that a stock class has where its routers are mapped."""
    return f"Eep{class_name}"


def model_type_of(class_name: str, config: Mapping[str, Any]) -> str:
    """Return what a config's `model_type` has to be, by its class and whether its routers are mapped."""
    stock = MOE_CLASSES[class_name].model_type
    return f"eep_{stock}" if is_mapped(config) else stock


def with_mapped_routers(config: Mapping[str, Any], router_experts: int) -> dict[str, Any]:
    """Return a config that says that routers weigh so many experts, whatever the number that is left.

    Args:
        config: completed, with `_class_name`.
        router_experts: rows of every router.
    """
    changed = {**config, KEY: router_experts}
    return {**changed, "model_type": model_type_of(config["_class_name"], changed)}
