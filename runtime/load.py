"""`compress.load`: a folder or Hub id -> the stock module with its quantized layers, ready to run.

An adapter of a compressed cache is no model: its original is loaded, and the factors are put into that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError, SourceError, UsageError
from .config import DEFAULTS, SPARE_TABLE_BYTES
from .encoders import check_encoders
from .fetch import fetch
from .kv.adapter import StoredAdapter, base_folder, check_sizes, is_adapter, open_adapter
from .kv.assembled import assembled
from .kv.saving import SaveWithManifest
from .kv.scheme import factor_tensors
from .language_config import is_language_class
from .layered import check_layers_agree
from .library_load import load_by_library
from .library_sections import is_known
from .linear_experts import split_experts
from .manifest import FILE_NAME as MANIFEST_NAME
from .manifest import Manifest
from .mapped_routing import is_mapped
from .modules import dtype_of, exact_names, name_of, place, swap_linears
from .moe_classes import is_moe_class
from .moe_names import stored_shapes
from .moe_tensors import place_stored
from .stored_tensors import TORCH_DTYPES, check_dtype, check_tensors, dense_tensors
from .surgery import apply_surgery
from .transformers_config import implied_copies, is_transformers_class
from .transformers_model import build_transformers_model
from .validate import CONFIG_NAME, QUANT_METHOD, StoredCheckpoint, TensorEntry, open_folder, read_json


def load(
    path_or_repo: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    base: str | Path | None = None,
) -> nn.Module:
    """Load a checkpoint that `compress` exported, in any of its formats, or a dense stock one.

    Args:
        path_or_repo: a folder with config.json and safetensors, or a Hub id; or, of either kind, an adapter
            of a compressed cache.
        device: where the tensors go.
        dtype: of what is not quantized; None keeps the stored one. Integer weights and their
            scales are never cast.
        revision: Hub branch, tag or commit.
        subfolder: of the folder or repository, such as "transformer".
        base: the model of an adapter: a folder, `builtin:NAME`, or a Hub id, also with `@revision`; None:
            the one that the adapter names. Either must have the projections that it was made for.

    Returns:
        The stock module in evaluation mode. Where its cache is compressed, `generate` uses that cache;
        the library's own loader, with this package or without it, gives such a model a plain cache, unless it
        has quantized layers as well.

    Raises:
        SourceError: anything in the folder is missing, damaged or contradicts the rest, or the base of an
            adapter is another model.
        UsageError: a base of what is no adapter.
        HubError: the download failed.
    """
    folder = fetch(path_or_repo, revision=revision, subfolder=subfolder)
    if is_adapter(folder):
        adapter = open_adapter(folder)
        found = base_folder(adapter, base, is_local=Path(path_or_repo).is_dir())
        return load_adapter(adapter, found, dtype=dtype).to(device)
    if base is not None:
        raise UsageError(f"{path_or_repo} is a whole model, no adapter", hint="leave `base` out")
    return _load_whole(open_folder(folder), dtype).to(device)


def load_adapter(
    adapter: StoredAdapter, folder: Path, *, dtype: str | torch.dtype | None = None
) -> nn.Module:
    """Load the model of an adapter and give it the compressed cache.

    Args:
        adapter: from `open_adapter`.
        folder: of the model.
        dtype: of what is not quantized; None: that of the model that the adapter was made for.

    Raises:
        SourceError: the folder is damaged or of another model, or a factor is not finite.
    """
    stored, own = assembled(adapter, folder), adapter.document.dtype
    module: Any = _load_whole(stored, dtype or (None if stored.dtype == own else own))
    check_sizes(adapter, str(folder), module.config.to_dict(), stored.tensors)
    for name, entry in adapter.tensors.items():
        if not torch.isfinite(module.get_parameter(name)).all():
            raise SourceError(
                f"{entry.file}: tensor {name} holds what is no finite number",
                hint="the file is damaged; fetch the adapter again, or export it again",
            )
    loaded: nn.Module = module
    return loaded


def _load_whole(stored: StoredCheckpoint, dtype: str | torch.dtype | None) -> nn.Module:
    if stored.quant_method in (None, QUANT_METHOD):
        return _build(stored, dtype)
    return _load_stock(stored, dtype)


def read_checkpoint(folder: str | Path) -> tuple[nn.Module, Manifest]:
    """Load a folder in our own or a dense format, without gradients, together with its manifest.

    Raises:
        SourceError: damaged, or in the format of another library.
    """
    stored = open_folder(Path(folder))
    if stored.quant_method not in (None, QUANT_METHOD):
        raise SourceError(f"{folder} is in {stored.quant_method} format; a stage needs the compress format")
    return _build(stored, None).requires_grad_(False), stored.manifest


def model_class(stored: StoredCheckpoint) -> Any:
    """Return the stock diffusers class that config.json names.

    Raises:
        SourceError: diffusers has no model of that name.
    """
    import diffusers

    found = getattr(diffusers, stored.class_name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise SourceError(
            f"{stored.folder}: {stored.class_name} is not a model of diffusers {diffusers.__version__}",
            hint="install a diffusers release that has it",
        )
    return found


def _load_stock(stored: StoredCheckpoint, dtype: str | torch.dtype | None) -> nn.Module:
    if is_transformers_class(stored.class_name) and not is_known(stored):
        raise SourceError(
            f"{stored.folder} is in {stored.quant_method} format, which compress does not write for models of"
            " transformers of this kind",
            hint="load it with transformers and the package of that format",
        )
    target = dtype_of(dtype or stored.dtype)
    bare = _without_memory(stored, target)
    _check_tables(stored, bare)
    if is_known(stored):
        module = load_by_library(stored, bare, target)
        _fill_cache(module, stored, target)
        return module
    for name, tensor in dense_tensors(bare, stored.tensors):
        check_dtype(name, stored.tensors[name], tensor.dtype)
    try:
        module, info = model_class(stored).from_pretrained(
            str(stored.folder), torch_dtype=target, output_loading_info=True, use_safetensors=True
        )
    except ImportError as error:
        raise SourceError(
            f"{stored.folder} is in {stored.quant_method} format, which another package loads: {error}",
            hint=f"install {stored.quant_method}, or export with format: compress",
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{stored.folder}: the loader of {stored.quant_method} format refuses it: {error}",
            hint="the folder was changed by hand or damaged; fetch it again",
        ) from error
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    if wrong:
        raise SourceError(f"{stored.folder}: tensor {wrong[0]} does not fit the model")
    loaded: nn.Module = module
    return loaded


def skeleton(stored: StoredCheckpoint, dtype: torch.dtype) -> nn.Module:
    """Build the module, cut as the manifest says, without memory for its weights.

    The buffers that it computes are real.

    Raises:
        SourceError: the config does not build, asks for larger tables than its weights can need, or
            the manifest's layers do not fit it.
    """
    from accelerate import init_empty_weights

    if stored.class_name not in DEFAULTS:  # of those, torch-free limits know what they compute
        _check_tables(stored, _without_memory(stored, dtype))
    with init_empty_weights():
        module = _from_config(stored, dtype)
    apply_surgery(module, stored.manifest.surgery)
    check_layers_agree(module, stored.config, str(stored.folder / CONFIG_NAME))
    if is_moe_class(stored.class_name):
        split_experts(module, stored.manifest.quantization)
    swap_linears(module, stored.manifest.quantization, dtype)
    put_stored_cache(module, stored)
    return module


def put_stored_cache(module: nn.Module, stored: StoredCheckpoint) -> None:
    """Give a module the compressed cache that a folder has, if it has one, with factors still to be filled.

    Raises:
        SourceError: the manifest's attentions do not fit the module.
    """
    if stored.manifest.kv_cache is None:
        return
    from .kv.attach import put_kv_cache

    try:
        put_kv_cache(module, stored.manifest.kv_cache)
    except (PlanError, SourceError) as error:
        raise SourceError(f"{stored.folder / MANIFEST_NAME}: {error.message}", hint=error.hint) from None


def _from_config(stored: StoredCheckpoint, dtype: torch.dtype) -> nn.Module:
    if is_transformers_class(stored.class_name):
        with _default_dtype(dtype):
            return build_transformers_model(stored.config, str(stored.folder / CONFIG_NAME))
    config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
    cls = model_class(stored)
    try:
        with _default_dtype(dtype):
            module: nn.Module = cls.from_config(config)
    except (
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        where = stored.folder / "config.json"
        raise SourceError(f"{where}: {stored.class_name} refuses it: {error}") from error
    return module


def _without_memory(stored: StoredCheckpoint, dtype: torch.dtype) -> nn.Module:
    """Build the stock module on the meta device, its buffers too."""
    with torch.device("meta"):
        return _from_config(stored, dtype)


def _check_tables(stored: StoredCheckpoint, module: nn.Module) -> None:
    """Learn what a class computes while it is built, before it does."""
    needed = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    available = sum(entry.bytes for entry in stored.tensors.values())
    if needed > available + SPARE_TABLE_BYTES:
        raise SourceError(
            f"{stored.folder / CONFIG_NAME}: {stored.class_name} would compute tables of {needed} bytes, "
            f"but the weights have only {available}",
            hint="the config was changed by hand, or belongs to other weights",
        )


def _fill_cache(module: nn.Module, stored: StoredCheckpoint, dtype: torch.dtype) -> None:
    """Give a module that another library has loaded the compressed cache of its folder, if it has one."""
    put_stored_cache(module, stored)
    scheme = stored.manifest.kv_cache
    for name in factor_tensors(scheme) if scheme is not None else ():
        device = module.get_parameter(name).device
        place(module, name, read_tensor(stored.tensors[name]).to(device, dtype))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # Buffers that the module computes must come out in the dtype that the stock loader gives them.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _build(stored: StoredCheckpoint, dtype: str | torch.dtype | None) -> nn.Module:
    target = dtype_of(dtype or stored.dtype)
    check_encoders(stored.manifest.quantization, stored.folder)
    module = skeleton(stored, target)
    _check_names(stored, module)
    exact = exact_names(module)
    copies: dict[str, list[str]] = {}
    for copy, canonical in stored.manifest.shared.items():
        copies.setdefault(canonical, []).append(copy)
    for name, entry in stored.tensors.items():
        tensor = read_tensor(entry)
        if dtype is not None and name not in exact and tensor.is_floating_point():
            tensor = tensor.to(target)
        place_stored(module, name, tensor, requires_grad=tensor.is_floating_point())
        for copy in copies.get(name, ()):
            place(module, copy, tensor.clone(), requires_grad=tensor.is_floating_point())
    _tie(module, stored)
    if is_language_class(stored.class_name):
        _attach_generation(module, stored)
    if stored.quant_method == QUANT_METHOD:
        _attach(module, stored.manifest, name_of(target))
    elif stored.manifest.kv_cache is not None and not is_mapped(stored.config):
        module.save_pretrained = SaveWithManifest(module, stored.manifest)  # type: ignore[assignment]
    return module.eval()


def _check_names(stored: StoredCheckpoint, module: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    expected = stored_shapes(stored.class_name, shapes, stored.tensors)
    shared = {**_not_stored(stored), **stored.manifest.shared}
    missing = sorted(expected.keys() - stored.tensors.keys() - shared.keys())
    unexpected = sorted((stored.tensors.keys() | shared.keys()) - expected.keys())
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not in {stored.class_name}"
        raise SourceError(
            f"{stored.folder}: tensor {what} ({len(missing)} missing, {len(unexpected)} unexpected)",
            hint="config and weights do not belong together",
        )
    check_tensors(module, stored.tensors, shared=shared, cut=bool(stored.manifest.surgery))


def _not_stored(stored: StoredCheckpoint) -> dict[str, str]:
    """Return the tied tensors that the files leave out: copy -> stored name."""
    return {
        copy: first
        for copy, first in implied_copies(stored.config).items()
        if copy not in stored.tensors and first in stored.tensors
    }


def _tie(module: nn.Module, stored: StoredCheckpoint) -> None:
    """Let what the config ties be one tensor.

    Raises:
        SourceError: both are stored, and differ.
    """
    for copy, first in implied_copies(stored.config).items():
        if copy in stored.tensors and not torch.equal(
            module.get_parameter(copy), module.get_parameter(first)
        ):
            raise SourceError(f"{stored.folder}: {copy} differs from {first}, which the config says it is")
        owner, _, attribute = copy.rpartition(".")
        setattr(module.get_submodule(owner), attribute, module.get_parameter(first))


def _attach_generation(module: nn.Module, stored: StoredCheckpoint) -> None:
    """Give a language model the folder's defaults for generating, as `from_pretrained` does.

    Raises:
        SourceError: the file is damaged.
    """
    from transformers import GenerationConfig

    path = stored.folder / "generation_config.json"
    if not path.is_file():
        return
    read_json(path)  # for what the library below would not name, such as nesting without end
    try:
        module.generation_config = GenerationConfig.from_pretrained(str(stored.folder), local_files_only=True)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{path}: transformers refuses it: {reason}", hint="fetch the folder again"
        ) from error


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into memory of its own, aligned whatever its place in the file."""
    data = torch.empty(entry.bytes, dtype=torch.uint8)
    array: Any = data.numpy()
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(memoryview(array)) != entry.bytes:
            raise SourceError(f"{entry.file} was changed while it was read")
    return data.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def _attach(module: nn.Module, manifest: Manifest, dtype: str) -> None:
    """Give the module what the stock loader would have: `save_pretrained` then writes a whole folder."""
    if is_transformers_class(type(module).__name__):
        from .transformers_quantizer import attach

        attach(module, manifest, dtype)
        return
    from .diffusers_quantizer import CompressConfig, CompressQuantizer
    from .validate import quantization_section

    config = CompressConfig.from_dict(quantization_section(manifest, dtype))
    module.register_to_config(quantization_config=config)  # type: ignore[operator]
    module.hf_quantizer = CompressQuantizer(config)
    module.is_quantized = bool(manifest.quantization)  # type: ignore[assignment]
    module.quantization_method = config.quant_method
