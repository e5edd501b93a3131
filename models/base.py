"""What the rest of the house knows about a model: a family adapter, a spec, an open model.

`ModelSpec` is shapes only (from configs, on the meta device): planning works on it.
`OpenModel` is the module with its weights: compressors change it in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..runtime.kv.scheme import KvCacheScheme, factor_tensors
from ..runtime.manifest import HistoryEntry, KernelScheme, ModuleSurgery, QuantizedModule
from .building import meta_module
from .cache_bytes import kv_bytes_per_token
from .origins import NAME as DEPTH_FILE
from .origins import original_name
from .shapes import expected_shapes, is_stored_buffer, stays_in_float32
from .source_card import SourceCard
from .structure import PrunableStructure

Role = Literal[
    "attention.q", "attention.k", "attention.v", "attention.out", "attention.qkv",
    "cross.q", "cross.k", "cross.v", "cross.out",
    "ff.in", "ff.gate", "ff.out", "adaln", "embedder", "head",
    "projection", "conv", "conv.shortcut", "router",
]  # fmt: skip


Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name, as in the state dict -> shape, of those tensors whose shapes the config does not imply."""
AS_CONFIGURED: Shapes = MappingProxyType({})


@dataclass(frozen=True)
class LinearSite:
    """One `nn.Linear` or `nn.Conv2d` and what it does in its model.

    Attributes:
        name: dotted name in `named_modules()`.
        role: what it computes.
        block: index of its block, None outside the blocks.
        shape: (out_features, in_features); of a convolution (out, in * height * width of its kernel).
        kernel: the window of a convolution, None for a linear layer.
    """

    name: str
    role: Role
    block: int | None
    shape: tuple[int, int]
    kernel: KernelScheme | None = None


@dataclass(frozen=True)
class FoldGroup:
    """Linears that read one tensor whose per-channel scale another module can absorb exactly.

    Attributes:
        targets: names of the linears that share the input.
        absorb: called with (module, m) where m [in_features] float multiplies the input channels
            from now on; changes the producer's weights. The caller divides the targets' columns.
        producers: names of the linears or norms whose weights `absorb` changes.
    """

    targets: tuple[str, ...]
    absorb: Callable[[nn.Module, Tensor], None]
    producers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        parameters: identical copies counted once, as papers do.
        parameters_stored: all of them.
        macs: multiply-accumulates of one forward at the family's reference input, attention
            products included.
        bytes: tensor bytes as they would be stored, shared copies once.
        bits_per_weight: 8 * bytes / parameters.
        active_parameters: those that one token meets, None where it meets all of them.
        kv_bytes_per_token: bytes that a language model keeps of a token's keys and values; None of other
            models, and where it is not known. See `cache_bytes`.

    The factors of a compressed cache are in `bytes`, and are no parameters of the model: `parameters`
    says how large the model is that computes with them.
    """

    parameters: int
    parameters_stored: int
    macs: int
    bytes: int
    bits_per_weight: float
    active_parameters: int | None = None
    kv_bytes_per_token: float | None = None

    def to_json(self) -> dict[str, int | float]:
        """Return the report's form."""
        active, cached = self.active_parameters, self.kv_bytes_per_token
        return {
            "parameters": self.parameters,
            "parameters_stored": self.parameters_stored,
            "macs": self.macs,
            "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            **({} if active is None else {"active_parameters": active}),
            **({} if cached is None else {"kv_bytes_per_token": round(cached, 4)}),
        }


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
        id: what the user wrote: a Hub id, a folder, or `builtin:NAME`.
        folder: the local folder of the component (weights, config.json).
        revision: Hub commit, None for a folder.
        hashes: file name -> SHA-256 of every weight file.
        card: what it says about itself.
        origins: what it says of blocks that earlier runs removed, as `origins.handed_on` writes it; None:
            it is the whole model, as far as it says.
    """

    id: str
    folder: Path
    revision: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    card: SourceCard = SourceCard()
    origins: str | None = None


class Family(ABC):
    """Adapter of one kind of model: structure, inputs, cost. Stateless."""

    name: ClassVar[str]
    class_names: ClassVar[tuple[str, ...]]
    library: ClassVar[Literal["diffusers", "transformers"]] = "diffusers"
    task: ClassVar[Literal["denoise", "language", "classify", "segment"]] = "denoise"
    tied: ClassVar[bool] = False
    """Copies (`replicas`) are one tensor in the stock module, and stock checkpoints store them once."""
    compared: ClassVar[tuple[int, ...]] = (0,)
    """Which outputs of a forward, as a tuple, an export must reproduce: all that its users read."""
    latents: ClassVar[str] = "hidden_states"
    """Name of the denoiser's argument that holds the noisy latents [batch, channels, height, width]."""

    @abstractmethod
    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module from its config, on the current default device."""

    def adopt(self, module: nn.Module) -> nn.Module:
        """Return a stock module that was loaded elsewhere as `build` builds it."""
        return module

    @abstractmethod
    def linears(self, module: nn.Module) -> list[LinearSite]:
        """Every `nn.Linear` in forward order with its role (a quantized one counts as well)."""

    @abstractmethod
    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The repeated blocks in forward order, with their dotted names."""

    @abstractmethod
    def attentions(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The attention modules in forward order, with their dotted names."""

    @abstractmethod
    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Which inputs' channel scales can be absorbed by a producer, exactly."""

    @abstractmethod
    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments of one forward at the reference input (random, in the module's dtype)."""

    @abstractmethod
    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Analytic multiply-accumulates of one forward, batch 1, at the reference input.

        Args:
            config: of the stock class.
            attention_products: count Q K^T and the weighted sum of V.
            shapes: what pruning left; families that cannot be pruned have none.
        """

    @abstractmethod
    def replicas(self, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Groups of tensor names that hold equal copies by construction; the first is canonical."""

    def default_keep(self) -> tuple[str, ...]:
        """Patterns of linears that quantizers leave in floating point unless told otherwise."""
        return ()

    def split(self, module: nn.Module) -> nn.Module:
        """Give every matrix of what the stock class fuses a linear of its own, in place; most fuse nothing.

        Quantizers do this first. What is fused for good stays so; see `beside_linears`.

        Returns:
            `module`.
        """
        return module

    def fuse(self, module: nn.Module) -> nn.Module:
        """Undo `split`, in place, where none of the linears that came of it is quantized; return `module`."""
        return module

    def split_tensors(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec]:
        """Return the tensors that a module of these has after `split`."""
        return dict(tensors)

    def fused_tensors(
        self, tensors: Mapping[str, TensorSpec], quantized: Collection[str]
    ) -> dict[str, TensorSpec]:
        """Return the tensors that a split module has after `fuse`, with these layers quantized."""
        return dict(tensors)

    def beside_linears(self, module: nn.Module) -> list[str]:
        """Say which large tensors belong to no linear, and stay as they are whoever quantizes; for a plan."""
        return []

    def active_parameters(self, config: Mapping[str, Any]) -> int | None:
        """Count the parameters that one token meets; None where it meets all of them."""
        return None

    def kv_bytes_per_token(
        self, config: Mapping[str, Any], dtype: torch.dtype, scheme: KvCacheScheme | None
    ) -> float | None:
        """Return the bytes that the cache keeps of a token; None where there is no cache, or it is not known.

        Args:
            config: of the model, completed.
            dtype: of the model.
            scheme: how the cache is compressed; None: it is not.
        """
        return kv_bytes_per_token(config, dtype.itemsize, scheme) if self.task == "language" else None

    def paper_macs(self, config: Mapping[str, Any], *, shapes: Shapes = AS_CONFIGURED) -> int | None:
        """Count as the papers on pruning do, for comparison with their tables; None where none is known."""
        return None

    def structure(self, module: nn.Module) -> PrunableStructure:
        """Say what may be removed from the module as it is now.

        Raises:
            NotImplementedError: the family cannot be pruned.
        """
        raise NotImplementedError(f"nothing is known of what may be removed from the family {self.name}")

    def traceable(self, module: nn.Module) -> AbstractContextManager[None]:
        """Replace, within the context, what hides dependencies from a trace; outputs stay bit-equal."""
        return nullcontext()

    def native_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Return the config from which the stock class builds the pruned model; None where none does."""
        return None

    def layered_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Return a config that says all widths in the library's own words, layer by layer.

        Stock classes refuse to build from it, loudly; `runtime.surgery` does. None where there is none.
        """
        return None

    def padded_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Return a config in whose equal widths every layer of the pruned model has room, None without one.

        The width of the residual stream is that of the pruned model, because norms would count zeros.
        """
        return None


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes as stored."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


def tensor_specs(shapes: Shapes, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return the tensors of a module whose dtype is `dtype`, but for those that are always in float32."""
    return {
        name: TensorSpec(shape, torch.float32 if stays_in_float32(name) else dtype)
        for name, shape in shapes.items()
    }


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor as stored; those of its parts for a tensor made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class ModelSpec:
    """A model known by its shapes alone.

    Attributes:
        tensors: name -> shape and dtype of what a checkpoint would store, shared copies included.
        shared: name of a copy -> name of the stored tensor.
        quantization: what stages planned so far have quantized.
        surgery: what stages planned so far have cut.
        kv_cache: how the stages planned so far compress the cache; its factors are among the tensors.
        parameters, parameters_stored: of the dense model at this point of the recipe.
    """

    family: Family
    config: Mapping[str, Any]
    source: Source
    dtype: torch.dtype
    tensors: Mapping[str, TensorSpec]
    shared: Mapping[str, str]
    parameters: int
    parameters_stored: int
    quantization: Mapping[str, QuantizedModule] = field(default_factory=dict)
    surgery: Mapping[str, ModuleSurgery] = field(default_factory=dict)
    kv_cache: KvCacheScheme | None = None

    def meta_module(self) -> nn.Module:
        """Build the dense module on the meta device, cut as planned: no memory, no weights."""
        return meta_module(self.family, self.config, self.surgery)

    def cut(
        self,
        surgery: Mapping[str, ModuleSurgery],
        config: Mapping[str, Any] | None = None,
        shared: Mapping[str, str] | None = None,
    ) -> ModelSpec:
        """Return the spec of the dense model with other sizes, and with a plain cache.

        Args:
            surgery: everything that differs from what the config implies.
            config: where the sizes, or some of them, follow from another config; None: this one.
            shared: copies, where other names are left of them; None: these.
        """
        config = self.config if config is None else config
        shared = self.shared if shared is None else shared
        shapes = {**expected_shapes(config["_class_name"], config), **flat_shapes(surgery)}
        tensors = tensor_specs(shapes, self.dtype)
        return replace(
            self, config=config, surgery=dict(surgery), tensors=tensors, shared=shared, kv_cache=None,
            parameters=count_parameters(config, shapes, shared),
            parameters_stored=count_parameters(config, shapes, {}),
        )  # fmt: skip

    def with_kv_cache(self, scheme: KvCacheScheme) -> ModelSpec:
        """Return the spec with a compressed cache, whose factors are stored in the model's type.

        Raises:
            ValueError: the cache of this spec is compressed already.
        """
        if self.kv_cache is not None:
            raise ValueError("the cache is compressed already")
        factors = {name: TensorSpec(shape, self.dtype) for name, shape in factor_tensors(scheme).items()}
        return replace(self, kv_cache=scheme, tensors={**self.tensors, **factors})

    def split(self) -> ModelSpec:
        """Return the spec with a linear for every matrix that can have one, as `Family.split` does it."""
        return replace(self, tensors=self.family.split_tensors(self.config, self.tensors))

    def size(self) -> Size:
        """Return the size that a checkpoint of this spec has."""
        stored = sum(spec.bytes for name, spec in self.tensors.items() if name not in self.shared)
        return Size(
            parameters=self.parameters,
            parameters_stored=self.parameters_stored,
            macs=self.family.macs(self.config, shapes=flat_shapes(self.surgery)),
            bytes=stored,
            bits_per_weight=8 * stored / self.parameters,
            active_parameters=self.family.active_parameters(self.config),
            kv_bytes_per_token=self.family.kv_bytes_per_token(self.config, self.dtype, self.kv_cache),
        )

    def evolve(self, **changes: Any) -> ModelSpec:
        """Return a copy with `changes`."""
        return replace(self, **changes)


@dataclass
class OpenModel:
    """A model with its weights; compressors change `module` in place and record how.

    Attributes:
        config: from which the stock class builds the module, but for `surgery`.
        spec: of the module as it was opened (dense, before any stage).
        scheduler: diffusers scheduler that the checkpoint came with, None for other libraries.
        surgery: module name -> what the config does not say of it; kept equal to the module.
        shared: name of a copy -> name of the tensor that is stored; kept equal to the module.
        quantization: module name -> scheme; kept equal to the `QuantizedLinear`s in `module`.
        kv_cache: how the cache is compressed; kept equal to what `put_kv_cache` gave to `module`.
        history: one entry per finished stage.
        attachments: name of a text file -> content, written beside the weights (such as what was cut).
    """

    module: nn.Module
    family: Family
    config: dict[str, Any]
    source: Source
    spec: ModelSpec
    scheduler: Any | None = None
    quantization: dict[str, QuantizedModule] = field(default_factory=dict)
    history: list[HistoryEntry] = field(default_factory=list)
    surgery: dict[str, ModuleSurgery] = field(default_factory=dict)
    attachments: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    kv_cache: KvCacheScheme | None = None

    def dense(self) -> ModelSpec:
        """Return the spec of the module as it is now, before quantization."""
        return self.spec.cut(self.surgery, self.config, self.shared)

    def original_name(self, name: str) -> str:
        """Return what a module or tensor was called before blocks were removed."""
        return original_name(name, self.attachments.get(DEPTH_FILE))

    @property
    def changed(self) -> bool:
        """Whether a stage has changed the model since it was opened."""
        # What earlier runs removed is told in a file that the model was opened with.
        written = any(self.attachments[name] != self.source.origins for name in self.attachments)
        return bool(self.history or self.quantization or self.surgery or self.kv_cache or written)

    def linears(self) -> Sequence[LinearSite]:
        """The family's linears of the module as it is now."""
        return self.family.linears(self.module)

    def size(self) -> Size:
        """Return the size of the module as it would be stored now."""
        stored = sum(
            tensor_bytes(tensor)
            for name, tensor in self.module.state_dict().items()
            if name not in self.shared
        )
        dense = self.dense()
        return Size(
            parameters=dense.parameters,
            parameters_stored=dense.parameters_stored,
            macs=self.family.macs(self.config, shapes=flat_shapes(self.surgery)),
            bytes=stored,
            bits_per_weight=8 * stored / dense.parameters,
            active_parameters=self.family.active_parameters(self.config),
            kv_bytes_per_token=self.family.kv_bytes_per_token(self.config, self.spec.dtype, self.kv_cache),
        )


def flat_shapes(surgery: Mapping[str, ModuleSurgery]) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of everything that a surgery changes."""
    return {
        f"{module}.{name}" if module else name: tuple(shape)
        for module, cut in surgery.items()
        for name, shape in cut.shapes.items()
    }


def count_parameters(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shared: Mapping[str, str]
) -> int:
    """Count parameters; fixed buffers that are stored all the same are none.

    Args:
        config: completed, with `_class_name`.
        shapes: of all tensors.
        shared: copies, which are not counted.
    """
    class_name = config["_class_name"]
    return sum(
        prod(shape)
        for name, shape in shapes.items()
        if name not in shared and not is_stored_buffer(class_name, name)
    )
