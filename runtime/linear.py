"""The quantized linear layer: packed weights on disk, an integer product when it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import first_token, integer, packing, prepacked, static
from .manifest import QuantizedModule
from .rotation import Rotation

TensorShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
_OPTIONAL = (
    "zero_point", "bias", "input_scale", "rotation_sign", "low_rank_down", "low_rank_up",
    "activation_scale", "activation_zero_point", "first_token_input", "first_token_output",
)  # fmt: skip
_FLOAT_GRIDS = ("scale", "input_scale", "activation_scale", "first_token_input")


def tensor_shapes(scheme: QuantizedModule, dtype: torch.dtype) -> TensorShapes:
    """Return what a layer of this scheme stores: name -> (shape, dtype), in state-dict order.

    Args:
        scheme: of the layer.
        dtype: of the floating-point model around it (bias, low-rank branch).
    """
    rows, columns = scheme.shape
    groups = columns // scheme.group_size if scheme.group_size else 1
    packed = scheme.bits < 8
    shapes: TensorShapes = {
        "qweight": (
            (rows, packing.packed_width(columns, scheme.bits) if packed else columns),
            torch.uint8 if packed else torch.int8,
        ),
        "scale": ((rows, groups), torch.float16 if scheme.group_size else torch.float32),
    }
    if not scheme.symmetric:
        shapes["zero_point"] = ((rows, groups), torch.int8 if packed else torch.int16)
    if scheme.bias:
        shapes["bias"] = ((rows,), dtype)
    if scheme.input_scale:
        shapes["input_scale"] = ((columns,), torch.float32)
    if scheme.rotation:
        shapes["rotation_sign"] = ((columns,), torch.int8)
    if scheme.low_rank:
        shapes["low_rank_down"] = ((scheme.low_rank, columns), dtype)
        shapes["low_rank_up"] = ((rows, scheme.low_rank), dtype)
    if scheme.activation is not None and scheme.activation.scope == "tensor":
        shapes["activation_scale"] = ((1,), torch.float32)
        if not scheme.activation.symmetric:
            shapes["activation_zero_point"] = ((1,), torch.int16)
    if scheme.first_token is not None:
        shapes["first_token_input"] = ((columns,), torch.float32)
        shapes["first_token_output"] = ((rows,), dtype)
    return shapes


class Quantize(Protocol):
    """Quantizes rows; see `integer.quantize_tokens`."""

    def __call__(self, rows: Tensor, total: bool = False, *, unsigned: bool = False) -> integer.Tokens:
        """Return the rows as integers."""


class QuantizedLinear(nn.Module):
    """A linear layer with an integer weight: y = Q(x m R) W^^T + x down^T up^T + bias.

    Q quantizes per token (dynamic) or on one stored grid (static), m is `input_scale`, R the
    rotation; W^ = (q + z) scale lives in the transformed space. The low-rank branch acts on the raw
    input. Where the output for the first token is stored, the rest is done without it; see
    `first_token`. All tensors are buffers; see `tensor_shapes`. Works on the meta device; fill with
    `load_state_dict` or `from_tensors`.

    Args:
        scheme: how it is stored and executed.
        dtype: of bias, low-rank branch and stored output.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    rotation_sign: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None
    activation_scale: Tensor | None
    activation_zero_point: Tensor | None
    first_token_input: Tensor | None
    first_token_output: Tensor | None

    def __init__(self, scheme: QuantizedModule, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = scheme.shape
        shapes = tensor_shapes(scheme, dtype)
        for name, (shape, kind) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind))
        for name in _OPTIONAL:
            if name not in shapes:
                self.register_buffer(name, None)
        self._forget()

    @classmethod
    def from_tensors(cls, scheme: QuantizedModule, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Self:
        """Build a layer around existing tensors, without copying them.

        Raises:
            ValueError: a tensor is missing, unexpected, or of another shape or dtype.
        """
        shapes = tensor_shapes(scheme, dtype)
        if set(shapes) != set(tensors):
            raise ValueError(f"tensors {sorted(tensors)}; this scheme stores {sorted(shapes)}")
        with torch.device("meta"):
            layer = cls(scheme, dtype)
        for name, (shape, kind) in shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != kind:
                raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}; expected {shape} {kind}")
            setattr(layer, name, tensor.detach().contiguous())
        return layer

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the stored weight tensor."""
        return self.qweight.dtype

    def _forget(self) -> None:
        """Drop what is derived from the buffers; it is derived again when needed."""
        self._weight: integer.IntegerWeight | None = None
        self._packed: prepacked.PackedWeight | None = None
        self._rotation: Rotation | None = None
        self._scaled_sign: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # `.half()` and `.to(dtype)` reach every floating buffer; the grids must stay what they are.
        kept = {name: getattr(self, name) for name in _FLOAT_GRIDS}
        result: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        self._forget()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        derived = {"_weight": None, "_packed": None, "_rotation": None, "_scaled_sign": None}
        return {**self.__dict__, **derived}

    def levels(self) -> Tensor:
        """Return the stored integers q: int8 [out, in]."""
        if self.scheme.bits == 8:
            return self.qweight
        return packing.unpack(self.qweight, self.scheme.bits, self.in_features)

    def dequantized_weight(self) -> Tensor:
        """Return W^ = (q + z) * scale in the transformed space: float32 [out, in]."""
        level = self.levels().float().view(self.out_features, self.scale.shape[1], -1)
        if self.zero_point is not None:
            level += self.zero_point.float().unsqueeze(-1)
        level *= self.scale.float().unsqueeze(-1)
        return level.view(self.out_features, self.in_features)

    def equivalent_weight(self) -> Tensor:
        """Return the weight that acts on the raw input, without activation rounding: float32 [out, in]."""
        weight = self.dequantized_weight()
        if self.scheme.rotation:
            weight = self._rotate().inverse(weight)
        if self.input_scale is not None:
            weight = weight * self.input_scale
        if self.low_rank_down is not None and self.low_rank_up is not None:
            weight = weight + self.low_rank_up.float() @ self.low_rank_down.float()
        return weight

    def _rotate(self) -> Rotation:
        if self._rotation is None:
            assert self.scheme.rotation is not None
            assert self.rotation_sign is not None
            self._rotation = Rotation(self.rotation_sign, self.scheme.rotation.block)
        return self._rotation

    def transformed(self, x: Tensor) -> Tensor:
        """Scale and rotate x [M, in] as before it is quantized; float32 if either is done, else untouched."""
        if self.scheme.rotation is None:
            return x if self.input_scale is None else x * self.input_scale
        rotation = self._rotate()
        if self._scaled_sign is None and self.input_scale is not None:
            self._scaled_sign = rotation.sign * self.input_scale
        return rotation(x, self._scaled_sign)

    def _low_rank(self, x: Tensor) -> Tensor:
        """Return the floating-point branch of x [M, in]: [M, out]."""
        assert self.low_rank_down is not None
        assert self.low_rank_up is not None
        return F.linear(F.linear(x, self.low_rank_down.to(x.dtype)), self.low_rank_up.to(x.dtype))

    def quantize_rows(self, rows: Tensor, total: bool = False, *, unsigned: bool = False) -> integer.Tokens:
        """Quantize what the product reads, as the scheme says.

        Args:
            rows: [M, in], transformed; of a convolution [items, any].
            total, unsigned: as in `integer.quantize_tokens`.

        Returns:
            As `integer.quantize_tokens`.
        """
        activation = self.scheme.activation
        assert activation is not None
        if self.activation_scale is None:
            return integer.quantize_tokens(
                rows, activation.bits, activation.symmetric, total, unsigned=unsigned
            )
        return static.quantize(
            rows, self.activation_scale, self.activation_zero_point, activation.bits, total, unsigned=unsigned
        )

    def _each_by_itself(self, rows: Tensor, total: bool = False, *, unsigned: bool = False) -> integer.Tokens:
        """Quantize rows [M, in] with a scale each, whatever the scheme says."""
        activation = self.scheme.activation
        assert activation is not None
        return integer.quantize_tokens(rows, activation.bits, activation.symmetric, total, unsigned=unsigned)

    @contextmanager
    def floating_input(self) -> Iterator[None]:
        """Leave the input in floating point for a while; the weight is the quantized one."""
        scheme = self.scheme
        try:
            self.scheme = scheme.model_copy(update={"activation": None})
            self._forget()  # a weight is laid out for the grid of the input
            yield
        finally:
            self.scheme = scheme
            self._forget()

    def reference_rows(self, rows: Tensor) -> Tensor:
        """Do `reference_forward` for rows [M, in] of which none is a first token that the layer stores."""
        return self._reference(rows, self.quantize_rows)

    def reference_forward(self, x: Tensor) -> Tensor:
        """Compute with rounded floats in float32: what `forward` must reproduce.

        Args:
            x: [..., in] float.

        Returns:
            float32 [..., out].
        """
        if self.first_token_input is None or self.first_token_output is None:
            return self._reference(x, self.quantize_rows)
        return first_token.around(
            x,
            self.first_token_input,
            self.first_token_output.float(),
            partial(self._reference, quantize=self.quantize_rows),
            partial(self._reference, quantize=self._each_by_itself),
        ).float()

    def _reference(self, x: Tensor, quantize: Quantize) -> Tensor:
        rows = self.transformed(x.reshape(-1, self.in_features)).float()
        if self.scheme.activation is not None:
            rows = integer.dequantized(quantize(rows))
        bias = None if self.bias is None else self.bias.float()
        y = F.linear(rows, self.dequantized_weight(), bias)
        if self.low_rank_down is not None:
            y = y + self._low_rank(x.reshape(-1, self.in_features).float())
        return y.view(*x.shape[:-1], self.out_features)

    def _lay_out(self) -> integer.IntegerWeight:
        activation = self.scheme.activation
        token_zero = activation is not None and activation.bits == 8 and not activation.symmetric
        return integer.integer_weight(
            self.levels(), self.scale, self.zero_point, self.scheme.bits, token_zero
        )

    def _laid_out(self) -> integer.IntegerWeight:
        if self._weight is None:
            self._weight = self._lay_out()
        return self._weight

    def _prepacked(self, x: Tensor) -> prepacked.PackedWeight | None:
        """Return the weight in the layout that is fastest for x [M, in]; None where there is none."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or self.scale.shape[1] > 1:
            return None
        if self._packed is None and self.in_features <= prepacked.MOST_COLUMNS and prepacked.is_available():
            self._packed = prepacked.pack(self._lay_out(), self.bias)
        return self._packed

    def _weight_only(self, rows: Tensor) -> Tensor:
        """Multiply by a weight that is turned into floats for this call alone: float32 [M, out]."""
        weight = self._laid_out()
        if weight.scale.shape[0] > 1:
            return F.linear(rows.float(), self.dequantized_weight(), None)
        y = integer.float_linear(rows, weight.q)
        if weight.zero is not None:
            y.addcmul_(rows.sum(dim=-1, keepdim=True, dtype=torch.float32), weight.zero)
        return y.mul_(weight.scale)

    def _integer(self, rows: Tensor, quantize: Quantize, dtype: torch.dtype) -> Tensor:
        """Quantize rows [M, in] and multiply: [M, out] in `dtype`."""
        packed = self._prepacked(rows)
        if packed is not None:
            return prepacked.multiply(quantize(rows, unsigned=True), packed, dtype)
        weight = self._laid_out()
        total = weight.zero is not None and weight.scale.shape[0] == 1
        return integer.linear(quantize(rows, total), weight, self.bias, dtype)

    def _compute(self, x: Tensor, quantize: Quantize) -> Tensor:
        raw = x.reshape(-1, self.in_features)
        rows = self.transformed(raw)
        if self.scheme.activation is None:
            y = self._weight_only(rows)
            if self.bias is not None:
                y = y + self.bias
        else:
            y = self._integer(rows, quantize, torch.float32 if self.scheme.low_rank else x.dtype)
        if self.low_rank_down is not None:
            y = y + self._low_rank(raw)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Compute with integer products.

        Args:
            x: [..., in] float32, float16 or bfloat16; [..., tokens, in] where the output for the first
                token is stored.

        Returns:
            [..., out] in x's dtype.

        Raises:
            ValueError: the output for the first token is stored, and x has no axis of tokens.
        """
        if self.first_token_input is None or self.first_token_output is None:
            return self._compute(x, self.quantize_rows)
        return first_token.around(
            x,
            self.first_token_input,
            self.first_token_output,
            partial(self._compute, quantize=self.quantize_rows),
            partial(self._compute, quantize=self._each_by_itself),
        )

    def extra_repr(self) -> str:
        """Describe the scheme in one line."""
        activation = f"A{self.scheme.activation.bits}" if self.scheme.activation else "A16"
        static_grid = "" if self.activation_scale is None else " static"
        stored = "" if self.first_token_output is None else ", first token stored"
        return (
            f"{self.in_features}, {self.out_features}, W{self.scheme.bits}{activation}{static_grid}{stored}"
        )
