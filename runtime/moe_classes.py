"""Mixture-of-experts language models of transformers: what tells their classes apart. Torch-free.

All of them hold the experts of a layer in fused tensors, one slice per expert, behind a router that picks
a few for every token. They differ in what the config calls the number of experts, where the router is, how
it weighs what it picked, and under which names stock code stores the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Naming = Literal["w123", "projections", "fused"]
"""How a checkpoint names an expert: w1, w2, w3 in a `block_sparse_moe`; gate_proj, up_proj, down_proj; or
not at all, because the fused tensors are stored as they are."""


@dataclass(frozen=True)
class MoeClass:
    """What is peculiar to one stock class.

    Attributes:
        model_type: of its config.
        counts: config keys that may say how many experts there are; stock code writes the first.
        written: config keys that a checkpoint should say it with, for the sake of other readers.
        inner: config key of an expert's inner channels.
        router: name of the router in a feed-forward block.
        naming: names of the experts in a checkpoint.
        defaults: the stock class's, of what decides shapes or routing and may be left out.
    """

    model_type: str
    counts: tuple[str, ...]
    inner: str
    defaults: Mapping[str, Any]
    written: tuple[str, ...] = ()
    router: str = "gate"
    naming: Naming = "projections"


_COMMON: dict[str, Any] = {"tie_word_embeddings": False, "attention_bias": False}
_SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False}
_LATENT: dict[str, Any] = {
    **_COMMON, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}  # fmt: skip

MOE_CLASSES: Mapping[str, MoeClass] = MappingProxyType({
    "MixtralForCausalLM": MoeClass(
        "mixtral", ("num_local_experts", "num_experts"), "intermediate_size",
        {**_COMMON, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072,
         "num_local_experts": 8, "num_experts_per_tok": 2},
        written=("num_local_experts",), naming="w123",
    ),
    "Qwen2MoeForCausalLM": MoeClass(
        "qwen2_moe", ("num_experts",), "moe_intermediate_size",
        {**_COMMON, **_SPARSE, "num_key_value_heads": 16, "max_position_embeddings": 32768,
         "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
         "shared_expert_intermediate_size": 5632, "qkv_bias": True},
        written=("num_experts",),
    ),
    "Qwen3MoeForCausalLM": MoeClass(
        "qwen3_moe", ("num_local_experts", "num_experts"), "moe_intermediate_size",
        {**_COMMON, **_SPARSE, "num_key_value_heads": 4, "max_position_embeddings": 32768,
         "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        written=("num_local_experts", "num_experts"),
    ),
    "OlmoeForCausalLM": MoeClass(
        "olmoe", ("num_experts", "num_local_experts"), "intermediate_size",
        {**_COMMON, "num_key_value_heads": None, "max_position_embeddings": 4096, "num_experts": 64,
         "num_experts_per_tok": 8, "norm_topk_prob": False},
        written=("num_experts",),
    ),
    "PhimoeForCausalLM": MoeClass(
        "phimoe", ("num_local_experts",), "intermediate_size",
        {**_COMMON, "num_key_value_heads": 8, "max_position_embeddings": 131072, "num_local_experts": 16,
         "num_experts_per_tok": 2, "lm_head_bias": False},
        written=("num_local_experts",), router="router", naming="w123",
    ),
    "GptOssForCausalLM": MoeClass(
        "gpt_oss", ("num_local_experts", "num_experts"), "intermediate_size",
        {**_COMMON, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
         "num_local_experts": 128, "num_experts_per_tok": 4, "attention_bias": True},
        written=("num_local_experts",), router="router", naming="fused",
    ),
    "DeepseekV2ForCausalLM": MoeClass(
        "deepseek_v2", ("n_routed_experts", "num_experts"), "moe_intermediate_size",
        {**_LATENT, "max_position_embeddings": 2048, "n_routed_experts": 64, "num_experts_per_tok": None,
         "moe_intermediate_size": 1407, "n_shared_experts": 2, "first_k_dense_replace": 0, "mlp_bias": False,
         "topk_method": "greedy", "n_group": None, "topk_group": None, "num_key_value_heads": None},
        written=("n_routed_experts",),
    ),
    "DeepseekV3ForCausalLM": MoeClass(
        "deepseek_v3", ("n_routed_experts", "num_local_experts"), "moe_intermediate_size",
        {**_LATENT, "max_position_embeddings": 4096, "n_routed_experts": 256, "num_experts_per_tok": 8,
         "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
         "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "num_key_value_heads": 128},
        written=("n_routed_experts",),
    ),
})  # fmt: skip


def is_moe_class(class_name: object) -> bool:
    """Tell whether a stock class is a mixture-of-experts language model that is supported."""
    return isinstance(class_name, str) and class_name in MOE_CLASSES
