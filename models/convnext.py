"""ConvNeXt (arXiv 2201.03545), `ConvNextForImageClassification`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..runtime.manifest import ModuleSurgery
from ..runtime.vision_sizes import convnext_shape
from .base import FoldGroup
from .classifier import ImageClassifier
from .native_config import PrunedSizes
from .structure import PrunableStructure
from .transformer import fold_into_norm

_STAGES = "convnext.encoder.stages"


class ConvNextFamily(ImageClassifier):
    """Adapter."""

    name = "convnext"
    class_names = ("ConvNextForImageClassification",)
    roles = (("pwconv1", "ff.in"), ("pwconv2", "ff.out"))
    inner = "pwconv1"

    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks of all stages in forward order."""
        return [
            (f"{_STAGES}.{stage}.layers.{name}", block)
            for stage, child in module.get_submodule(_STAGES).named_children()
            for name, block in child.get_submodule("layers").named_children()
        ]

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the norm of every block; the input of pwconv2 comes from a GELU."""
        return [
            fold_into_norm([f"{block}.pwconv1"], f"{block}.layernorm") for block, _ in self.blocks(module)
        ]

    def positions(self, config: Mapping[str, Any]) -> Callable[[str], int]:
        """Pixels of the stage that a layer writes to, one for the classifier."""
        shape = convnext_shape(config)
        pixels = [height * width for height, width in shape.grids]

        def count(name: str) -> int:
            if name.startswith(_STAGES):
                return pixels[int(name.removeprefix(f"{_STAGES}.").split(".")[0])]
            return pixels[0] if name.startswith("convnext.embeddings.") else 1

        return count

    def native_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say the widths of the stages, where all inner widths are four times theirs."""
        sizes = PrunedSizes.of(config, surgery, {})
        widths = [
            sizes.shapes[f"{_STAGES}.{stage}.layers.0.dwconv.weight"][0]
            for stage in range(len(convnext_shape(config).depths))
        ]
        native = {**config, "hidden_sizes": widths}
        return native if sizes.are_said_by(native, {}) else None

    def padded_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say the widths of the stages; none where an inner width is more than four times its stage's."""
        sizes = PrunedSizes.of(config, surgery, {}).shapes
        depths = convnext_shape(config).depths
        widths = [sizes[f"{_STAGES}.{stage}.layers.0.dwconv.weight"][0] for stage in range(len(depths))]
        inner = (
            (sizes[f"{_STAGES}.{stage}.layers.{index}.pwconv1.weight"][0], widths[stage])
            for stage, depth in enumerate(depths)
            for index in range(depth)
        )
        return {**config, "hidden_sizes": widths} if all(i <= 4 * width for i, width in inner) else None

    def structure(self, module: nn.Module) -> PrunableStructure:
        """Width of every stage, and inner channels of every block."""
        return PrunableStructure((), self.inner_linears(module), tuple(self.classifiers(module)))
