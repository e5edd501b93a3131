"""A compressed cache without its model: the factors in one file, and `cskv.json`, which says whose they are.

Both files are untrusted input: every number is held against bounds, and the factors against the sizes that
`cskv.json` says, before a tensor is read; the original is held against its recorded hashes before it is
built. Torch-free. CSKV, arXiv 2409.10593.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...errors import SourceError
from ..fetch import BUILTIN_PREFIX, fetch
from ..hashes import file_sha256
from ..headers import DTYPE_CODES, PICKLE_SUFFIXES, TensorEntry, read_header
from ..language_config import class_name_of
from ..manifest import MAX_BYTES, HistoryEntry, Sha256
from ..strict_json import parse_object
from .base_hash import attention_sha256, attention_tensors
from .scheme import KvCacheScheme, ModuleName, factor_tensors

FILE_NAME = "cskv.json"
WEIGHTS_NAME = "cskv.safetensors"
FORMAT: Final = "compress-cskv"
VERSION: Final = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_DAMAGED = "the file was changed by hand or damaged; fetch the adapter again, or export it again"
_OTHER = "name the model that the adapter was made for as `base`"

Text = Annotated[str, Field(min_length=1, max_length=1024)]
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=128)]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AdapterBase(_Strict):
    """The model that an adapter belongs to. No field has a default: see `AdapterDocument`.

    Attributes:
        id: a Hub id, `builtin:NAME`, or a folder as the recipe names it.
        revision: commit on the Hub; None of what is not from there.
        subfolder: of the folder or repository; None: its root.
        class_name: of the stock class.
        sizes: key of its config -> what the positions and heads of keys and values follow from.
        hashes: attention -> SHA-256 of what its factors rest on; see `base_hash`.
    """

    id: Text
    revision: Commit | None
    subfolder: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$", max_length=256)] | None
    class_name: ClassName
    sizes: dict[Text, Any] = Field(max_length=64)
    hashes: dict[ModuleName, Sha256] = Field(min_length=1, max_length=2**12)

    @model_validator(mode="after")
    def _commit_of_a_repository(self) -> AdapterBase:
        if self.revision is not None and _HUB_ID.fullmatch(self.id) is None:
            raise ValueError(f"id {self.id!r} has a revision, and is no repository such as org/name")
        return self


class AdapterDocument(_Strict):
    """`cskv.json`. Every key is required: a file that lacks one is damaged.

    Attributes:
        scheme: how the cache is compressed.
        dtype: of the factors, and of the model that they were made for.
        factors_sha256: of the file of the factors.
        history: the finished stages: settings, seed, versions, what the factors were made from.
    """

    format: Literal["compress-cskv"]
    version: Literal[1]
    scheme: KvCacheScheme
    dtype: Literal["float32", "float16", "bfloat16"]
    factors_sha256: Sha256
    base: AdapterBase
    history: tuple[HistoryEntry, ...] = Field(strict=False, max_length=64)

    @model_validator(mode="after")
    def _one_hash_each(self) -> AdapterDocument:
        if self.base.hashes.keys() != self.scheme.layers.keys():
            raise ValueError("base.hashes and scheme.layers name other attentions")
        return self

    def to_json(self) -> str:
        """Return the file's text: sorted keys, so that equal adapters are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> AdapterDocument:
        """Parse the file's bytes.

        Raises:
            SourceError: naming `where` and the first thing that is wrong.
        """
        document = parse_object(data, where)
        version = document.get("version")
        if isinstance(version, int) and version != VERSION:
            raise SourceError(
                f"{where}: version {version}; this release reads version {VERSION}",
                hint="use the release of compress that wrote the adapter",
            )
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the document"
            raise SourceError(f"{where}: {place}: {first['msg']}", hint=_DAMAGED) from None


@dataclass(frozen=True)
class StoredAdapter:
    """A checked adapter folder.

    Attributes:
        document: what it says.
        tensors: name in the module of the original -> where the factor lies.
    """

    folder: Path
    document: AdapterDocument
    tensors: Mapping[str, TensorEntry]

    @property
    def bytes(self) -> int:
        """Bytes of the factors."""
        return sum(entry.bytes for entry in self.tensors.values())


def is_adapter(folder: str | Path) -> bool:
    """Tell whether a folder holds an adapter: one of its two files, and no model."""
    folder = Path(folder)
    has_one = (folder / FILE_NAME).is_file() or (folder / WEIGHTS_NAME).is_file()
    return has_one and not (folder / "config.json").is_file()


def open_adapter(folder: str | Path) -> StoredAdapter:
    """Read the two files' texts and hold them against each other; no tensor is read.

    That needs `check_contents`.

    Raises:
        SourceError: naming the file, and the first thing that is wrong.
    """
    folder = Path(folder)
    path, weights = folder / FILE_NAME, folder / WEIGHTS_NAME
    if not path.is_file():
        raise SourceError(f"{path} does not exist", hint="fetch the adapter again; it says what it is for")
    if path.stat().st_size > MAX_BYTES:
        raise SourceError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    document = AdapterDocument.parse(path.read_bytes(), str(path))
    if not weights.is_file():
        pickles = sorted(item.name for item in folder.iterdir() if item.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise SourceError(
                f"{folder / pickles[0]}: the factors are pickled, which can run code, and are refused",
                hint=f"an adapter of compress has them in {WEIGHTS_NAME}",
            )
        raise SourceError(f"{weights} does not exist", hint="fetch the adapter again, or export it again")
    tensors, _ = read_header(weights)
    _check_factors(document, tensors, weights)
    return StoredAdapter(folder, document, tensors)


def check_contents(adapter: StoredAdapter) -> None:
    """Refuse factors that are not those that `cskv.json` was written for; reads their whole file.

    Raises:
        SourceError: naming the file.
    """
    weights = adapter.folder / WEIGHTS_NAME
    if file_sha256(weights) != adapter.document.factors_sha256:
        raise SourceError(
            f"{weights}: its bytes are not those of the factors that {FILE_NAME} was written for (SHA-256)",
            hint=_DAMAGED,
        )


def _check_factors(document: AdapterDocument, tensors: Mapping[str, TensorEntry], weights: Path) -> None:
    expected, code = factor_tensors(document.scheme), DTYPE_CODES[document.dtype]
    for name, shape in expected.items():
        entry = tensors.get(name)
        if entry is None:
            raise SourceError(f"{weights}: tensor {name} is missing", hint=_DAMAGED)
        if (entry.dtype, entry.shape) != (code, shape):
            raise SourceError(
                f"{weights}: tensor {name} is {entry.dtype} {list(entry.shape)}; {FILE_NAME} implies"
                f" {code} {list(shape)}",
                hint=_DAMAGED,
            )
    strangers = sorted(tensors.keys() - expected.keys())
    if strangers:
        raise SourceError(f"{weights}: tensor {strangers[0]} is no factor of this adapter", hint=_DAMAGED)


def base_folder(adapter: StoredAdapter, base: str | Path | None = None, *, is_local: bool = True) -> Path:
    """Return the folder of an adapter's model, fetched where it lies on the Hub.

    Args:
        adapter: whose model is wanted.
        base: a folder, `builtin:NAME` or a Hub id, also with `@revision`; None: what the adapter names.
        is_local: the adapter is a folder of this machine. One that was fetched may name no folder: which
            one of this machine is read is not for others to say.

    Raises:
        SourceError: there is no such model here.
        HubError: the Hub or the network refused.
    """
    if base is not None:
        text = str(base)
        if Path(base).is_dir() or text.startswith(BUILTIN_PREFIX):
            return fetch(base)
        repo, _, revision = text.partition("@")
        return fetch(repo, revision=revision or None)
    named = adapter.document.base
    if named.revision is not None:
        return fetch(named.id, revision=named.revision, subfolder=named.subfolder)
    if named.id.startswith(BUILTIN_PREFIX):
        return fetch(named.id)
    if not (is_local and Path(named.id).is_dir()):
        raise SourceError(
            f"{adapter.folder / FILE_NAME}: made for the folder {named.id}, which is not here",
            hint="give the folder, or the Hub id of the same model, as `base`",
        )
    return fetch(named.id, subfolder=named.subfolder)


def sizes_of(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
    """Return what the heads, positions and norms of keys follow from, as JSON values.

    Args:
        config: of the module, as transformers completes it (`module.config.to_dict()`).
        tensors: names of those that the model stores. Where none is of a norm of keys, the term that
            keeps its root from zero concerns other layers alone, and is not among the values.
    """
    has_norm = any(".k_norm." in name for name in tensors)
    keys = (*_SIZES, *_NORM_SIZES) if has_norm else _SIZES
    return {key: config[key] for key in keys if key in config}


_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "partial_rotary_factor", "rope_parameters", "rope_theta", "layer_types", "sliding_window",
    "clip_qkv",
)  # fmt: skip
_NORM_SIZES = ("rms_norm_eps",)


def hashes_of(scheme: KvCacheScheme, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Return attention -> SHA-256 of what its factors rest on, for `AdapterBase.hashes`.

    Raises:
        SourceError: an attention has no such tensors.
    """
    return {attention: attention_sha256(attention, tensors) for attention in scheme.layers}


def check_base(
    adapter: StoredAdapter, name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> None:
    """Refuse a model that an adapter was not made for, before it is built.

    Args:
        adapter: that is to be loaded.
        name: of the model, for messages.
        config: its config.json.
        tensors: that it stores, by the names of its module.

    Raises:
        SourceError: its class is another, or the first attention that differs, and in what.
    """
    base, where = adapter.document.base, adapter.folder / FILE_NAME
    class_name = class_name_of(config)
    if class_name != base.class_name:
        raise SourceError(
            f"{where}: the adapter was made for a {base.class_name}, and {name} is a {class_name}",
            hint=_OTHER,
        )
    for attention, layer in adapter.document.scheme.layers.items():
        _check_attention(where, name, attention, (layer.width, layer.hidden), tensors)
    differ = [
        attention
        for attention, expected in base.hashes.items()
        if attention_sha256(attention, tensors) != expected
    ]
    if differ:
        more = f", nor are those of {len(differ) - 1} more" if len(differ) > 1 else ""
        raise SourceError(
            f"{where}: the projections of keys and values of {differ[0]} in {name} are not those that the"
            f" factors were made for (SHA-256){more}",
            hint=f"the adapter was made for {base.id}{_at(base.revision)}; {_OTHER}",
        )


def _at(revision: str | None) -> str:
    return "" if revision is None else f"@{revision}"


def check_sizes(adapter: StoredAdapter, name: str, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Refuse a model whose heads or positions are others than those the adapter was made for.

    What only one of both says is of another release of transformers, and no difference.

    Args:
        adapter: that is to be loaded.
        name: of the model, for messages.
        config: of the module, as transformers completes it.
        tensors: names of those that the model stores.

    Raises:
        SourceError: naming the key and both values.
    """
    expected, found = adapter.document.base.sizes, json.loads(json.dumps(sizes_of(config, tensors)))
    for key in (key for key in expected if key in found):
        wanted, there = expected[key], found[key]
        if isinstance(wanted, dict) and isinstance(there, dict):
            common = wanted.keys() & there.keys()
            wanted, there = ({item: side[item] for item in sorted(common)} for side in (wanted, there))
        if wanted != there:
            raise SourceError(
                f"{adapter.folder / FILE_NAME}: the adapter was made for {key} {wanted!r}, and {name} has"
                f" {there!r}",
                hint=_OTHER,
            )


def _check_attention(
    where: Path,
    name: str,
    attention: str,
    shape: tuple[int, int],
    tensors: Mapping[str, TensorEntry],
) -> None:
    if not attention_tensors(attention, tensors):
        raise SourceError(
            f"{where}: {name} has no {attention}, which the adapter has factors for", hint=_OTHER
        )
    for part in ("k_proj", "v_proj"):
        entry = tensors.get(f"{attention}.{part}.weight")
        if entry is None:
            raise SourceError(
                f"{where}: {attention}.{part} of {name} is quantized, and the factors approximate the weight"
                " that it had",
                hint="compress the cache and quantize in one recipe; or keep k_proj and v_proj as they were",
            )
        if entry.shape != shape:
            raise SourceError(
                f"{where}: {attention}.{part} of {name} has shape {list(entry.shape)}; the adapter was made"
                f" for {list(shape)}",
                hint=_OTHER,
            )
