"""Swin Transformer (arXiv 2103.14030), `SwinForImageClassification`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf, nextafter
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.manifest import ModuleSurgery
from ..runtime.vision_sizes import SwinShape, swin_shape
from .base import FoldGroup, Role, Shapes
from .classifier import ATTENTION_ROLES, ImageClassifier
from .native_config import Attributes, PrunedSizes, attention_attributes
from .structure import PrunableStructure
from .transformer import fold_into_norm, product_macs

_STAGES = "swin.encoder.layers"
_TABLE = "relative_position_bias.relative_position_bias_table"


class SwinFamily(ImageClassifier):
    """Adapter."""

    name = "swin"
    class_names = ("SwinForImageClassification",)
    roles = ATTENTION_ROLES
    inner = "mlp.fc1"

    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks of all stages in forward order."""
        return [
            (f"{_STAGES}.{stage}.blocks.{name}", block)
            for stage, child in module.get_submodule(_STAGES).named_children()
            for name, block in child.get_submodule("blocks").named_children()
        ]

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the norms before attention, feed-forward network and merging, and into V."""
        merging = [fold_into_norm([f"{name}.reduction"], f"{name}.norm") for name, _ in merges(module)]
        return self.attention_folds(module) + merging

    def positions(self, config: Mapping[str, Any]) -> Callable[[str], int]:
        """Tokens of the stage; of its windows, padding included, inside attentions."""
        shape = swin_shape(config)
        grids = shape.grids

        def count(name: str) -> int:
            if name.startswith("swin.embeddings."):
                return grids[0][0] * grids[0][1]
            if not name.startswith(_STAGES):
                return 1
            stage = int(name.removeprefix(f"{_STAGES}.").split(".")[0])
            if ".downsample." in name:
                return grids[stage + 1][0] * grids[stage + 1][1]
            if ".attention." in name:
                return _window_count(shape, grids[stage]) * shape.window**2
            return grids[stage][0] * grids[stage][1]

        return count

    def product_macs(self, config: Mapping[str, Any], sizes: Shapes) -> int:
        """Count within every window of every block."""
        shape = swin_shape(config)
        area, count = shape.window**2, 0
        for stage, (grid, depth) in enumerate(zip(shape.grids, shape.depths, strict=True)):
            for index in range(depth):
                channels = sizes[f"{_STAGES}.{stage}.blocks.{index}.attention.q_proj.weight"][0]
                count += _window_count(shape, grid) * product_macs(area, area, channels)
        return count

    def native_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say the first stage's width, heads per stage and a ratio of inner widths, where these say all."""
        sizes = PrunedSizes.of(config, surgery, _attributes(config))
        names = [f"{_STAGES}.{stage}.blocks.0" for stage in range(len(swin_shape(config).depths))]
        width = sizes.shapes["swin.embeddings.norm.weight"][0]
        ratio = sizes.shapes[f"{names[0]}.mlp.fc1.weight"][0] / width
        native = {
            **config,
            "embed_dim": width,
            "num_heads": [
                int(sizes.attributes[f"{name}.attention"]["num_attention_heads"]) for name in names
            ],
            "hidden_size": width * 2 ** (len(names) - 1),
        }
        # Stock code rounds the product of ratio and width down, and a quotient may be a little too small.
        for mlp_ratio in (ratio, nextafter(ratio, inf)):
            found = {**native, "mlp_ratio": mlp_ratio}
            if sizes.are_said_by(found, _attributes(found)):
                return found
        return None

    def padded_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say the least numbers of heads, and the least ratio of inner widths, in which all blocks fit."""
        sizes = PrunedSizes.of(config, surgery, _attributes(config))
        shape = swin_shape(config)
        width = sizes.shapes["swin.embeddings.norm.weight"][0]
        heads, ratio = [], 0.0
        for stage, depth in enumerate(shape.depths):
            blocks = [f"{_STAGES}.{stage}.blocks.{index}" for index in range(depth)]
            wide = width * 2**stage
            if any(sizes.shapes[f"{block}.layernorm_before.weight"] != (wide,) for block in blocks):
                return None  # stock stages are twice as wide as the one before
            attentions = [sizes.attributes[f"{block}.attention"] for block in blocks]
            found = _heads_with_room(wide, attentions)
            if found is None:
                return None
            heads.append(found)
            inner = max(sizes.shapes[f"{block}.mlp.fc1.weight"][0] for block in blocks)
            ratio = max(
                ratio, inner / wide if int(inner / wide * wide) >= inner else nextafter(inner / wide, inf)
            )
        hidden = width * 2 ** (len(heads) - 1)
        return {**config, "embed_dim": width, "num_heads": heads, "hidden_size": hidden, "mlp_ratio": ratio}

    def structure(self, module: nn.Module) -> PrunableStructure:
        """Width of the stages, heads, their channels, and inner channels of the feed-forward networks.

        Nothing is removed from the tables of position biases but the columns of heads that go.
        """
        sites = self.attention_sites(module, _TABLE)
        tables = tuple(site.table for site in sites if site.table is not None)
        return PrunableStructure(sites, self.inner_linears(module), (*self.classifiers(module), *tables))

    @contextmanager
    def traceable(self, module: nn.Module) -> Iterator[None]:
        """Let the merging of patches pick from cells of two by two instead of slicing with strides.

        A trace takes axis 1 of the slices for channels, and they are rows.
        """
        changed = [child for _, child in merges(module)]
        for child in changed:
            child.forward = partial(_merge, child)
        try:
            yield
        finally:
            for child in changed:
                del child.forward  # the class's own method again

    def _places(self, module: nn.Module) -> list[tuple[str, Role, int | None]]:
        """Put the merging of patches behind the blocks of its stage."""
        places: list[tuple[str, Role, int | None]] = []
        last = None
        for name, role, index in super()._places(module):
            stage = name.removeprefix(f"{_STAGES}.").split(".")[0]
            if last is not None and stage != last:
                places.append((f"{_STAGES}.{last}.downsample.reduction", "projection", None))
            last = stage
            places.append((name, role, index))
        return places


def _heads_with_room(width: int, attentions: Sequence[Mapping[str, int | float]]) -> int | None:
    """Return the least number of equal heads that fill a width and hold all heads of some attentions."""
    least = max(int(attention["num_attention_heads"]) for attention in attentions)
    channels = max(int(attention["head_dim"]) for attention in attentions)
    fitting = (count for count in range(least, width // channels + 1) if width % count == 0)
    return next(fitting, None)


def _attributes(config: Mapping[str, Any]) -> Attributes:
    """Return what the stock attentions of a config compute with."""
    shape = swin_shape(config)
    return {
        f"{_STAGES}.{stage}.blocks.{index}.attention": attention_attributes(heads, width // heads)
        for stage, (heads, width) in enumerate(zip(shape.heads, shape.widths, strict=True))
        for index in range(shape.depths[stage])
    }


def merges(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules that merge patches between stages, with their names."""
    return [
        (f"{_STAGES}.{stage}.downsample", child.downsample)
        for stage, child in module.get_submodule(_STAGES).named_children()
        if child.downsample is not None
    ]


def _merge(merging: Any, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    """Compute what SwinPatchMerging computes, without strided slices.

    Args:
        merging: the stock module.
        input_feature: [batch, height * width, channels].
        input_dimensions: (height, width); odd ones are padded with zeros.

    Returns:
        [batch, ceil(height / 2) * ceil(width / 2), 2 * channels].
    """
    height, width = input_dimensions
    batch, _, channels = input_feature.shape
    image = merging.maybe_pad(input_feature.view(batch, height, width, channels), height, width)
    rows, columns = image.shape[1] // 2, image.shape[2] // 2
    # The slices are stacked column by column, and row by row inside a column.
    cells = image.view(batch, rows, 2, columns, 2, channels)
    stacked = torch.cat([cells[:, :, row, :, column] for column in (0, 1) for row in (0, 1)], dim=-1)
    result: Tensor = merging.reduction(merging.norm(stacked.view(batch, rows * columns, 4 * channels)))
    return result


def _window_count(shape: SwinShape, grid: tuple[int, int]) -> int:
    return -(-grid[0] // shape.window) * -(-grid[1] // shape.window)
