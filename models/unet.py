"""U-Nets of Stable Diffusion 1.x, 2.x and XL (arXiv 2112.10752, 2307.01952): `UNet2DConditionModel`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.config_unet import TIME_IDS, per_stage
from ..runtime.manifest import KernelScheme, QuantizedModule
from .base import AS_CONFIGURED, Family, FoldGroup, LinearSite, Role, Shapes
from .latent_sizes import PIXELS_PER_LATENT
from .transformer import (
    TEXT_BLOCK_ROLES,
    config_of,
    fold_into_norm,
    fold_into_rows,
    random_integers,
    random_normal,
    reference_of,
    stock_arguments,
)
from .unet_shapes import TEXT_TOKENS, text_vector_width, unet_macs

_STAGE = re.compile(r"(down_blocks\.|mid_block|up_blocks\.)(\d*)")
_UNIT = re.compile(r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
_BEFORE = ("time_embedding", "add_embedding", "conv_in")
_PARTS = ("down_blocks.", "mid_block", "up_blocks.")


class UNetFamily(Family):
    """Adapter. The reference input is one latent image of the config's `sample_size` and 77 text tokens.

    Convolutions are sites as linears are, with their window in `kernel`. `time_emb_proj` has the role
    `adaln`: it is the one place where the timestep enters a residual network, as modulation does in a
    transformer; it sees one vector a sample, and its error reaches every position alike.

    Attributes:
        roles: (regular expression for the end of the name, role).
    """

    name = "unet"
    class_names = ("UNet2DConditionModel",)
    latents = "sample"
    roles: ClassVar[Sequence[tuple[str, Role]]] = (
        (r"(?:time|add)_embedding\.linear_[12]", "embedder"),
        (r"conv_in", "embedder"),
        (r"time_emb_proj", "adaln"),
        (r"conv[12]", "conv"),
        (r"conv_shortcut", "conv.shortcut"),
        (r"(?:down|up)samplers\.0\.conv", "conv"),
        (r"proj_(?:in|out)", "projection"),
        *TEXT_BLOCK_ROLES,
        (r"conv_out", "head"),
    )

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module."""
        import diffusers

        return diffusers.UNet2DConditionModel(**stock_arguments(config))

    def linears(self, module: nn.Module) -> list[LinearSite]:
        """Every linear and convolution in forward order with its role, quantized ones included.

        Raises:
            KeyError: a layer whose name no rule covers: the stock class has changed.
        """
        indices = {name: index for index, (name, _) in enumerate(self.blocks(module))}
        sites = []
        for name, shape, kernel in _layers(module):
            stage = _STAGE.match(name)
            block = indices[stage[0]] if stage else None
            sites.append(LinearSite(name, self._role(name), block, shape, kernel))
        # Within a unit the stock modules are registered in the order in which they run.
        return sorted(sites, key=lambda site: _order(site.name))

    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The stages in forward order: the way down, the middle where there is one, the way up."""
        found = []
        for part in ("down_blocks", "mid_block", "up_blocks"):
            child = module.get_submodule(part) if getattr(module, part) is not None else None
            if isinstance(child, nn.ModuleList):
                found += [(f"{part}.{index}", stage) for index, stage in enumerate(child)]
            elif child is not None:
                found.append((part, child))
        return found

    def attentions(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The self- and cross-attention modules in forward order."""
        names = [name for name, _ in module.named_modules() if re.search(r"\.attn[12]$", name)]
        return [(name, module.get_submodule(name)) for name in sorted(names, key=_order)]

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the affine norms before attention and feed-forward, into V, and into the GEGLU.

        A GEGLU computes value * gelu(gate), so its value half absorbs any scale of what follows. The input
        of a convolution comes from a SiLU, which no scale passes; `proj_in` reads a norm, which absorbs
        one where it is linear.
        """
        groups = []
        linear = bool(config_of(module).use_linear_projection)
        for name, _ in sorted(module.named_modules(), key=lambda item: _order(item[0])):
            if linear and re.search(r"\.attentions\.\d+$", name):
                groups.append(fold_into_norm([f"{name}.proj_in"], f"{name}.norm"))
            elif re.search(r"\.transformer_blocks\.\d+$", name):
                groups += _block_folds(name)
        return groups

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random latents [batch, C, H, W], text states [batch, 77, C], timesteps; for SDXL sizes as well."""
        config, like = config_of(module), reference_of(module)
        side, text = config.sample_size, per_stage(config, "cross_attention_dim")[0]
        inputs: dict[str, Any] = {
            "sample": random_normal((batch, config.in_channels, side, side), like, generator),
            "timestep": random_integers(1000, batch, like, generator),
            "encoder_hidden_states": random_normal((batch, TEXT_TOKENS, text), like, generator),
        }
        if config.addition_embed_type is not None:
            pooled = random_normal((batch, text_vector_width(config, TIME_IDS)), like, generator)
            sizes = time_ids(side * PIXELS_PER_LATENT, batch).to(like)
            inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        return inputs

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward, convolutions and embedders included."""
        return unet_macs(config, attention_products=attention_products)

    def replicas(self, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """No tensor is a copy of another one."""
        return []

    def default_keep(self) -> tuple[str, ...]:
        """Embedders, first and last convolution: 0.3 % of SDXL's weights, and all signal passes them."""
        return ("time_embedding.*", "add_embedding.*", "conv_in", "conv_out")

    def _role(self, name: str) -> Role:
        for ending, role in self.roles:
            if re.search(rf"(?:^|\.){ending}$", name):
                return role
        raise KeyError(f"{name}: no role is known for this layer of a {self.class_names[0]}")


def time_ids(pixels: int, batch: int) -> Tensor:
    """Return SDXL's sizes for whole square images: [batch, 6] float32.

    Args:
        pixels: side of the image.
        batch: images.
    """
    row = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32)
    return row.repeat(batch, 1)


def _layers(module: nn.Module) -> Iterator[tuple[str, tuple[int, int], KernelScheme | None]]:
    for name, child in module.named_modules():
        scheme = getattr(child, "scheme", None)
        if isinstance(scheme, QuantizedModule):
            yield name, scheme.shape, scheme.kernel
        elif isinstance(child, nn.Linear):
            yield name, (child.out_features, child.in_features), None
        elif isinstance(child, nn.Conv2d):
            columns = child.weight[0].numel()
            yield name, (child.out_channels, columns), _kernel(child)


def _kernel(conv: nn.Conv2d) -> KernelScheme:
    pairs = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    size = (conv.kernel_size[0], conv.kernel_size[1])
    return KernelScheme.model_validate({"size": size, **pairs})


def _order(name: str) -> tuple[int, int, float, int]:
    """Return what sorts layers into forward order: part, stage, place in the stage, kind of unit."""
    if name.split(".")[0] in _BEFORE:
        return (0, _BEFORE.index(name.split(".")[0]), 0, 0)
    stage, unit = _STAGE.match(name), _UNIT.search(f"{name}.")
    if stage is None:
        return (4, 0, 0, 0)
    kind, place = (unit[1], float(unit[2])) if unit else ("resnets", 0.0)
    if kind in ("downsamplers", "upsamplers"):
        place = float("inf")
    return (1 + _PARTS.index(stage[1]), int(stage[2] or 0), place, kind == "attentions")


def _block_folds(block: str) -> list[FoldGroup]:
    return [
        fold_into_norm([f"{block}.attn1.to_{letter}" for letter in "qkv"], f"{block}.norm1"),
        fold_into_rows([f"{block}.attn1.to_out.0"], [f"{block}.attn1.to_v"]),
        fold_into_norm([f"{block}.attn2.to_q"], f"{block}.norm2"),
        fold_into_rows([f"{block}.attn2.to_out.0"], [f"{block}.attn2.to_v"]),
        fold_into_norm([f"{block}.ff.net.0.proj"], f"{block}.norm3"),
        # The factor is as long as half the rows, the first of which are the values.
        fold_into_rows([f"{block}.ff.net.2"], [f"{block}.ff.net.0.proj"]),
    ]
