"""`compress.json`: what stock code cannot rebuild from the config, strictly parsed.

The file is untrusted input. It is parsed with bounds on every number and name before a tensor is
read, and then held against the tensors' own shapes before anything is allocated. Torch-free.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import SourceError
from .kv.scheme import KvCacheScheme
from .strict_json import parse_object

FILE_NAME = "compress.json"
VERSION = 1
MAX_BYTES = 32 * 2**20  # of the largest mixtures of experts, whose layers are 45,000

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=512)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Window = Annotated[int, Field(ge=1, le=64)]
Padding = Annotated[int, Field(ge=0, le=64)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
AttributeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=128)]
SurgeryAttribute = Literal[
    "num_attention_heads", "head_dim", "scaling",  # of transformers
    "heads", "inner_dim", "inner_kv_dim", "scale",  # of diffusers
]  # fmt: skip
Scale = Annotated[float, Field(gt=0.0, le=2.0**20, allow_inf_nan=False)]
FilePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=256)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ActivationScheme(_Strict):
    """How a layer's input is quantized.

    Attributes:
        bits: of an element.
        symmetric: False has a zero point.
        scope: what shares a scale. `token`: one per token over its channels, found while the model runs;
            `sample`: one per item of the batch, found while it runs (convolutions, whose patches overlap);
            `tensor`: one for everything, found by calibration and stored as the tensors
            `activation_scale` and, on an asymmetric grid, `activation_zero_point`.
    """

    bits: Literal[4, 6, 8]
    symmetric: bool = True
    scope: Literal["token", "sample", "tensor"] = "token"


class KernelScheme(_Strict):
    """The window of a convolution whose weight is stored as a matrix [out, in * height * width].

    Attributes:
        size, stride, padding, dilation: (height, width); zeros are padded.
    """

    size: tuple[Window, Window] = Field(strict=False)
    stride: tuple[Window, Window] = Field((1, 1), strict=False)
    padding: tuple[Padding, Padding] = Field((0, 0), strict=False)
    dilation: tuple[Window, Window] = Field((1, 1), strict=False)


class RotationScheme(_Strict):
    """Randomised Hadamard rotation of a layer's input in blocks of `block` channels.

    The +-1 signs are stored as the tensor `rotation_sign`; the Hadamard matrix itself is rebuilt
    from `block` by the construction `kind` names.
    """

    kind: Literal["hadamard"] = "hadamard"
    block: Width


class FirstToken(_Strict):
    """The first token of the text, whose output a layer stores because it is the same for every prompt.

    Attributes:
        sha256: of the token's channels as the layer reads them, float32; zeros in a plan. The token is
            stored as the tensor `first_token_input`, the output as `first_token_output`.
        encoders: path in the pipeline's folder -> SHA-256 of the weight files of the text encoders that
            the token came from; empty where they were not at hand.
    """

    sha256: Sha256
    encoders: dict[FilePath, Sha256] = Field(default_factory=dict, max_length=64)


class QuantizedModule(_Strict):
    """How one `nn.Linear` or `nn.Conv2d` is stored and executed; see `runtime.linear` and `runtime.conv`.

    Attributes:
        shape: (out_features, in_features); of a convolution (out, in * height * width of its kernel).
        bits: of a stored weight.
        group_size: input channels per weight scale; None is one scale per output channel.
        symmetric: False adds a `zero_point` tensor.
        activation: None leaves activations in floating point (weight-only).
        input_scale: the input is multiplied by the tensor `input_scale` first.
        rotation: applied after `input_scale`.
        low_rank: rank of the floating-point branch; 0 is none.
        bias: whether the layer has one; it stays in floating point.
        kernel: the window of a convolution; None for a linear layer.
        first_token: the output for this token is not computed but stored; None computes all tokens.
        method: the stage that made it.
        decided_by: the rule or pattern that chose the bits.
    """

    shape: tuple[Width, Width] = Field(strict=False)
    bits: Literal[2, 3, 4, 6, 8]
    group_size: Width | None = None
    symmetric: bool
    activation: ActivationScheme | None = None
    input_scale: bool = False
    rotation: RotationScheme | None = None
    low_rank: Annotated[int, Field(ge=0, le=2**12)] = 0
    bias: bool
    kernel: KernelScheme | None = None
    first_token: FirstToken | None = None
    method: Annotated[str, Field(max_length=64)]
    decided_by: Annotated[str, Field(max_length=256)] = "default"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight: [out, in], of a convolution [out, in, height, width]."""
        rows, columns = self.shape
        if self.kernel is None:
            return rows, columns
        height, width = self.kernel.size
        return rows, columns // (height * width), height, width

    @model_validator(mode="after")
    def _fits_its_kind(self) -> QuantizedModule:
        scope = self.activation.scope if self.activation else None
        if self.kernel is None:
            if scope == "sample":
                raise ValueError("activation.scope sample is for convolutions, and there is no kernel")
            return self
        pixels = self.kernel.size[0] * self.kernel.size[1]
        if self.shape[1] % pixels:
            raise ValueError(f"{self.shape[1]} columns are no multiple of the kernel's {pixels} pixels")
        if self.input_scale or self.rotation or self.low_rank or self.first_token:
            raise ValueError("a convolution has no input_scale, rotation, low_rank or first_token")
        if scope == "token":
            raise ValueError("activation.scope token is for linear layers: windows of a convolution overlap")
        return self

    @model_validator(mode="after")
    def _divides(self) -> QuantizedModule:
        columns = self.shape[1]
        block = self.rotation.block if self.rotation else None
        for label, width in (("group_size", self.group_size), ("rotation.block", block)):
            if width is not None and columns % width:
                raise ValueError(f"{label} {width} does not divide the {columns} input channels")
        return self

    @model_validator(mode="after")
    def _sums_fit(self) -> QuantizedModule:
        if self.activation is not None:
            width = self.group_size or self.shape[1]
            weight = _largest_level(self.bits, self.symmetric)
            if width * weight * _largest_level(self.activation.bits, self.activation.symmetric) >= 2**31:
                raise ValueError(
                    f"sums of {width} products of {self.bits} and {self.activation.bits} bits can leave the"
                    " 32 bits in which they are added up"
                )
        return self


def _largest_level(bits: int, symmetric: bool) -> int:
    """Return the greatest absolute value of an integer; one with its zero point in it may need 8 bits."""
    return 1 << (bits - 1) if symmetric else 128


class ModuleSurgery(_Strict):
    """What a module has otherwise than the stock class builds it from the config.

    Attributes:
        shapes: own parameter or stored buffer ("weight", "bias", "cls_token", ...) -> shape.
        attributes: what the module computes with: numbers of heads, channels of a head, scales.
    """

    shapes: dict[AttributeName, tuple[Width, ...]] = Field(default_factory=dict, max_length=64)
    attributes: dict[SurgeryAttribute, Width | Scale] = Field(default_factory=dict)

    @field_validator("shapes", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: tuple(shape) if isinstance(shape, list) else shape for name, shape in value.items()}


class HistoryEntry(_Strict):
    """One finished stage: what was done, with what, and what came out."""

    method: Annotated[str, Field(max_length=64)]
    settings: dict[str, Any]
    seed: int
    input_hash: Annotated[str, Field(max_length=128)]
    versions: dict[str, str]
    details: dict[str, Any] = Field(default_factory=dict)


class Manifest(_Strict):
    """The whole file.

    Attributes:
        surgery: module name -> what the config does not say of it; applied before layers are quantized.
        shared: name of a tensor that is not stored -> name of the stored tensor with equal content.
        kv_cache: how a language model's cache is compressed; its factors are stored below the attentions.
            None: it is not.
    """

    format: Literal["compress"] = "compress"
    version: Literal[1] = 1
    surgery: dict[Name, ModuleSurgery] = Field(default_factory=dict)
    quantization: dict[Name, QuantizedModule] = Field(default_factory=dict)
    shared: dict[Name, Name] = Field(default_factory=dict)
    kv_cache: KvCacheScheme | None = None
    history: tuple[HistoryEntry, ...] = Field((), strict=False)

    def to_json(self) -> str:
        """Return the file's text: sorted keys, so that equal manifests are equal bytes.

        Where nothing is cut there is no key `surgery`, and where the cache is not compressed no key
        `kv_cache`, as in manifests of before there were such stages.
        """
        document = self.model_dump(mode="json")
        for key in ("surgery", "kv_cache"):
            if not document[key]:
                del document[key]
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Parse the file's bytes.

        Raises:
            SourceError: naming `where` and the first thing that is wrong.
        """
        return cls.check(parse_object(data, where), where)

    @classmethod
    def check(cls, data: dict[str, Any], where: str) -> Manifest:
        """Check the file's JSON value.

        Raises:
            SourceError: naming `where` and the first thing that is wrong.
        """
        version = data.get("version")
        if isinstance(version, int) and version != VERSION:
            raise SourceError(
                f"{where}: manifest version {version}; this release reads version {VERSION}",
                hint="use the release of compress that wrote the folder",
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the document"
            raise SourceError(
                f"{where}: {place}: {first['msg']}", hint="the manifest was changed by hand or damaged"
            ) from None

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read `folder`'s manifest, or return None where it has none."""
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(f"{path}: {path.stat().st_size} bytes; a manifest has at most {MAX_BYTES}")
        return cls.parse(path.read_bytes(), str(path))
