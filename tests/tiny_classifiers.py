"""Tiny random image classifiers of transformers, saved by the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_VIT: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 10,
}  # fmt: skip
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", _VIT),
    "DeiTForImageClassification": ("DeiTConfig", _VIT),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", _VIT),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"image_size": 32, "num_channels": 3, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1],
         "num_labels": 10, "layer_scale_init_value": 0.1},
    ),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "num_channels": 3, "embed_dim": 16, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4, "num_labels": 10},
    ),
}  # fmt: skip


def save_classifier(class_name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model whose parameters are all random (the library starts some at 0 or 1)."""
    import torch
    import transformers

    config_name, values = _CONFIGS[class_name]
    config = getattr(transformers, config_name)(**{**values, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(transformers, class_name)(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    module.save_pretrained(folder)
    return folder
