"""Which routers can have their weights mapped to fewer experts, and what a config says of it. Torch-free.

A router that is mapped still weighs all experts that there once were; a matrix then makes the weights of
the experts that are left out of those. No stock class has it: see `mapped_router` for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PlanError
from .moe_classes import MOE_CLASSES, is_moe_class

MAPPING = "mapping"
"""Name of the matrix in the router; float32 whatever the model's dtype."""
MAPPABLE = (
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM",
    "GptOssForCausalLM", "DeepseekV2ForCausalLM",
)  # fmt: skip
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
