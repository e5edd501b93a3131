"""The code that lies beside the weights of a model that no stock class has: one whose routers are mapped.

It needs transformers and torch alone, and computes what `runtime.mapped_router` computes. Nothing of ours
runs it: `compress.load` builds the model itself, and only who sets `trust_remote_code` runs what lies here.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Template
from typing import Any

from ..runtime.mapped_router import LEAST_SHARE
from ..runtime.mapped_routing import KEY, custom_class
from ..runtime.moe_classes import MOE_CLASSES

CONFIGURATION, MODELING = "configuration_eep", "modeling_eep"
NAMES = (f"{CONFIGURATION}.py", f"{MODELING}.py")
_NORMALISE: Mapping[str, str] = {
    "MixtralForCausalLM": "True", "GptOssForCausalLM": "True", "DeepseekV2ForCausalLM": "False",
}  # fmt: skip
_WEIGHTS: Mapping[str, str] = {
    "MixtralForCausalLM": "weights", "DeepseekV2ForCausalLM": "weights * self.routed_scaling_factor",
}  # fmt: skip
_ROUTERS: Mapping[str, str] = {"DeepseekV2ForCausalLM": "DeepseekV2TopkRouter"}
LICENCE = """\
# Written by compress, which is under the Apache License, Version 2.0; so is this file.
# http://www.apache.org/licenses/LICENSE-2.0
"""
"""Head of every file of code that is written beside weights."""
_CONFIGURATION = Template(
    LICENCE
    + '''"""Config of a mixture of experts behind mapped routers (EEP, arXiv 2407.00945)."""

from transformers import $config


class $own_config($config):
    """As the stock config, with the number of experts that every router weighs."""

    model_type = "$model_type"
    $key: int = 0


__all__ = ["$own_config"]
'''
)
_MODELING = Template(
    LICENCE
    + '''"""Mixture of experts behind mapped routers (EEP, arXiv 2407.00945).

A router weighs all experts that the original model had. A matrix, multiplied to the weights after their
softmax, makes the weights of the experts that are left, of which the largest are chosen.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import $stock
from transformers.models.$kind.modeling_$kind import $stock_router

from .$configuration import $own_config


class MappedRouter($stock_router):
    """Returns, per token, logarithms of the mapped weights, and weights and indices of the chosen experts."""

    def __init__(self, config):
        super().__init__(config)
        weighed = config.$key
        # By its first axis no stock class can take the weight for one of its own.
        self.weight = nn.Parameter(torch.zeros(1, weighed, config.hidden_size))
$bias        mapping = torch.eye(self.num_experts, weighed, dtype=torch.float32)
        self.mapping = nn.Parameter(mapping, requires_grad=False)

    def forward(self, hidden_states):
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = $logits
        weights = functional.softmax(logits, dim=-1, dtype=torch.float32)
        weights = functional.linear(weights, self.mapping.float())
        recorded = weights.clamp_min(torch.finfo(torch.float32).tiny).log().to(logits.dtype)
        weights, indices = torch.topk(weights, self.top_k, dim=-1)
        if $normalise:
            # Entries of the mapping may be negative: the sum is kept away from zero, and keeps its sign.
            total = weights.sum(dim=-1, keepdim=True)
            least = $least * weights.abs().sum(dim=-1, keepdim=True)
            least = least.clamp_min(torch.finfo(torch.float32).tiny)
            weights = weights / torch.where(total.abs() < least, torch.copysign(least, total), total)
        return recorded, $weights, indices


class $own_class($stock):
    """The stock class with such routers."""

    config_class = $own_config
    _keep_in_fp32_modules_strict = ["$router.mapping"]

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.$router = MappedRouter(config)

    # The library looks at the source of a class's module for what the class can do; this is the stock one's.
    @classmethod
    def _can_set_experts_implementation(cls):
        return $stock._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls):
        return $stock._can_set_attn_implementation()


__all__ = ["$own_class"]
'''
)


def config_keys(class_name: str) -> dict[str, Any]:
    """Return what config.json says of the code.

    Args:
        class_name: of the stock class.
    """
    own_config, own_class = _names(class_name)
    return {
        "architectures": [own_class],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.{own_config}",
            "AutoModelForCausalLM": f"{MODELING}.{own_class}",
        },
    }


def code_files(class_name: str) -> dict[str, str]:
    """Return file name -> text.

    Args:
        class_name: of the stock class.
    """
    known = MOE_CLASSES[class_name]
    own_config, own_class = _names(class_name)
    in_float32 = class_name == "DeepseekV2ForCausalLM"
    has_bias = class_name == "GptOssForCausalLM"
    linear = "functional.linear(states.float(), self.weight[0].float())" if in_float32 else (
        f"functional.linear(states, self.weight[0]{', self.bias' if has_bias else ''})"
    )  # fmt: skip
    words = {
        "stock": class_name,
        "stock_router": _ROUTERS.get(class_name, class_name.replace("ForCausalLM", "TopKRouter")),
        "kind": known.model_type,
        "config": class_name.replace("ForCausalLM", "Config"),
        "own_class": own_class,
        "own_config": own_config,
        "model_type": f"eep_{known.model_type}",
        "configuration": CONFIGURATION,
        "key": KEY,
        "router": known.router,
        "bias": "        self.bias = nn.Parameter(torch.zeros(weighed))\n" if has_bias else "",
        "normalise": _NORMALISE.get(class_name, "self.norm_topk_prob"),
        "logits": linear,
        "least": repr(LEAST_SHARE),
        "weights": _WEIGHTS.get(class_name, "weights.to(logits.dtype)"),
    }
    return {
        f"{CONFIGURATION}.py": _CONFIGURATION.substitute(words),
        f"{MODELING}.py": _MODELING.substitute(words),
    }


def _names(class_name: str) -> tuple[str, str]:
    own = custom_class(class_name)
    return own.replace("ForCausalLM", "Config"), own
