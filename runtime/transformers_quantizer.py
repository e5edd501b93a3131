"""The quantizer that transformers' `from_pretrained` and `save_pretrained` use for our checkpoints.

transformers gives every tensor the dtype that the module has for it, so the grids of quantized layers
arrive as they are stored; what is left to do is to build the layers first and to refuse a folder whose
tensors do not fit them. See `validate.check_stop` and `validate.guard_name` for what stops a process that
lacks this quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import SourceError
from .kv.stored import check_factors
from .language_config import class_name_of
from .layered import KEY, check_layers_agree, homogeneous
from .linear_experts import split_experts
from .manifest import Manifest
from .modules import ALIGNMENT, name_of, quantized_layers, swap_linears
from .moe_classes import is_moe_class
from .stopping import take_stops
from .stored_section import StoredSection, check_cut, check_kept_factors, check_layers, refuse_empty
from .stored_tensors import check_tensors
from .surgery import apply_surgery
from .transformers_config import auto_class_of, complete_transformers_config, is_transformers_class
from .validate import (
    QUANT_METHOD,
    check_quantized,
    guard_name,
    quantization_section,
    read_header,
    take_guard,
)


class CompressConfig(StoredSection, QuantizationConfigMixin):
    """config.json's `quantization_config`; see `StoredSection`."""

    def __init__(self, **section: Any) -> None:
        super().__init__(**section)
        self.quant_method = QUANT_METHOD


class CompressQuantizer(HfQuantizer):
    """Cuts the module, builds quantized layers and factors before the weights arrive, checks what arrived."""

    requires_calibration = True

    def __init__(self, quantization_config: CompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._manifest = quantization_config.manifest
        self._layered: dict[str, Any] = {}
        self._class_name: str | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Let the library find the weights, and the stock class build from the sizes of the whole model.

        The name is of the library, which asks here before files are looked for and the module is built. A
        stock class refuses to build from sizes per layer; they are held against the module once it is cut.
        """
        take_stops(config, "config.json")
        document = config.to_dict()
        class_name = class_name_of(document)
        if is_transformers_class(class_name):  # limits, before a module of such sizes is built
            complete_transformers_config(str(class_name), document, "config.json")
            self._class_name = str(class_name)
        if not getattr(config, "is_heterogeneous", False):
            return config
        self._layered = {KEY: document.get(KEY)}
        plain = type(config)(**homogeneous(document))
        plain._attn_implementation = config._attn_implementation
        return plain

    def update_tp_plan(self, config: Any) -> Any:
        """Do the same for releases of the library that ask only here, as 5.0 does."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Hold the files' headers against the config, and put the empty quantized layers in their places."""
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if not files:
            raise SourceError(
                "a compress checkpoint is loaded from its files", hint="give its folder or Hub id"
            )
        tensors = {}
        for file in files:
            tensors.update(read_header(file)[0])
        where = str(files[0].parent)
        class_name = type(model).__name__
        _check_class(type(model), self._class_name, where)
        take_guard(class_name, self._manifest, tensors, where)
        check_quantized(self._manifest, self.quantization_config.dtype, tensors, where)
        check_factors(self._manifest.kv_cache, tensors, where)
        target = next(item.dtype for item in model.parameters() if item.is_floating_point())
        apply_surgery(model, self._manifest.surgery)
        check_layers_agree(model, self._layered, where)
        if is_moe_class(self._class_name):
            split_experts(model, self._manifest.quantization)
        swap_linears(model, self._manifest.quantization, target)
        if self._manifest.kv_cache is not None:
            from .kv.attach import put_kv_cache

            put_kv_cache(model, self._manifest.kv_cache)
        self.quantization_config.dtype = name_of(target)
        _check_names(model, tensors, where)
        check_tensors(model, tensors, shared=self._manifest.shared, cut=bool(self._manifest.surgery))
        guard = guard_name(class_name, self._manifest)
        if guard is not None:
            known = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
            ignored = _with_expression(known, re.escape(guard))
            model._keys_to_ignore_on_load_unexpected = ignored  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Let every integer weight start where torch's CPU kernels want it."""
        refuse_empty(model)
        if not self._manifest.quantization:  # what was only cut is trained and cast like any other model
            model.is_quantized = False  # type: ignore[assignment]
            model.config._is_quantized = False  # type: ignore[union-attr]
        for layer in quantized_layers(model).values():
            for name, tensor in layer.named_buffers():
                # A file's memory may be mapped; a misaligned integer weight crashes torch's CPU kernels.
                if tensor.data_ptr() % ALIGNMENT:
                    setattr(layer, name, tensor.clone())
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: the layers as they were loaded, and the guard.

        Raises:
            SourceError: a layer was replaced since it was loaded.
        """
        state = model.state_dict()
        check_layers(self._manifest, self.quantization_config.dtype, state)
        check_cut(self._manifest, state)
        check_kept_factors(self._manifest, state)
        guard = guard_name(type(model).__name__, self._manifest)
        return {**state, **({guard: torch.empty(0, dtype=torch.uint8)} if guard else {})}, {}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Leave out the library's own where layers are quantized: their folders have the module's names.

        It would fuse tensors of experts that are linears here; release 5.23 sees that the module has no place
        for the result and takes the name as it is, which nothing says of others.
        """
        if self._manifest.quantization:
            return []
        found: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return found

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a folder that loads again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer weights have no gradients; a model that was only cut is trained like any other."""
        return not self._manifest.quantization

    @property
    def is_compileable(self) -> bool:
        """The layers run under torch.compile."""
        return True


def _check_class(built: type, wanted: str | None, where: str) -> None:
    """Refuse a class that has not the modules that the manifest names, such as one without its head.

    Raises:
        SourceError: naming the class that the folder is of.
    """
    if wanted is None or any(base.__name__ == wanted for base in built.__mro__):
        return
    raise SourceError(
        f"{where}: holds a {wanted}, and {built.__name__} was asked for",
        hint=f"load it with transformers.{auto_class_of(wanted)} or transformers.{wanted}, or with"
        " compress.load",
    )


def _check_names(model: nn.Module, tensors: Iterable[str], where: str) -> None:
    """Refuse missing and superfluous tensors, of which transformers would only warn."""
    stored, expected = set(tensors), set(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing, unexpected = expected - stored - tied, stored - expected
    if missing or unexpected:
        what = f"{min(missing)} is missing" if missing else f"{min(unexpected)} is not part of the model"
        raise SourceError(f"{where}: the checkpoint does not fit its config: tensor {what}")


def attach(module: nn.Module, manifest: Manifest, dtype: str) -> None:
    """Give a module what `from_pretrained` would have: `save_pretrained` then writes a whole folder."""
    config = CompressConfig.from_dict(quantization_section(manifest, dtype))
    quantizer = CompressQuantizer(config)
    module.hf_quantizer = quantizer
    module.quantization_method = config.quant_method
    module.is_quantized = bool(manifest.quantization)  # type: ignore[assignment]
    quantizer.postprocess_model(module)
    if manifest.quantization:  # `save_pretrained` takes them for its own names otherwise, experts among them
        module._weight_conversions = []  # type: ignore[assignment]


def _with_expression(known: Collection[str] | None, expression: str) -> set[str] | list[str]:
    """Add an expression to names to ignore: a set, in early releases of transformers 5 a list or None.

    The library adds collections of its own kind to them afterwards.
    """
    if isinstance(known, set):
        return {*known, expression}
    return [*(known or ()), expression]
