"""Tiny models of all families that can be pruned, opened from what the stock class saved."""

from __future__ import annotations

import torch

DIFFUSION = ("DiTTransformer2DModel", "PixArtTransformer2DModel")


def vision_module(class_name, **changes):
    """Build a stock classifier for 10 classes."""
    import transformers

    common = {"num_labels": 10, "image_size": 32}
    encoder = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    sizes = {
        "ViTForImageClassification": {**encoder, "patch_size": 8},
        "DeiTForImageClassification": {**encoder, "patch_size": 8},
        "DeiTForImageClassificationWithTeacher": {**encoder, "patch_size": 8},
        "ConvNextForImageClassification": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 3, 1]},
        "SwinForImageClassification": {
            "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
        },
    }  # fmt: skip
    model = getattr(transformers, class_name)
    return model(model.config_class(**{**common, **sizes[class_name], **changes}))


def randomise(module, seed=0):
    """Fill every parameter from its own generator, scales of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            scale = 0.1 if parameter.ndim == 1 else fan_in**-0.5
            offset = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * values)
    return module
