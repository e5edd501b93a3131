"""Language models in the format of another package: what such a folder says, held against itself. Torch-free.

The folder is untrusted: config and headers are held against each other, and both against what `compress`
writes in that format, before a library sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..errors import SourceError
from . import bitsandbytes_section, compressed_tensors_section
from .headers import DTYPE_CODES, TensorEntry
from .kv.stored import is_factor
from .language_config import is_language_class
from .manifest import QuantizedModule
from .moe_names import stored_shapes
from .transformers_config import implied_copies
from .validate import CONFIG_NAME, StoredCheckpoint

SECTIONS: Mapping[str, ModuleType] = {
    compressed_tensors_section.QUANT_METHOD: compressed_tensors_section,
    bitsandbytes_section.QUANT_METHOD: bitsandbytes_section,
}
"""`quant_method` of config.json -> the module that knows its section and its tensors."""
HINT = "the folder was changed by hand or damaged; fetch it again"


def is_known(stored: StoredCheckpoint) -> bool:
    """Tell whether a folder is of a language model in a format of another package that is read here."""
    return stored.quant_method in SECTIONS and is_language_class(stored.class_name)


def export_format(stored: StoredCheckpoint) -> str:
    """Return the format of a folder as recipes name it."""
    if stored.quant_method == bitsandbytes_section.QUANT_METHOD:
        four = stored.config["quantization_config"].get("load_in_4bit") is True
        return "bitsandbytes-nf4" if four else "bitsandbytes-int8"
    return stored.quant_method or "dequantized"


def library_schemes(
    stored: StoredCheckpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, QuantizedModule]:
    """Return the quantized layers of such a folder, held against its headers.

    Args:
        stored: of `validate.open_folder`.
        shapes: of the tensors of the dense model.

    Returns:
        Layer -> scheme, whose `method` is the format's.

    Raises:
        SourceError: config, tensors and model are not what compress writes in this format.
    """
    rules: Any = SECTIONS[str(stored.quant_method)]
    schemes: dict[str, QuantizedModule] = rules.schemes_of(
        stored.config["quantization_config"], shapes, str(stored.folder / CONFIG_NAME)
    )
    expected: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    fixed: dict[str, bytes] = {}
    for name, scheme in schemes.items():
        parts = rules.stored_parts(scheme, stored.dtype)
        expected.update({f"{name}.{part}": value for part, value in parts.items()})
        values = rules.fixed_values(scheme, stored.dtype)
        fixed.update({f"{name}.{part}": value for part, value in values.items()})
    whole = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in schemes}
    whole |= {f"{name}.bias": (scheme.shape[0],) for name, scheme in schemes.items() if scheme.bias}
    for name, shape in stored_shapes(stored.class_name, whole, stored.tensors).items():
        expected[name] = (None, shape)
    _check_names(stored, expected)
    for name, (code, shape) in expected.items():
        if name in stored.tensors:
            _check_entry(name, stored.tensors[name], code, shape)
    for name, content in fixed.items():
        _check_content(name, stored.tensors[name], content)
    return schemes


def _check_names(stored: StoredCheckpoint, expected: Mapping[str, object]) -> None:
    copies = {copy for copy, first in implied_copies(stored.config).items() if first in stored.tensors}
    missing = sorted(expected.keys() - stored.tensors.keys() - copies)
    # Factors of a compressed cache were held against the manifest when the folder was opened.
    others = stored.tensors.keys() - expected.keys()
    unexpected = sorted(name for name in others if not is_factor(name))
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} belongs to no layer"
        raise SourceError(
            f"{stored.folder}: tensor {what} ({len(missing)} missing, {len(unexpected)} unexpected)",
            hint=HINT,
        )


def _check_entry(name: str, entry: TensorEntry, code: str | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape, or of another type where the layer needs that very one."""
    floats = tuple(DTYPE_CODES.values())
    if entry.shape != shape or entry.dtype not in ((code,) if code else floats):
        raise SourceError(
            f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)};"
            f" the config implies {code or 'floating point'} {list(shape)}",
            hint=HINT,
        )


def _check_content(name: str, entry: TensorEntry, content: bytes) -> None:
    """Refuse another content of a tensor that says of a layer what the config says of it, too."""
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        found = file.read(entry.bytes)
    if found != content:
        raise SourceError(
            f"{entry.file}: tensor {name} says of its layer what the config does not", hint=HINT
        )
