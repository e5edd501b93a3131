"""The card's YAML block: what the Hub sorts, links and searches by."""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from ..recipes.export import ROUNDING_FORMATS
from ..recipes.schema import settings_class
from ..runtime.language_config import is_language_class
from ..runtime.sam_sizes import is_sam_class
from ..runtime.vision_sizes import is_vision_class
from .card_subject import Subject
from .stock import library_of

_NO_FOLDING = 2**16
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
# By class, where the source's own card does not say. The Hub has no task of its own for images from
# a class label; it lists them with those that are made without a prompt.
_TASKS = {
    "DiTTransformer2DModel": "unconditional-image-generation",
    "PixArtTransformer2DModel": "text-to-image",
    "SD3Transformer2DModel": "text-to-image",
    "FluxTransformer2DModel": "text-to-image",
    "HunyuanDiT2DModel": "text-to-image",
    "UNet2DConditionModel": "text-to-image",
}


def metadata(subject: Subject) -> dict[str, Any]:
    """Return the metadata; what is not known is left out."""
    model = subject.model
    values = {
        **_licence(model.get("license"), model.get("license_name")),
        "license_link": model.get("license_link"),
        # Not the library of the original: it cannot open an adapter.
        "library_name": "compress" if subject.is_adapter else library_of(model["class"]),
        "pipeline_tag": model.get("pipeline_tag") or _task(model["class"]),
        "base_model": subject.base_model,
        "base_model_relation": relation(subject) if subject.base_model else None,
        "tags": _tags(subject),
    }
    return {key: value for key, value in values.items() if value is not None}


def _task(class_name: str) -> str | None:
    if is_vision_class(class_name):
        return "image-classification"
    if is_sam_class(class_name):
        return "mask-generation"
    return "text-generation" if is_language_class(class_name) else _TASKS.get(class_name)


def _licence(stated: str | list[str] | None, name: str | None) -> dict[str, Any]:
    """Return `license` and `license_name`; the Hub refuses a card whose licence is no identifier of its own.

    What the source calls its licence in words of its own becomes the name of an `other` one.
    """
    if stated is None:
        return {}
    stated_names = [stated] if isinstance(stated, str) else stated
    identifiers = [item.lower() for item in stated_names]
    if all(_IDENTIFIER.fullmatch(item) for item in identifiers):
        return {"license": identifiers[0] if isinstance(stated, str) else identifiers, "license_name": name}
    return {"license": "other", "license_name": name or ", ".join(stated_names)}


def relation(subject: Subject) -> str:
    """Return how the result comes from its base, in the words of the Hub.

    The Hub knows adapter, finetune, merge and quantized. A model that was only pruned or trained again
    is none of these exactly; `finetune` is nearest (other weights, same task) and what the Hub takes a
    model with a base for that does not say. Rounded weights that are stored as floats are quantized.
    """
    if subject.is_adapter:
        return "adapter"
    for stage in subject.document["stages"]:
        settings = settings_class(stage["method"])
        if settings is not None and settings.phase == "quantize":
            return "quantized"
    return "quantized" if subject.label else "finetune"


def _tags(subject: Subject) -> list[str]:
    tags = ["compress", *(stage["method"].replace("_", "-") for stage in subject.document["stages"])]
    if subject.mixed_label:
        tags.append("mixed-precision")
    elif subject.label:
        tags.append(subject.label.lower())
    if subject.export["format"] not in ("compress", "dequantized"):
        format_ = subject.export["format"]
        tags.append("bitsandbytes" if format_ in ROUNDING_FORMATS else format_)
    return list(dict.fromkeys(tags))


def front_matter(values: dict[str, Any]) -> str:
    """Return the YAML block with its marks; it reads the same in YAML 1.1 and 1.2.

    The Hub's Python library reads 1.1, the Hub itself 1.2: `no` and `1e3` are texts in one of them only,
    so everything but plain words is quoted.
    """
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = _NO_FOLDING
    yaml.dump({key: _quoted(value) for key, value in values.items()}, stream)
    return f"---\n{stream.getvalue()}---"


def _quoted(value: Any) -> Any:
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    is_plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return value if is_plain else DoubleQuotedScalarString(value)
