"""From what the user wrote to checked files: config, headers, shapes, finite weights. Torch-free.

A model is a folder, `builtin:NAME`, or a Hub id. Two layouts are understood: a component folder
(config.json beside the weights, perhaps scheduler/) and a pipeline folder (model_index.json with
transformer/ or unet/, and scheduler/ below). Only safetensors are read; pickles can run code and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..runtime.fetch import DENOISERS
from ..runtime.hashes import file_sha256
from ..runtime.headers import PICKLE_SUFFIXES
from ..runtime.kv.adapter import is_adapter
from ..runtime.kv.custom_config import is_custom
from ..runtime.kv.stored import is_factor
from ..runtime.language_config import class_name_of
from ..runtime.moe_classes import is_moe_class
from ..runtime.moe_names import stored_shapes
from ..runtime.sam_sizes import SAM_RELATIVES
from ..runtime.strict_json import parse_object
from ..runtime.transformers_config import implied_copies, named_as_modules
from . import scan
from .headers import TensorHeader, merge_headers
from .hub import fetch_configs, fetch_weights
from .registry import FAMILY_NAMES, stock_class_name
from .shapes import complete_config, expected_shapes
from .source_card import SourceCard, read_source_card

if TYPE_CHECKING:
    from ..recipes.schema import ModelRef

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
CONFIG_NAME = "config.json"
PIPELINE_NAME = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
WEIGHTS_STEMS = ("diffusion_pytorch_model", "model")
MAX_JSON_BYTES = 64 * 2**20
_DENSE = "start from the checkpoint it was made from"
_DENSE_EXPERTS = (
    f"{_DENSE}; rows of quantized experts cannot be mixed. Where there is no other (MXFP4, FP8), load it with"
    " transformers and `dequantize=True` in its quantization config, and save that"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """Files on disk whose names, config and headers have been checked.

    Attributes:
        id: what the user wrote.
        folder: of the component: config.json and the weights.
        pipeline: folder of model_index.json, None for a lone component.
        revision: commit of a Hub snapshot, None for a folder.
        class_name: the stock class that the config is for.
        config: completed with the stock class's defaults.
        files: safetensors files; empty when the folder holds only configs.
        headers: tensor name -> place.
        scheduler: scheduler_config.json, None where there is none.
        card: licence and name of the model, as far as it says them.
    """

    id: str
    folder: Path
    pipeline: Path | None
    revision: str | None
    class_name: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    headers: Mapping[str, TensorHeader]
    scheduler: Path | None
    card: SourceCard

    @property
    def bytes(self) -> int:
        """Tensor bytes as stored."""
        return sum(header.bytes for header in self.headers.values())


def locate(ref: ModelRef, *, weights: bool = True) -> Checkpoint:
    """Find a checkpoint and check everything about it that needs no tensor data.

    Args:
        ref: the recipe's `model`.
        weights: False: a folder without weights will do, and from the Hub only configs are fetched.

    Raises:
        SourceError: missing, damaged, unsafe, or of a kind that is not supported.
        HubError: the Hub or the network refused.
    """
    root, revision = _root(ref)
    folder, pipeline = _component(root, ref.subfolder, ref.id)
    raw = read_json(folder / CONFIG_NAME)
    class_name = _class_name(raw, folder / CONFIG_NAME)
    config = complete_config(class_name, raw, str(folder / CONFIG_NAME))
    if weights and revision is not None:
        fetch_weights(ref.id, revision, folder.relative_to(root).as_posix())
    files = _weight_files(folder, required=weights)
    stored = merge_headers(files)
    _check_index(folder, stored)
    headers = named_as_modules(class_name, stored, str(folder))
    checkpoint = Checkpoint(
        id=ref.id, folder=folder, pipeline=pipeline, revision=revision, class_name=class_name, config=config,
        files=files, headers=headers, scheduler=_scheduler(folder, pipeline),
        card=_card(ref.id, revision, (folder, pipeline, root)),
    )  # fmt: skip
    check_shapes(checkpoint)
    return checkpoint


def preflight(ref: ModelRef, *, advance: Callable[[int], None] | None = None) -> Checkpoint:
    """Do `locate` and then read all weights once, refusing NaN and Inf.

    Args:
        advance: called with the bytes of each tensor that has been read.

    Raises:
        SourceError: naming file and tensor.
        HubError: the Hub or the network refused.
    """
    checkpoint = locate(ref)
    scan_finite(checkpoint, advance)
    return checkpoint


def check_shapes(checkpoint: Checkpoint) -> None:
    """Hold the headers against the shapes that the config implies.

    Raises:
        SourceError: naming the first missing, unexpected or mismatched tensor and how many there are.
    """
    if not checkpoint.headers:
        return
    shapes = expected_shapes(checkpoint.class_name, checkpoint.config)
    expected = stored_shapes(checkpoint.class_name, shapes, checkpoint.headers)
    hint = f"the weights do not belong to {checkpoint.folder / CONFIG_NAME}"
    for name, header in checkpoint.headers.items():
        if name in expected and header.shape != expected[name]:
            raise SourceError(
                f"{header.file}: tensor {name!r} has shape {list(header.shape)}, "
                f"the config implies {list(expected[name])}",
                hint=hint,
            )
    copies = implied_copies(checkpoint.config)
    missing = [name for name in expected if name not in checkpoint.headers and name not in copies]
    if missing:
        raise SourceError(
            f"{checkpoint.folder}: {_some('tensor', missing)} missing from the weights", hint=hint
        )
    unexpected = [name for name in checkpoint.headers if name not in expected]
    factors = [name for name in unexpected if is_factor(name)]
    if factors:
        raise SourceError(
            f"{checkpoint.headers[factors[0]].file}: {factors[0]!r} belongs to a compressed key-value cache:"
            " the checkpoint is already compressed",
            hint=_DENSE,
        )
    if unexpected:
        where = checkpoint.headers[unexpected[0]].file
        raise SourceError(
            f"{where}: {_some('tensor', unexpected)} unknown to {checkpoint.class_name}", hint=hint
        )


def scan_finite(checkpoint: Checkpoint, advance: Callable[[int], None] | None = None) -> None:
    """Read all weights in small chunks and refuse NaN and Inf.

    Raises:
        SourceError: naming file and tensor.
    """
    scan.scan_finite(checkpoint.headers, advance)


def hash_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Return file name -> SHA-256 of every weight file."""
    return {path.name: file_sha256(path) for path in checkpoint.files}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(f"{path}: {path.stat().st_size} bytes; a config has at most {MAX_JSON_BYTES}")
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


def _some(kind: str, names: list[str]) -> str:
    first = f"{kind} {names[0]!r}"
    return f"{first} is" if len(names) == 1 else f"{first} and {len(names) - 1} more are"


def _root(ref: ModelRef) -> tuple[Path, str | None]:
    """Return the folder that `ref.id` names and the Hub commit, if it came from there."""
    if ref.id.startswith(BUILTIN_PREFIX):
        return _builtin(ref.id.removeprefix(BUILTIN_PREFIX)), None
    path = Path(ref.id).expanduser()
    if path.is_dir():
        return path, None
    if path.exists():
        raise SourceError(
            f"{ref.id}: is a file", hint="name the folder that holds config.json and the weights"
        )
    if _HUB_ID.fullmatch(ref.id) is None:
        raise SourceError(
            f"{ref.id}: no such folder",
            hint="a model is a folder, builtin:NAME, or a Hub id such as org/name",
        )
    return fetch_configs(ref.id, ref.revision, ref.subfolder)


def _builtin(name: str) -> Path:
    folder = BUILTIN_FOLDER / name
    if re.fullmatch(r"[a-z0-9_]+", name) is None or not (folder / CONFIG_NAME).is_file():
        configs = BUILTIN_FOLDER.glob(f"*/{CONFIG_NAME}")
        names = sorted(path.parent.name for path in configs if class_name_of(read_json(path)))
        known = ", ".join(BUILTIN_PREFIX + known for known in names) or "none"
        raise SourceError(f"{BUILTIN_PREFIX}{name}: no such built-in model", hint=f"built in: {known}")
    return folder


def _component(root: Path, subfolder: str | None, ref_id: str) -> tuple[Path, Path | None]:
    pipeline = root if (root / PIPELINE_NAME).is_file() else None
    if subfolder is not None:
        folder = root / subfolder
        if not folder.resolve().is_relative_to(root.resolve()):
            raise SourceError(f"{ref_id}: subfolder {subfolder!r} lies outside the model")
    elif (root / CONFIG_NAME).is_file():
        folder = root
    else:
        parts = (root / name for name in DENOISERS)
        folder = next((part for part in parts if (part / CONFIG_NAME).is_file()), root)
    if not (folder / CONFIG_NAME).is_file():
        if is_adapter(folder):
            raise SourceError(f"{folder}: is an adapter of a compressed key-value cache", hint=_DENSE)
        raise SourceError(
            f"{folder}: no {CONFIG_NAME}",
            hint="give a component folder (config.json beside the weights), or a pipeline with"
            f" {' or '.join(f'{name}/' for name in DENOISERS)}",
        )
    if pipeline is None and folder != root.parent and (folder.parent / PIPELINE_NAME).is_file():
        pipeline = folder.parent
    return folder, pipeline


def _class_name(raw: Mapping[str, Any], where: Path) -> str:
    if is_custom(raw):
        raise SourceError(
            f"{where}: the key-value cache of the checkpoint is already compressed", hint=_DENSE
        )
    given = class_name_of(raw)
    class_name = stock_class_name(given, raw)
    if given is not None and given in SAM_RELATIVES:
        raise SourceError(
            f"{where}: {given!r} is not supported: {SAM_RELATIVES[given]}",
            hint="use a checkpoint of SamModel",
        )
    if class_name is None:
        shown = f"{given!r}" if given else "a class that the config does not name"
        raise SourceError(
            f"{where}: {shown} is not supported", hint=f"supported classes: {', '.join(FAMILY_NAMES)}"
        )
    if raw.get("quantization_config") is not None:
        raise SourceError(
            f"{where}: the checkpoint is already quantized",
            hint=_DENSE_EXPERTS if is_moe_class(class_name) else _DENSE,
        )
    return class_name


def _weight_files(folder: Path, *, required: bool) -> tuple[Path, ...]:
    for stem in WEIGHTS_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(index, required=required)
        if (folder / f"{stem}.safetensors").is_file():
            return (folder / f"{stem}.safetensors",)
    found = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise SourceError(
            f"{folder}: several weight files and no index: {names}", hint="keep one, or add its index"
        )
    if found:
        return tuple(found)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise SourceError(
            f"{folder / pickles[0]}: the only weights are pickles, which can run code when they are opened",
            hint="convert them to safetensors where you trust them, for example with save_pretrained",
        )
    if required:
        raise SourceError(
            f"{folder}: no safetensors weights",
            hint=f"expected {' or '.join(f'{stem}.safetensors' for stem in WEIGHTS_STEMS)}",
        )
    return ()


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise SourceError(f"{index}: tensor {name!r}: {file!r} is not the name of a safetensors file")
    return weight_map


def _shards(index: Path, *, required: bool) -> tuple[Path, ...]:
    files = tuple(index.parent / name for name in sorted(set(_weight_map(index).values())))
    absent = [path for path in files if not path.is_file()]
    if absent and not required and len(absent) == len(files):
        return ()  # configs only: the index alone says nothing that the config does not
    if absent:
        raise SourceError(f"{absent[0]}: missing; {index.name} names it", hint="copy or download it")
    return files


def _check_index(folder: Path, headers: Mapping[str, TensorHeader]) -> None:
    """Hold the index against the tensors of the files, under the names that they have there."""
    if not headers:
        return
    for stem in WEIGHTS_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if not index.is_file():
            continue
        for name, file in _weight_map(index).items():
            header = headers.get(name)
            if header is None or header.file.name != file:
                raise SourceError(
                    f"{folder / file}: tensor {name!r} is missing; {index.name} says it is here"
                )
        return


def _scheduler(folder: Path, pipeline: Path | None) -> Path | None:
    for parent in (folder, pipeline):
        path = parent / "scheduler" / SCHEDULER_CONFIG if parent is not None else None
        if path is not None and path.is_file():
            return path
    return None


def _card(identifier: str, revision: str | None, folders: Sequence[Path | None]) -> SourceCard:
    """Read the card nearest to the weights; a commit is known of what came from the Hub alone."""
    places = list(dict.fromkeys(folder for folder in folders if folder is not None))
    return read_source_card(places, None if revision is None else identifier, revision)
