"""Loading a language model in the format of another package, which transformers does if that is installed."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..errors import SourceError
from .kv.stored import is_factor
from .library_sections import HINT, library_schemes
from .silent_bars import silent_bars
from .transformers_config import auto_class_of
from .validate import StoredCheckpoint


def load_by_library(stored: StoredCheckpoint, bare: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let transformers load a folder whose format is known.

    Args:
        stored: of `validate.open_folder`.
        bare: the dense module of its config, without memory.
        dtype: of what is not quantized.

    Returns:
        The stock module with the package's layers, in evaluation mode. Factors of a compressed cache are
        none of its tensors.

    Raises:
        SourceError: the folder is not what compress writes, or the package is not installed or refuses it.
    """
    library_schemes(stored, {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()})
    import transformers

    # Built here and not read from the folder: nothing in it may choose code to fetch or to run.
    config: Any = type(bare.config).from_dict(bare.config.to_dict())  # type: ignore[union-attr, operator]
    config.quantization_config = dict(stored.config["quantization_config"])
    stock: Any = getattr(transformers, auto_class_of(stored.class_name))
    try:
        with _quietly(str(stored.quant_method)):
            module, info = stock.from_pretrained(
                str(stored.folder), config=config, dtype=dtype, output_loading_info=True,
                use_safetensors=True, local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
    except ImportError as error:
        raise SourceError(
            f"{stored.folder} is in {stored.quant_method} format, which another package loads: {error}",
            hint=f"install {stored.quant_method}, or export with format: compress",
        ) from error
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{stored.folder}: the loader of {stored.quant_method} format refuses it: {reason}", hint=HINT
        ) from error
    wrong = [name for found in info.values() for name in found if not is_factor(name)]
    if wrong:
        raise SourceError(f"{stored.folder}: tensor {wrong[0]} does not fit the model", hint=HINT)
    loaded: nn.Module = module
    return loaded.eval()


def _quietly(quant_method: str) -> AbstractContextManager[None]:
    """Return what keeps the bars of a format's package, and those of transformers, from the terminal."""
    package = quant_method.replace("-", "_")
    with suppress(ImportError):  # which transformers tells, and how to install it
        import_module(package)
    return silent_bars(package, "transformers")
