"""What the adapters of diffusion transformers share: naming roles, folding scales, counting work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.manifest import QuantizedModule
from .base import Family, FoldGroup, LinearSite, Role

RoleRule = tuple[str, Role]
TEXT_BLOCK_ROLES: Sequence[RoleRule] = (
    (r"attn1\.to_q", "attention.q"),
    (r"attn1\.to_k", "attention.k"),
    (r"attn1\.to_v", "attention.v"),
    (r"attn1\.to_out\.0", "attention.out"),
    (r"attn2\.to_q", "cross.q"),
    (r"attn2\.to_k", "cross.k"),
    (r"attn2\.to_v", "cross.v"),
    (r"attn2\.to_out\.0", "cross.out"),
    (r"ff\.net\.0\.proj", "ff.in"),
    (r"ff\.net\.2", "ff.out"),
)
"""Of a block that attends to the image, then to the text."""


class DiffusionTransformer(Family):
    """Base of the adapters: blocks in one list or several, roles by the end of a linear's name.

    Attributes:
        block_lists: names of the lists of blocks, in forward order.
        roles: (regular expression for the end of the name, role), in the order of computation; the
            order within a block, and of the linears outside the blocks, follows it.
        before_blocks, after_blocks: names of the top-level modules with linears, in forward order.
        attention_names: attention modules of a block, in forward order.
    """

    roles: ClassVar[Sequence[RoleRule]]
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    before_blocks: ClassVar[tuple[str, ...]] = ()
    after_blocks: ClassVar[tuple[str, ...]] = ()
    attention_names: ClassVar[tuple[str, ...]]

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module."""
        import diffusers

        module: nn.Module = getattr(diffusers, self.class_names[0])(**stock_arguments(config))
        return module

    def linears(self, module: nn.Module) -> list[LinearSite]:
        """Every linear in forward order with its role, quantized ones included.

        Raises:
            KeyError: a linear whose name no rule covers: the stock class has changed.
        """
        found: list[tuple[tuple[int, int, int], LinearSite]] = []
        numbers = {name: number for number, (name, _) in enumerate(self.blocks(module))}
        for name, shape in linear_shapes(module):
            block = numbers.get(".".join(name.split(".")[:2]))
            rank = self._rank(name)
            stage = 1 if block is not None else 0 if name.split(".")[0] in self.before_blocks else 2
            found.append(((stage, block or 0, rank), LinearSite(name, self.roles[rank][1], block, shape)))
        return [site for _, site in sorted(found, key=lambda item: item[0])]

    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks of all lists in forward order."""
        return [
            (f"{blocks}.{name}", block)
            for blocks in self.block_lists
            for name, block in module.get_submodule(blocks).named_children()
        ]

    def attentions(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The attention modules in forward order."""
        return [
            (f"{block_name}.{name}", attention)
            for block_name, block in self.blocks(module)
            for name in self.attention_names
            if (attention := getattr(block, name, None)) is not None
        ]

    def replicas(self, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """No tensor is a copy of another one."""
        return []

    def _rank(self, name: str) -> int:
        for rank, (ending, _) in enumerate(self.roles):
            if re.search(rf"(?:^|\.){ending}$", name):
                return rank
        raise KeyError(f"{name}: no role is known for this linear of a {type(self).__name__}")


def stock_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that only describe it (`_class_name`, ...)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def linear_shapes(module: nn.Module) -> Iterable[tuple[str, tuple[int, int]]]:
    """Yield name and (out_features, in_features) of every linear, quantized ones included."""
    for name, child in module.named_modules():
        scheme = getattr(child, "scheme", None)
        if isinstance(scheme, QuantizedModule):
            yield name, scheme.shape
        elif isinstance(child, nn.Linear):
            yield name, (child.out_features, child.in_features)


def config_of(module: nn.Module) -> Any:
    """Return a stock module's config: a mapping whose keys are attributes as well."""
    return module.config


def reference_of(module: nn.Module) -> Tensor:
    """Return a floating-point parameter: inputs take its dtype and device."""
    return next(parameter for parameter in module.parameters() if parameter.is_floating_point())


def random_normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw N(0, 1) float32 on the generator's device and convert to `like`'s dtype and device."""
    drawn = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return drawn.to(device=like.device, dtype=like.dtype)


def random_integers(high: int, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw int64 [count] uniformly from [0, high)."""
    drawn = torch.randint(high, (count,), generator=generator, device=generator.device)
    return drawn.to(like.device)


# --- folding ------------------------------------------------------------------------------------


@torch.no_grad()
def scale_rows(linear: nn.Linear, factor: Tensor, start: int = 0) -> None:
    """Multiply rows `start : start + len(factor)` of a linear, and their biases, by `factor`.

    Computed in float32 and rounded once to the linear's dtype.
    """
    rows = slice(start, start + factor.numel())
    m = factor.detach().to(device=linear.weight.device, dtype=torch.float32)
    linear.weight[rows] = (linear.weight[rows].float() * m[:, None]).to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[rows] = (linear.bias[rows].float() * m).to(linear.bias.dtype)


@torch.no_grad()
def scale_modulation(linear: nn.Linear, factor: Tensor, *, shift_chunk: int, scale_chunk: int) -> None:
    """Make norm(x) * (1 + scale) + shift come out multiplied by `factor`, per channel.

    The linear computes (..., shift, scale, ...) in chunks of len(factor): shift * m is a scaling of its
    rows; 1 + scale' = (1 + scale) * m needs W' = W * m and b' = (b + 1) * m - 1.
    """
    width = factor.numel()
    scale_rows(linear, factor, shift_chunk * width)
    scale_rows(linear, factor, scale_chunk * width)
    m = factor.detach().to(device=linear.bias.device, dtype=torch.float32)
    rows = slice(scale_chunk * width, (scale_chunk + 1) * width)
    linear.bias[rows] = (linear.bias[rows].float() + m - 1.0).to(linear.bias.dtype)


def fold_into_modulation(
    targets: Iterable[str], producer: str, shift_chunk: int, scale_chunk: int
) -> FoldGroup:
    """Describe a fold into the shift and scale rows of the adaptive norm `producer`."""
    absorb: Callable[[nn.Module, Tensor], None] = partial(
        _absorb_modulation, producer=producer, shift_chunk=shift_chunk, scale_chunk=scale_chunk
    )
    return FoldGroup(tuple(targets), absorb, (producer,))


def fold_into_rows(targets: Iterable[str], producers: Iterable[str]) -> FoldGroup:
    """Describe a fold into the output rows of `producers`, as attention's values allow."""
    names = tuple(producers)
    return FoldGroup(tuple(targets), partial(_absorb_rows, producers=names), names)


def fold_into_norm(targets: Iterable[str], norm: str) -> FoldGroup:
    """Describe a fold into the weight, and the bias where there is one, that a norm ends with."""
    return FoldGroup(tuple(targets), partial(_absorb_norm, norm=norm), (norm,))


@torch.no_grad()
def _absorb_norm(module: nn.Module, factor: Tensor, *, norm: str) -> None:
    """Multiply weight and bias of a norm, in float32 and rounded once to their dtype."""
    for values in module.get_submodule(norm).parameters(recurse=False):
        m = factor.detach().to(device=values.device, dtype=torch.float32)
        values.copy_((values.float() * m).to(values.dtype))


def _absorb_modulation(
    module: nn.Module, factor: Tensor, *, producer: str, shift_chunk: int, scale_chunk: int
) -> None:
    scale_modulation(_linear(module, producer), factor, shift_chunk=shift_chunk, scale_chunk=scale_chunk)


def _absorb_rows(module: nn.Module, factor: Tensor, *, producers: tuple[str, ...]) -> None:
    for producer in producers:
        scale_rows(_linear(module, producer), factor)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name}: a scale can be folded only before this layer is quantized")
    return linear


# --- multiply-accumulates -----------------------------------------------------------------------


def width_of(config: Mapping[str, Any]) -> int:
    """Channels of the hidden states."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def image_tokens(config: Mapping[str, Any]) -> int:
    """Patches of one image at the reference size."""
    return int(config["sample_size"] // config["patch_size"]) ** 2


def patch_macs(config: Mapping[str, Any]) -> int:
    """MACs of cutting one image into patches."""
    return (
        image_tokens(config) * width_of(config) * int(config["in_channels"]) * int(config["patch_size"]) ** 2
    )


def unpatch_macs(config: Mapping[str, Any]) -> int:
    """MACs of the last linear, from hidden states to pixels."""
    out_channels = config["out_channels"] or config["in_channels"]
    return image_tokens(config) * width_of(config) * int(out_channels) * int(config["patch_size"]) ** 2


def mlp_macs(in_features: int, width: int) -> int:
    """MACs of a two-layer embedder for one vector."""
    return in_features * width + width * width


def feed_forward_macs(tokens: int, width: int, *, gated: bool = False, inner: int | None = None) -> int:
    """MACs of a feed-forward network with `inner` channels inside, 4 * `width` unless told otherwise."""
    inner = 4 * width if inner is None else inner
    return tokens * width * inner * (3 if gated else 2)


def product_macs(queries: int, keys: int, width: int) -> int:
    """MACs of Q K^T and of the weighted sum of V, over all heads."""
    return 2 * queries * keys * width
