"""Hold a checkpoint folder against its own words before anything is allocated. Torch-free.

Everything in a folder is untrusted: the config, the manifest, the index and the headers of the
tensor files. Here their numbers are compared with each other and with the sizes of the files, so
that whoever builds the model afterwards can neither be made to allocate more than the files hold
nor be given a layer whose tensors do not fit its scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .config import check_config
from .headers import DTYPE_CODES, ITEM_BYTES, TensorEntry, read_header
from .kv.custom_config import check_same, is_custom, stock_config
from .kv.stored import check_factors
from .language_config import class_name_of, is_language_class
from .manifest import FILE_NAME, MAX_BYTES, VERSION, Manifest, QuantizedModule
from .mapped_routing import is_mapped
from .moe_names import expert_linear, part_of
from .stopping import check_stops
from .stored_values import check_values
from .strict_json import parse_object
from .transformers_config import check_transformers_config, is_transformers_class, named_as_modules

__all__ = ["ITEM_BYTES", "TensorEntry", "read_header"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LANGUAGE_WEIGHTS_NAME = "model.safetensors"
INDEX_SUFFIX = ".index.json"
QUANT_METHOD = "compress"
_BLOCK = re.compile(r"(?:(?:model|vit|deit)\.layers|transformer_blocks)\.(\d+)\.")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A validated folder: what it says and where its tensors lie.

    Attributes:
        quant_method: of config.json: "compress", another library's, or None for a dense checkpoint.
        manifest: of compress.json, or made from config.json where only that is present.
        metadata: free text of the tensor files.
        own_code: transformers loads it by code that lies beside the weights; `config` is the stock class's.
    """

    folder: Path
    config: dict[str, Any]
    quant_method: str | None
    manifest: Manifest
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)
    own_code: bool = False

    @property
    def class_name(self) -> str:
        """Name of the stock class that config.json asks for."""
        return str(class_name_of(self.config))

    @property
    def dtype(self) -> str:
        """Floating-point type of the tensors that are not quantized: "float32", "bfloat16", ..."""
        section = self.config.get("quantization_config")
        if self.quant_method == QUANT_METHOD and isinstance(section, dict):
            return str(section["dtype"])
        if self.quant_method == "bitsandbytes" and self.config.get("dtype") in list(DTYPE_CODES):
            return str(self.config["dtype"])  # its scales are float32 in every model
        sizes: dict[str, int] = {}
        for entry in self.tensors.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.bytes
        floats = {name: sizes[code] for name, code in DTYPE_CODES.items() if code in sizes}
        return max(floats, key=lambda name: floats[name]) if floats else "float32"


def read_json(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes.

    Raises:
        SourceError: absent, too long, or not an object.
    """
    if not path.is_file():
        raise SourceError(
            f"{path} does not exist", hint="give the folder that holds config.json and the weights"
        )
    if path.stat().st_size > limit:
        raise SourceError(f"{path}: {path.stat().st_size} bytes; at most {limit} are read")
    return parse_object(path.read_bytes(), str(path))


def index_file(folder: Path) -> Path | None:
    """Return the index of a folder's weight files, None where it has none."""
    for name in (WEIGHTS_NAME, LANGUAGE_WEIGHTS_NAME):
        if (folder / f"{name}{INDEX_SUFFIX}").is_file():
            return folder / f"{name}{INDEX_SUFFIX}"
    return None


def weight_files(folder: Path) -> list[Path]:
    """Return the tensor files of a folder, following its index where it has one.

    Raises:
        SourceError: none, or an index that names something else than a file beside it.
    """
    index = index_file(folder)
    if index is not None:
        mapping = read_json(index).get("weight_map")
        names = sorted({str(name) for name in mapping.values()}) if isinstance(mapping, dict) else []
        for name in names:
            if not _FILE.fullmatch(name) or ".." in name:
                raise SourceError(f"{index}: {name!r} is not the name of a file in this folder")
        if not names:
            raise SourceError(f"{index}: names no files")
        return [folder / name for name in names]
    for name in (WEIGHTS_NAME, LANGUAGE_WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name]
    others = sorted(path.name for path in folder.glob("*.bin")) or sorted(
        path.name for path in folder.glob("*.pt")
    )
    if others:
        raise SourceError(
            f"{folder} holds only pickled weights ({others[0]}), which can run code and are refused",
            hint="convert the checkpoint to safetensors",
        )
    raise SourceError(
        f"{folder} holds neither {WEIGHTS_NAME} nor {LANGUAGE_WEIGHTS_NAME}",
        hint="give the folder of the model itself; of a pipeline, that of the denoiser",
    )


def read_headers(folder: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the headers of all tensor files of a folder.

    Raises:
        SourceError: damaged, or a tensor that is stored twice.
    """
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for path in weight_files(folder):
        entries, extra = read_header(path)
        twice = tensors.keys() & entries.keys()
        if twice:
            raise SourceError(f"{path}: tensor {min(twice)} is stored in two files")
        tensors.update(entries)
        metadata.update(extra)
    return tensors, metadata


def expected_tensors(scheme: QuantizedModule, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of a quantized layer.

    Args:
        dtype: "float32", "float16" or "bfloat16": of the bias and the low-rank branch.

    Returns:
        name in the layer -> (safetensors dtype code, shape).
    """
    rows, columns = scheme.shape
    groups = columns // scheme.group_size if scheme.group_size else 1
    code = DTYPE_CODES[dtype]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    if scheme.bits == 8:
        tensors["qweight"] = ("I8", (rows, columns))
    else:
        tensors["qweight"] = ("U8", (rows, -(-columns * scheme.bits // 8)))
    tensors["scale"] = ("F16" if scheme.group_size else "F32", (rows, groups))
    if not scheme.symmetric:
        tensors["zero_point"] = ("I16" if scheme.bits == 8 else "I8", (rows, groups))
    if scheme.bias:
        tensors["bias"] = (code, (rows,))
    if scheme.input_scale:
        tensors["input_scale"] = ("F32", (columns,))
    if scheme.rotation:
        tensors["rotation_sign"] = ("I8", (columns,))
    if scheme.low_rank:
        tensors["low_rank_down"] = (code, (scheme.low_rank, columns))
        tensors["low_rank_up"] = (code, (rows, scheme.low_rank))
    if scheme.activation is not None and scheme.activation.scope == "tensor":
        tensors["activation_scale"] = ("F32", (1,))
        if not scheme.activation.symmetric:
            tensors["activation_zero_point"] = ("I16", (1,))
    if scheme.first_token is not None:
        tensors["first_token_input"] = ("F32", (columns,))
        tensors["first_token_output"] = (code, (rows,))
    return tensors


def quantization_section(manifest: Manifest, dtype: str) -> dict[str, Any]:
    """Return config.json's `quantization_config`: the manifest without its history.

    It is the one key of a config that makes a library ask us before it fills a module, so what was cut
    stands there too, also where no layer is quantized. How the cache is compressed alone does not need it:
    stock code fills such a model as it is, and computes with a plain cache.
    """
    data = manifest.model_dump(mode="json")
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "dtype": dtype,
        "modules": data["quantization"],
        "shared": data["shared"],
        **({"surgery": data["surgery"]} if manifest.surgery else {}),
        **({"kv_cache": data["kv_cache"]} if manifest.kv_cache else {}),
    }


def parse_section(section: Mapping[str, Any], where: str) -> Manifest:
    """Parse config.json's `quantization_config` as strictly as the manifest.

    Raises:
        SourceError: naming the first thing that is wrong.
    """
    known = {"quant_method", "version", "dtype", "modules", "shared", "surgery", "kv_cache"}
    unknown = sorted(set(section) - known)
    if unknown:
        raise SourceError(f"{where}: quantization_config has the unknown key {unknown[0]!r}")
    if section.get("dtype") not in list(DTYPE_CODES):  # a list compares with values that have no hash
        known_dtypes = ", ".join(DTYPE_CODES)
        raise SourceError(
            f"{where}: quantization_config.dtype {section.get('dtype')!r} is not one of {known_dtypes}"
        )
    document = {
        "format": "compress",
        "version": section.get("version"),
        "quantization": section.get("modules", {}),
        "shared": section.get("shared", {}),
        "surgery": section.get("surgery", {}),
        "kv_cache": section.get("kv_cache"),
    }
    return Manifest.check(document, f"{where}: quantization_config")


def check_quantized(manifest: Manifest, dtype: str, tensors: Mapping[str, TensorEntry], where: str) -> None:
    """Hold every quantized layer's scheme, and the shared names, against the headers.

    Raises:
        SourceError: a tensor is missing, superfluous, or has another shape or dtype; or a value that a
            whole layer depends on is out of its bounds.
    """
    _check_shared(manifest.shared, tensors, where)
    for module, scheme in manifest.quantization.items():
        expected = expected_tensors(scheme, dtype)
        for suffix, (code, shape) in expected.items():
            name = f"{module}.{suffix}"
            entry = tensors.get(manifest.shared.get(name, name))
            if entry is None:
                raise SourceError(
                    f"{where}: tensor {name} is missing; the layer cannot be rebuilt without it",
                    hint="the weights do not belong to this manifest, or were changed; export again",
                )
            if (entry.dtype, entry.shape) != (code, shape):
                raise SourceError(
                    f"{where}: tensor {name} is {entry.dtype} {list(entry.shape)}; "
                    f"the manifest implies {code} {list(shape)}",
                    hint="the manifest was changed by hand, or the weights are of another export",
                )
    check_values(manifest.quantization, tensors, manifest.shared, where)
    suffixes = {name: expected_tensors(scheme, dtype) for name, scheme in manifest.quantization.items()}
    for name in tensors:
        module, _, suffix = name.rpartition(".")
        if module in suffixes and suffix not in suffixes[module]:
            raise SourceError(f"{where}: tensor {name} does not belong to the scheme of its layer")


def _check_shared(shared: Mapping[str, str], tensors: Mapping[str, TensorEntry], where: str) -> None:
    for copy, canonical in shared.items():
        if copy in tensors:
            raise SourceError(f"{where}: tensor {copy} is stored, and said to be a copy of {canonical}")
        if canonical not in tensors:
            raise SourceError(f"{where}: tensor {canonical} is missing; {copy} is a copy of it")


def open_folder(folder: Path) -> StoredCheckpoint:
    """Read config, manifest and headers of a folder and hold them against each other.

    Raises:
        SourceError: naming the file and the first thing that is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder")
    written = read_json(folder / CONFIG_NAME)
    own_code = is_custom(written)
    config = stock_config(written, str(folder / CONFIG_NAME)) if own_code else written
    if class_name_of(config) is None:
        raise SourceError(
            f"{folder / CONFIG_NAME}: no _class_name and no architectures",
            hint="give the folder of the model itself",
        )
    tensors, metadata = read_headers(folder)
    tensors = named_as_modules(class_name_of(config), tensors, str(folder))
    _check_config(config, tensors, folder / CONFIG_NAME)
    manifest = Manifest.read(folder)
    section = config.get("quantization_config")
    method = str(section.get("quant_method")) if isinstance(section, dict) else None
    if method == QUANT_METHOD:
        stated = parse_section(section, str(folder / CONFIG_NAME))  # type: ignore[arg-type]
        manifest = manifest or stated
        _check_same(manifest, stated, folder)
        check_stops(config, str(folder / CONFIG_NAME))
        take_guard(class_name_of(config), manifest, tensors, str(folder))
        check_quantized(manifest, str(section["dtype"]), tensors, str(folder))  # type: ignore[index]
    elif manifest is not None and method is None and _needs_section(manifest):
        what = "quantized" if manifest.quantization else "cut" if manifest.surgery else "shared"
        raise SourceError(
            f"{folder / FILE_NAME} lists {what} layers, but {CONFIG_NAME} has no quantization_config",
            hint="one of the two files was changed; export again",
        )
    manifest = manifest or Manifest(history=())
    _check_cache(class_name_of(config), manifest, tensors, folder)
    if own_code:
        check_same(written, manifest.kv_cache, str(folder / CONFIG_NAME))
    return StoredCheckpoint(
        folder, config, method, manifest, tensors, metadata, own_code or is_mapped(config)
    )


def _check_cache(
    class_name: str | None, manifest: Manifest, tensors: Mapping[str, TensorEntry], folder: Path
) -> None:
    if manifest.kv_cache is not None and not is_language_class(class_name):
        raise SourceError(
            f"{folder / FILE_NAME}: compresses a key-value cache, and {class_name} is no language model",
            hint="the manifest is of another model; export again",
        )
    check_factors(manifest.kv_cache, tensors, str(folder))


def guard_name(class_name: str | None, manifest: Manifest) -> str | None:
    """Return the name of the tensor that keeps stock code from loading a folder; None where none is needed.

    transformers only warns about a `quant_method` that it does not know, and would fill the weights that
    it does not find with random numbers. A tensor of length 0 under the name of such a weight makes it
    stop instead: it refuses a tensor of another shape. Of an expert, whose name it may not know, it is that
    of the tensor with all experts.
    """
    if not is_transformers_class(class_name) or not manifest.quantization:
        return None
    name = min(manifest.quantization, key=lambda name: (expert_linear(name) is not None, name))
    part = part_of(f"{name}.weight")
    return f"{name}.weight" if part is None else part.fused


def take_guard(
    class_name: str | None, manifest: Manifest, tensors: dict[str, TensorEntry], where: str
) -> None:
    """Take the guard out of a folder's tensors; see `guard_name`.

    Raises:
        SourceError: it is not there, or it is something else.
    """
    name = guard_name(class_name, manifest)
    if name is None:
        return
    entry = tensors.pop(name, None)
    if entry is None or entry.shape != (0,):
        raise SourceError(
            f"{where}: tensor {name} must be there with the length 0, so that no code loads this folder"
            " without its quantized layers",
            hint="the weights were changed; export again",
        )


def _needs_section(manifest: Manifest) -> bool:
    """Tell whether a manifest says anything that the stock class has to be told of."""
    return bool(manifest.quantization or manifest.shared or manifest.surgery)


def _check_same(manifest: Manifest, stated: Manifest, folder: Path) -> None:
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    for kind, ours, theirs in (
        ("layer", manifest.quantization, stated.quantization),
        ("the sizes of module", manifest.surgery, stated.surgery),
        ("the shared tensor", manifest.shared, stated.shared),
        ("the cache of", _cached(manifest), _cached(stated)),
    ):
        other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if other:
            what = f"{kind} {other[0]}"
            break
    else:
        return
    raise SourceError(
        f"{folder}: {FILE_NAME} and {CONFIG_NAME} disagree about {what}",
        hint="one of the two files was changed by hand; export again",
    )


def _cached(manifest: Manifest) -> dict[str, Any]:
    """Return how the cache of each attention is compressed."""
    scheme = manifest.kv_cache
    if scheme is None:
        return {}
    common = scheme.model_dump(exclude={"layers"})
    return {name: (layer, common) for name, layer in scheme.layers.items()}


def _check_config(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], where: Path) -> None:
    """Refuse sizes that this checkpoint cannot have before a module of that size is built."""
    size = sum(entry.bytes for entry in tensors.values())
    if is_transformers_class(class_name_of(config)):
        check_transformers_config(config, len(tensors), size, str(where))
    else:
        check_config(config, size, str(where), tensors=len(tensors))
    _check_blocks(config, tensors, where)


def _check_blocks(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], where: Path) -> None:
    """Refuse more blocks than there are in the files; stages of blocks are counted elsewhere."""
    found = {match[1] for match in map(_BLOCK.match, tensors) if match is not None}
    for key in ("num_layers", "num_hidden_layers"):
        stated = config.get(key)
        if found and type(stated) is int and stated > len(found):
            raise SourceError(
                f"{where}: {key} {stated}, but the weights have {len(found)} blocks",
                hint="the config was changed by hand, or belongs to other weights",
            )
