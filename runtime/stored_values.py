"""Hold the few stored numbers that a whole layer depends on against their bounds. Torch-free.

Shapes and dtypes are held against the manifest elsewhere. A scale that is zero, negative or no
number, a zero point beside the grid, or another first token than the recorded one would pass that,
and the layer would compute without complaint.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .headers import TensorEntry
from .manifest import ActivationScheme, QuantizedModule

_LEAST_SCALE = 1e-30  # what this package writes at least; the reciprocal of a smaller one may be infinite
_BFLOAT16_EXPONENT = 0x7F80
_HINT = "the weights were changed or do not belong to this manifest; export again"


def check_values(
    quantization: Mapping[str, QuantizedModule],
    tensors: Mapping[str, TensorEntry],
    shared: Mapping[str, str],
    where: str,
) -> None:
    """Check the scales of weights, the static activation grids and the stored first tokens of all layers.

    Args:
        quantization: layer name -> scheme; shapes and dtypes were checked before.
        tensors: of the checkpoint.
        shared: name of a tensor that is not stored -> name of the stored one.
        where: for errors.

    Raises:
        SourceError: naming the layer and the tensor.
    """

    def read(name: str) -> bytes:
        return _read(tensors[shared.get(name, name)])

    for layer, scheme in quantization.items():
        name = f"{layer}.scale"
        _check_scales(tensors[shared.get(name, name)].dtype, read(name), f"{where}: {name}")
        if scheme.activation is not None and scheme.activation.scope == "tensor":
            (scale,) = struct.unpack("<f", read(f"{layer}.activation_scale"))
            if not (math.isfinite(scale) and scale >= _LEAST_SCALE):
                raise SourceError(
                    f"{where}: {layer}.activation_scale is {scale}; a scale is a positive number, at least"
                    f" {_LEAST_SCALE}",
                    hint=_HINT,
                )
            if not scheme.activation.symmetric:
                (zero,) = struct.unpack("<h", read(f"{layer}.activation_zero_point"))
                _check_zero(zero, scheme.activation, f"{where}: {layer}")
        if scheme.first_token is not None:
            found = sha256(read(f"{layer}.first_token_input")).hexdigest()
            if found != scheme.first_token.sha256:
                raise SourceError(
                    f"{where}: {layer}.first_token_input is not the first token that the manifest records"
                    f" (SHA-256 {found[:12]}..., recorded {scheme.first_token.sha256[:12]}...)",
                    hint=_HINT,
                )
            name = f"{layer}.first_token_output"
            if not _finite(tensors[shared.get(name, name)].dtype, read(name)).all():
                raise SourceError(f"{where}: {name} holds what is no finite number", hint=_HINT)


def _check_scales(dtype: str, data: bytes, where: str) -> None:
    """Check the scales of a weight. Zero is one: a group of weights may be smaller than float16 can say."""
    values = np.frombuffer(data, "<f2" if dtype == "F16" else "<f4")
    wrong = values[~(np.isfinite(values) & (values >= 0))]
    if len(wrong):
        raise SourceError(
            f"{where} holds {wrong[0]} ({len(wrong)} of {len(values)}); a scale is finite and not negative",
            hint=_HINT,
        )


def _finite(dtype: str, data: bytes) -> np.ndarray:
    """Tell which floats are finite."""
    if dtype == "BF16":  # numpy has no such type: the upper half of a float32
        return (np.frombuffer(data, "<u2") & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT
    return np.isfinite(np.frombuffer(data, "<f2" if dtype == "F16" else "<f4"))


def _check_zero(zero: int, activation: ActivationScheme, where: str) -> None:
    top = (1 << (activation.bits - 1)) - 1
    if not -top <= zero <= top + 1:
        raise SourceError(
            f"{where}.activation_zero_point is {zero}; {activation.bits} bits have {-top} to {top + 1}",
            hint=_HINT,
        )


def _read(entry: TensorEntry) -> bytes:
    with Path(entry.file).open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.bytes)
