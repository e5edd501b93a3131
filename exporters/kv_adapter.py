"""A compressed key-value cache as an adapter: its factors in one file, and whose they are beside it.

No config.json lies there: no code can take the folder for a model. See `runtime.kv.adapter` for what is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import PlanError
from ..models.base import ModelSpec, OpenModel, Source
from ..runtime.fetch import BUILTIN_PREFIX
from ..runtime.kv.adapter import (
    FILE_NAME,
    FORMAT,
    VERSION,
    WEIGHTS_NAME,
    AdapterBase,
    AdapterDocument,
    hashes_of,
    sizes_of,
)
from ..runtime.kv.scheme import KvCacheScheme, factor_tensors
from ..runtime.modules import name_of
from ..runtime.validate import open_folder
from .formats import Layout
from .writer import StoredTensor, dtype_code, file_sha256

METADATA: Mapping[str, str] = {"format": "pt"}
WAYS = ("compress.load(path)",)
NOTES = (
    "an adapter: it holds the factors of the compressed cache and no weights; bytes and size_ratio of its"
    " metrics count the original that it needs beside its own factors",
)


def layout(model: OpenModel) -> Layout:
    """Describe the folder of the adapter; see `formats.Layout`.

    Raises:
        PlanError: the weights are no longer those of the original.
        SourceError: the original is not in its folder any more.
    """
    scheme = _scheme(model)
    state = model.module.state_dict()
    tensors = [StoredTensor.of(name, state[name]) for name in factor_tensors(scheme)]
    document = AdapterDocument(
        format=FORMAT,
        version=VERSION,
        scheme=scheme,
        dtype=name_of(model.spec.dtype),  # type: ignore[arg-type]
        factors_sha256=file_sha256(tensors, metadata=METADATA),
        base=_base(model, scheme),
        history=tuple(model.history),
    )
    return Layout(tensors, None, METADATA, list(WAYS), {FILE_NAME: document.to_json()}, NOTES)


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model."""
    code = dtype_code(spec.dtype)
    shapes = factor_tensors(_scheme(spec))
    return [StoredTensor(name, code, shape) for name, shape in shapes.items()], METADATA


def _scheme(model: ModelSpec | OpenModel) -> KvCacheScheme:
    if model.kv_cache is None:
        raise PlanError("export.kv_cache: adapter: the cache of the model is not compressed")
    if model.quantization or model.surgery or dict(model.config) != dict(_source_config(model)):
        raise PlanError(
            "export.kv_cache: adapter: it goes with the weights of the original, and stages changed them",
            hint="use checkpoint, which holds the changed weights as well",
        )
    return model.kv_cache


def _source_config(model: ModelSpec | OpenModel) -> Mapping[str, object]:
    return model.spec.config if isinstance(model, OpenModel) else model.config


def _base(model: OpenModel, scheme: KvCacheScheme) -> AdapterBase:
    source = model.source
    tensors = open_folder(source.folder).tensors
    return AdapterBase(
        id=source.id,
        revision=source.revision,
        subfolder=_subfolder(source),
        class_name=str(model.config["_class_name"]),
        sizes=sizes_of(model.module.config.to_dict(), tensors),  # type: ignore[operator, union-attr]
        hashes=hashes_of(scheme, tensors),
    )


def _subfolder(source: Source) -> str | None:
    """Return where below what the recipe names the model lies; None: that is the model's own folder."""
    if source.id.startswith(BUILTIN_PREFIX):
        return None
    root = Path(source.id).expanduser()
    if source.revision is not None:  # the folder of a commit in the Hub's cache is named after it
        root = next((path for path in source.folder.parents if path.name == source.revision), source.folder)
    if source.folder == root or not source.folder.is_relative_to(root):
        return None
    return source.folder.relative_to(root).as_posix()


__all__ = ["FILE_NAME", "WEIGHTS_NAME", "layout", "predict"]
