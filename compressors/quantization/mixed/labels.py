"""What a mixed stage is called, and planned schemes with what was decided on data."""

from __future__ import annotations

from ....recipes.allocation import FLOAT_BITS
from ....runtime.manifest import QuantizedModule, RotationScheme
from .candidates import Candidates, Settle
from .folding import Transforms
from .problem import Assignment, mean_bits


def settled_by(transforms: Transforms) -> Settle:
    """Return what gives a planned scheme the transforms that its layer got."""

    def settle(name: str, scheme: QuantizedModule) -> QuantizedModule:
        found = transforms.layer(name)
        rotation = RotationScheme(block=found.block) if found.block else None
        return scheme.model_copy(update={"input_scale": found.scale is not None, "rotation": rotation})

    return settle


def stage_label(candidates: Candidates, assignment: Assignment) -> str:
    """Return a label such as `W4.01A8 mixed`: average nominal bits of what was allocated."""
    weights = mean_bits(candidates.layers, assignment.weights)
    used = {
        assignment.activations[name]
        for layer in candidates.layers
        for name in layer.names
        if layer.activations != (FLOAT_BITS,) and assignment.weights[name] != f"w{FLOAT_BITS}"
    }
    inputs = "/".join(str(bits) for bits in sorted(used)) or str(FLOAT_BITS)
    return f"W{weights:.4g}A{inputs} mixed"
