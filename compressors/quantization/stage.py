"""The one pass that all quantization methods share: statistics, then block by block.

Per block: scales and rotations are chosen and absorbed where a producer can, then every layer is
transformed in float32, rounded once, and its original weight is dropped. The modulation layers that
absorb scales are rounded after that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.base import Calibration
from ...models.base import OpenModel
from ...progress import Progress, step
from ...recipes.stages import UniformSettings
from ...runtime.manifest import QuantizedModule
from ...runtime.memory import return_freed_memory
from . import balance
from .building import Original, layer_of, output_sqnr_db, put, rounded, settled
from .details import averages, label, layer_row, unreached
from .first_tokens import FirstTokens, settle_first_tokens
from .inputs import Inputs, gather, gather_grams, portions, sources_of
from .ranges import calibrate_ranges
from .scheme import Choice, Group, Options, by_block, choose, grid_of, options_of
from .transforms import transform_of


def apply_stage(
    model: OpenModel, settings: UniformSettings, calibration: Calibration, progress: Progress
) -> dict[str, Any]:
    """Quantize a model in place; the settings' method decides how.

    Returns:
        layers (one row per linear), label, average bits, and the layers above the labelled bits.

    Raises:
        PlanError: see `scheme.choose`.
        StageError: the calibration never reached a layer that every token goes through, or its inputs are
            not finite.
    """
    with torch.no_grad():
        return _Stage(model, settings, calibration, progress).run()


class _Stage:
    """State of one run of the pass."""

    def __init__(
        self, model: OpenModel, settings: UniformSettings, calibration: Calibration, progress: Progress
    ) -> None:
        self.model, self.settings = model, settings
        self.calibration, self.progress = calibration, progress
        self.options: Options = options_of(settings)
        model.family.split(model.module)
        self.choices, self.groups = choose(model.family, model.module, settings, model.quantization)
        roles = {choice.site.name: str(choice.site.role) for choice in self.choices}
        self.sources = sources_of(self.groups, roles)
        self.schemes = {c.site.name: c.scheme for c in self.choices if c.scheme is not None}
        self.folded = {name for group in self.groups if group.fold for name in group.targets}
        self.transforms: dict[str, balance.Transform] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.inputs = Inputs({}, {})
        self.first_tokens = FirstTokens({}, {}, {})

    def run(self) -> dict[str, Any]:
        """Do all of it."""
        self._settle_first_tokens()
        sources = {self.sources[name]: scheme.shape[1] for name, scheme in self.schemes.items()}
        ranges = self.options.timestep_ranges
        stored = self.first_tokens.features
        self.inputs = gather(self.model, sources, ranges, self.calibration, self.progress, stored)
        blocks = by_block(self.choices)
        widths = [self._gram_widths(block) for block in blocks]
        with step(self.progress, "quantize layers", len(self.schemes)):
            for portion in portions(widths) if self.options.compensate else [range(len(blocks))]:
                grams = self._grams({n: w for index in portion for n, w in widths[index].items()})
                for index in portion:
                    self._quantize_block(blocks[index], grams)
                    return_freed_memory()
        self._fill_ranges()
        self.model.family.fuse(self.model.module)
        rows = [self.rows[choice.site.name] for choice in self.choices]
        facts = averages(rows, label(self.settings), self.model.shared)
        return {**facts, **self.first_tokens.details(), **unreached(rows, self.progress), "layers": rows}

    def _gram_widths(self, block: list[Choice]) -> dict[str, int]:
        return {
            self.sources[choice.site.name]: choice.site.shape[1]
            for choice in block
            if choice.scheme is not None and choice.site.role != "adaln"
        }

    def _grams(self, widths: dict[str, int]) -> dict[str, Tensor]:
        if not self.options.compensate or not widths:
            return {}
        stored = self.first_tokens.features
        return gather_grams(self.model, widths, self.calibration, self.progress, stored)

    def _settle_first_tokens(self) -> None:
        """Find out which layers store their output for the first token."""
        self.first_tokens = settle_first_tokens(
            self.model, self.schemes, self.settings, self.calibration, self.progress
        )
        self.schemes = {name: self.first_tokens.scheme(name, scheme) for name, scheme in self.schemes.items()}

    def _fill_ranges(self) -> None:
        """Find the static grids of activations, now that all weights are rounded."""
        ends = calibrate_ranges(
            self.model, self.calibration, self.settings.activation_range or "minmax", self.progress
        )
        for name, (low, high) in ends.items():
            self.rows[name]["activation_range"] = [low, high]

    def _quantize_block(self, block: list[Choice], grams: dict[str, Tensor]) -> None:
        names = {choice.site.name for choice in block}
        for group in self.groups:
            if group.targets[0] in names:
                self._balance(group)
        # Modulations and values absorb scales above; from here on no weight changes but by rounding.
        for choice in block:
            if choice.scheme is None:
                self.rows[choice.site.name] = layer_row(choice, None, self.model.spec.dtype)
                continue
            self._replace(choice, self.schemes[choice.site.name], grams.get(self.sources[choice.site.name]))
            self.progress.advance(1, choice.site.name)

    def _layer(self, name: str) -> nn.Linear | nn.Conv2d:
        layer = self.model.module.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    def _balance(self, group: Group) -> None:
        """Choose a group's transform and let the producer absorb its scale where one can."""
        scheme = self.schemes[group.targets[0]]
        transform = transform_of(
            group,
            self.model.module,
            self.settings,
            self.inputs,
            self.sources,
            self.calibration.seed,
            grid_of(self.settings, scheme),
            scheme.activation,
        )
        if group.fold is not None and transform.scale is not None:
            group.fold.absorb(self.model.module, transform.scale)
        self.transforms.update(dict.fromkeys(group.targets, transform))

    def _replace(self, choice: Choice, planned: QuantizedModule, gram: Tensor | None) -> None:
        """Quantize one layer, put it in the place of the original, and describe it."""
        name = choice.site.name
        dense = self._layer(name)
        bias = None if dense.bias is None else dense.bias.detach()
        transform = self.transforms.get(name, balance.Transform())
        weight = dense.weight.detach().float().flatten(1)
        first_token = self.first_tokens.features.get(name)
        original = Original(name, weight, bias, transform, name in self.folded, gram, first_token)
        scheme = settled(planned, original)
        tensors = rounded(original, scheme, self.settings, self.model.spec.dtype)
        layer = layer_of(scheme, dense.weight.dtype, tensors, bias)
        row = layer_row(choice, scheme, dense.weight.dtype)
        row["act_exponent"] = transform.exponent
        row["sqnr_db"] = output_sqnr_db(
            original, layer, self.inputs.rows_of(self.sources[name], scheme.shape[1])
        )
        put(self.model.module, name, layer)
        self.model.quantization[name] = scheme
        self.rows[name] = row
