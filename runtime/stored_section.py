"""What both libraries' quantizers share: config.json's section, and checks of layers and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import SourceError
from .kv.scheme import factor_tensors
from .kv.stored import is_factor
from .manifest import Manifest
from .validate import QUANT_METHOD, expected_tensors, parse_section, quantization_section


class StoredSection:
    """config.json's `quantization_config`, strictly parsed; each library adds its own base class.

    Args:
        section: keys `version`, `dtype`, `modules`, `shared`, `surgery`, `kv_cache`; see
            `validate.quantization_section`.

    Raises:
        SourceError: a key is unknown, or a value out of its bounds.
    """

    def __init__(self, **section: Any) -> None:
        section = {**section, "quant_method": QUANT_METHOD}
        self.manifest: Manifest = parse_section(section, "config.json")
        self.dtype: str = section["dtype"]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value that `from_dict` reads."""
        return quantization_section(self.manifest, self.dtype)

    def __repr__(self) -> str:
        cut = f", {len(self.manifest.surgery)} cut" if self.manifest.surgery else ""
        return f"CompressConfig({len(self.manifest.quantization)} layers{cut}, {self.dtype})"


def refuse_empty(model: nn.Module) -> None:
    """Refuse a model of which a tensor was never loaded.

    Raises:
        SourceError: naming the tensor.
    """
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise SourceError(f"tensor {empty[0]} was not loaded")


def check_cut(manifest: Manifest, state: Mapping[str, Tensor]) -> None:
    """Refuse to write a model of which more was cut since it was loaded.

    Raises:
        SourceError: naming the tensor.
    """
    for module, cut in manifest.surgery.items():
        for parameter, shape in cut.shapes.items():
            tensor = state.get(f"{module}.{parameter}")
            is_quantized = module in manifest.quantization  # whose shapes `check_layers` knows
            if not is_quantized and (tensor is None or tuple(tensor.shape) != tuple(shape)):
                raise SourceError(
                    f"{module}.{parameter} is not what was loaded, so the config does not describe it",
                    hint="export with compress instead of save_pretrained",
                )


def check_kept_factors(manifest: Manifest, state: Mapping[str, Tensor]) -> None:
    """Refuse to write a model whose compressed cache is another than the one that was loaded.

    Raises:
        SourceError: naming the tensor.
    """
    expected = {} if manifest.kv_cache is None else factor_tensors(manifest.kv_cache)
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if is_factor(name)}
    other = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if other:
        raise SourceError(
            f"{other[0]} is not what was loaded, so the config does not describe it",
            hint="export with compress instead of save_pretrained",
        )


def check_layers(manifest: Manifest, dtype: str, state: Mapping[str, Tensor]) -> None:
    """Refuse to write a model whose layers were replaced since it was loaded.

    Args:
        manifest: of what was loaded.
        dtype: of the tensors that are not quantized.
        state: of the model as it is now.

    Raises:
        SourceError: naming the layer.
    """
    listed = manifest.quantization
    found = {name.removesuffix(".qweight") for name in state if name.endswith(".qweight")}
    other = sorted(found ^ listed.keys())
    for module, scheme in listed.items():
        for suffix, (_, shape) in expected_tensors(scheme, dtype).items():
            tensor = state.get(f"{module}.{suffix}")
            if tensor is None or tuple(tensor.shape) != shape:
                other.append(module)
    if other:
        raise SourceError(
            f"layer {other[0]} is not the one that was loaded, so the config does not describe it",
            hint="export with compress instead of save_pretrained",
        )
