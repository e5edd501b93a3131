"""Tiny mixtures of experts: a config, a module and a folder of each supported class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.runtime.moe_classes import MOE_CLASSES

CLASSES = sorted(MOE_CLASSES)
_COMMON: Mapping[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_LATENT: Mapping[str, Any] = {
    "intermediate_size": 48, "moe_intermediate_size": 24, "num_key_value_heads": 4, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1,
}  # fmt: skip
_OWN: Mapping[str, Mapping[str, Any]] = {
    "MixtralForCausalLM": {"intermediate_size": 24, "num_local_experts": 6},
    "Qwen2MoeForCausalLM": {
        "intermediate_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "num_experts": 6, "mlp_only_layers": [1],
    },
    "Qwen3MoeForCausalLM": {
        "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 6, "head_dim": 10,
        "norm_topk_prob": True, "decoder_sparse_step": 2, "num_hidden_layers": 4,
    },
    "OlmoeForCausalLM": {"intermediate_size": 24, "num_experts": 6},
    "PhimoeForCausalLM": {
        "intermediate_size": 24, "num_local_experts": 6, "attention_bias": True, "lm_head_bias": True,
    },
    "GptOssForCausalLM": {"intermediate_size": 24, "num_local_experts": 6, "head_dim": 8},
    "DeepseekV2ForCausalLM": {**_LATENT, "n_routed_experts": 6, "n_shared_experts": 2, "q_lora_rank": None},
    "DeepseekV3ForCausalLM": {
        **_LATENT, "n_routed_experts": 8, "n_shared_experts": 1, "q_lora_rank": 12, "n_group": 2,
        "topk_group": 1,
    },
}  # fmt: skip


def moe_config(class_name: str, **changes: Any) -> dict[str, Any]:
    """Return config.json of a model with 3 or 4 layers, 6 or 8 experts of 24 channels, and 2 per token."""
    known = MOE_CLASSES[class_name]
    named = {"architectures": [class_name], "model_type": known.model_type}
    return {**named, **_COMMON, **_OWN[class_name], **changes}


def moe_module(class_name: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a stock module with random weights, biases and corrections, in evaluation mode."""
    import torch
    import transformers

    config = {k: v for k, v in moe_config(class_name, **changes).items() if k != "architectures"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(transformers, class_name)(transformers.AutoConfig.for_model(**config))
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 1 and ("bias" in name or name.endswith("sinks")):
                tensor.normal_(0.0, 0.3)
            elif tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
    return module.eval()


def make_moe(
    folder: Path,
    class_name: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    hub_names: bool = True,
    **changes: Any,
) -> Path:
    """Save such a module with `save_pretrained`, under the names of the Hub or of the module."""
    import torch

    module = moe_module(class_name, seed=seed, **changes).to(getattr(torch, dtype))
    module.save_pretrained(folder, save_original_format=hub_names)
    return folder
