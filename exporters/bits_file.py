"""`bits.yaml`: the bits of every quantized layer, for people and for other tools.

One line per layer, in the order of the model. As in the configurations that were published with MixDQ
(arXiv 2405.17873), a layer that is not listed is in floating point; so is an input without bits. It is
written by formats that store each weight in its own bits, for models whose layers differ, and wherever bits
were allocated: then layers in floating point may be the only difference.
"""

from __future__ import annotations

from ..models.base import OpenModel
from ..recipes.allocation import ALLOCATED

FILE_NAME = "bits.yaml"

_HEADER = """\
# Bits of the stored weight and of the input, layer by layer. What is not listed is floating point.
"""


def bits_files(model: OpenModel) -> dict[str, str]:
    """Return the file by its name, as text; nothing where nobody chose and all layers have the same bits."""
    schemes = [
        (site.name, scheme)
        for site in model.linears()
        if (scheme := model.quantization.get(site.name)) is not None
    ]
    allocated = any(scheme.decided_by.startswith(ALLOCATED) for _, scheme in schemes)
    kinds = {(scheme.bits, scheme.activation and scheme.activation.bits) for _, scheme in schemes}
    if not allocated and len(kinds) < 2:
        return {}
    lines = []
    for name, scheme in schemes:
        activation = f", activation: {scheme.activation.bits}" if scheme.activation else ""
        lines.append(f"{name}: {{weight: {scheme.bits}{activation}}}\n")
    return {FILE_NAME: _HEADER + "".join(lines)}
