"""The quantizer that diffusers' `from_pretrained` and `save_pretrained` use for our checkpoints.

diffusers casts every floating tensor to `torch_dtype` while it loads, which would round the
float32 scales of a bfloat16 model; the tensors of quantized layers therefore pass through its
loader as integers of the same width and are turned back when they are placed.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..errors import SourceError
from .encoders import check_encoders
from .modules import ALIGNMENT, dtype_of, exact_names, name_of, swap_linears
from .stored_section import StoredSection, check_cut, check_layers, refuse_empty
from .stored_tensors import check_tensors
from .surgery import apply_surgery
from .validate import QUANT_METHOD, TensorEntry, check_quantized, read_header

_AS_INTEGER = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Method(StrEnum):
    """The `quant_method` of config.json; a str enum because diffusers reads its `.value`."""

    COMPRESS = QUANT_METHOD


class CompressConfig(StoredSection, QuantizationConfigMixin):
    """config.json's `quantization_config`; see `StoredSection`."""

    def __init__(self, **section: Any) -> None:
        super().__init__(**section)
        self.quant_method = Method.COMPRESS

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `to_dict` does: every key is needed to load."""
        return self.to_dict()


class CompressQuantizer(DiffusersQuantizer):
    """Cuts the module and builds its quantized layers before the weights arrive, and places their tensors."""

    requires_calibration = True
    use_keep_in_fp32_modules = False

    def __init__(self, quantization_config: CompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._manifest = quantization_config.manifest
        self._dtype = dtype_of(quantization_config.dtype)
        self._packed: dict[str, torch.dtype] = {}
        self._loaded: list[str] = []
        self._stored: dict[str, TensorEntry] = {}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Use the checkpoint's own dtype where the caller names none (diffusers would use float32)."""
        self._dtype = dtype_of(torch_dtype or self._dtype)
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Validate the files' headers against the config; announce the copies that are not stored."""
        tensors: dict[str, TensorEntry] = {}
        for file in checkpoint_files:
            tensors.update(read_header(Path(file))[0])
        where = str(Path(checkpoint_files[0]).parent)
        check_quantized(self._manifest, self.quantization_config.dtype, tensors, where)
        check_encoders(self._manifest.quantization, Path(where))
        self._stored = tensors
        self._loaded = [*loaded_keys, *self._manifest.shared]
        return self._loaded

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        apply_surgery(model, self._manifest.surgery)
        swap_linears(model, self._manifest.quantization, self._dtype)
        self._packed = exact_names(model)
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        expected = set(model.state_dict())
        missing, unexpected = expected - set(self._loaded), set(self._loaded) - expected
        if missing or unexpected:
            # diffusers only warns and initialises what is missing; a damaged file must not load.
            what = f"{min(missing)} is missing" if missing else f"{min(unexpected)} is not part of the model"
            raise SourceError(f"the checkpoint does not fit its config: tensor {what}")
        check_tensors(model, self._stored, shared=self._manifest.shared, cut=bool(self._manifest.surgery))

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the copies that are not stored, and disguise what must not be cast."""
        result = dict(state_dict)
        for copy, canonical in self._manifest.shared.items():
            if canonical in state_dict:
                result[copy] = state_dict[canonical].clone()
        for name in result.keys() & self._packed.keys():
            tensor = result[name]
            if tensor.dtype in _AS_INTEGER:
                self._packed[name] = tensor.dtype
                result[name] = tensor.contiguous().view(_AS_INTEGER[tensor.dtype])
        return result

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Tell whether `create_quantized_param` places this tensor."""
        return param_name in self._packed

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        """Refuse another shape; the headers were checked before, so this is a defect of the file."""
        raise SourceError(f"tensor {param_name} is {list(loaded.shape)}; expected {list(current.shape)}")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Place one integer tensor or scale of a quantized layer, bit for bit."""
        module_name, _, name = param_name.rpartition(".")
        dtype = self._packed[param_name]
        disguised = dtype in _AS_INTEGER and not param_value.is_floating_point()
        value = param_value.view(dtype) if disguised else param_value
        value = value.to(target_device)
        # A misaligned integer weight crashes torch's CPU kernels.
        if value.data_ptr() % ALIGNMENT:
            value = value.clone()
        setattr(model.get_submodule(module_name), name, value)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        refuse_empty(model)
        model.is_quantized = bool(self._manifest.quantization)  # type: ignore[assignment]
        self.quantization_config.dtype = name_of(self._dtype)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Leave out the copies when `save_pretrained` writes; the config names them.

        Raises:
            SourceError: a copy was changed since it was loaded, or not safetensors is asked for.
        """
        if not safe_serialization:
            raise SourceError("compress checkpoints are written as safetensors only")
        check_layers(self._manifest, self.quantization_config.dtype, state_dict)
        check_cut(self._manifest, state_dict)
        for copy, canonical in self._manifest.shared.items():
            if not torch.equal(state_dict[copy], state_dict[canonical]):
                raise SourceError(f"tensor {copy} no longer equals {canonical}, so it cannot be left out")
        kept = {name: tensor for name, tensor in state_dict.items() if name not in self._manifest.shared}
        return kept, {}

    @property
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
