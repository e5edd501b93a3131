"""Tiny random models of Flux and Hunyuan-DiT as component folders, and files with prompts' embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FLUX, HUNYUAN = "FluxTransformer2DModel", "HunyuanDiT2DModel"
PIXELS = 64
"""Side of the images that tiny Flux models draw in tests: 8 by 8 latents, 16 tokens."""
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
TINY: dict[str, dict[str, Any]] = {
    FLUX: {
        **HEADS, "in_channels": 16, "num_layers": 2, "num_single_layers": 4, "joint_attention_dim": 24,
        "pooled_projection_dim": 20, "axes_dims_rope": (4, 4, 8),
    },
    HUNYUAN: {
        **HEADS, "sample_size": 8, "in_channels": 4, "num_layers": 6, "patch_size": 2, "hidden_size": 32,
        "cross_attention_dim": 12, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "text_len": 3,
        "text_len_t5": 4, "mlp_ratio": 4.3637,
    },
}  # fmt: skip


def scheduler_of(class_name: str) -> Any:
    """Return a scheduler as published checkpoints of the class have it."""
    import diffusers

    if class_name == FLUX:
        return diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        )  # fmt: skip
    return diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, steps_offset=1,
    )  # fmt: skip


def save_denoiser(
    class_name: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **config: Any
) -> Path:
    """Save a model with seeded random weights and its scheduler; biases and norms are random too.

    Args:
        class_name: `FLUX` or `HUNYUAN`.
        folder: new.
        seed: of the weights.
        dtype: of the file.
        config: what is otherwise than in `TINY`.
    """
    import diffusers
    import torch

    with torch.random.fork_rng(devices=[]):
        module = getattr(diffusers, class_name)(**{**TINY[class_name], **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            offset = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * drawn)
    module.to(getattr(torch, dtype)).eval().save_pretrained(folder)
    scheduler_of(class_name).save_pretrained(folder / "scheduler")
    return folder


def embeddings_of(class_name: str, prompts: int = 2, seed: int = 5) -> dict[str, Any]:
    """Return what a file of prompts' embeddings holds for a model of `TINY`, negative ones included."""
    import torch

    generator, config = torch.Generator().manual_seed(seed), TINY[class_name]

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    found: dict[str, Any] = {}
    for prefix, count in (("", prompts), ("negative_", 1)):
        if class_name == FLUX:
            found[f"{prefix}prompt_embeds"] = normal(count, 5, config["joint_attention_dim"])
            found[f"{prefix}pooled_prompt_embeds"] = normal(count, config["pooled_projection_dim"])
            continue
        for suffix, text in (("", ""), ("_2", "_t5")):
            length = config[f"text_len{text}"]
            states = normal(count, length, config[f"cross_attention_dim{text}"])
            found[f"{prefix}prompt_embeds{suffix}"] = states
            mask = torch.arange(length) < length - 1
            found[f"{prefix}prompt_attention_mask{suffix}"] = mask.long().repeat(count, 1)
    return found


def save_embeddings(class_name: str, path: Path, prompts: int = 2) -> Path:
    """Write `embeddings_of` to a file."""
    from safetensors.torch import save_file

    save_file(embeddings_of(class_name, prompts), path)
    return path
