"""An exported tiny model, and the function that runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

W4A8 = {"bits": 4, "symmetric": False, "activation": {"bits": 8}}
W8A8 = {"bits": 8, "activation": {"bits": 8}}
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    # Every kind of tensor that the compress format knows, with shared copies among them.
    "mixed": {
        "*.attn1.*": W4A8,
        "*.ff.net.0.*": {**W4A8, "bits": 3, "rotation": {"block": 64}},
        "*.ff.net.2": {**W4A8, "bits": 8, "input_scale": True, "low_rank": 4},
        "*.timestep_embedder.linear_1": {"bits": 6, "group_size": 32},
        "*.norm1.linear": {"bits": 8},
    },
    # What torchao can express.
    "torchao": {
        "*.attn1.to_q": W8A8,
        "*.attn1.to_k": {**W4A8, "bits": 2},
        "*.attn1.*": W4A8,
        "*.ff.net.0.*": {**W8A8, "symmetric": False},
        "*.ff.net.2": {**W8A8, "input_scale": True, "activation": {"bits": 8, "symmetric": False}},
        "*.norm1.linear": {"bits": 8, "input_scale": True},
    },
    "w4a8": {"*.attn1.*": W4A8, "*.ff.*": W4A8},
    "none": {},
}


@pytest.fixture
def schemes() -> dict[str, dict[str, dict[str, Any]]]:
    """Named choices of layers and schemes for `open_quantized`."""
    return SCHEMES


@pytest.fixture
def outputs_of() -> Callable[..., Any]:
    """Return `outputs_of(module, seed=0)` -> the module's output for seeded example inputs."""

    def run(module: Any, seed: int = 0) -> Any:
        import torch
        from compress.models.registry import family_for

        family = family_for(type(module).__name__)
        inputs = family.example_inputs(module, 2, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return module(**inputs, return_dict=False)[0]

    return run
