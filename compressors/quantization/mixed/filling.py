"""What is decided and rounded before bits are chosen: transforms of groups, and every layer at all bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ....calibration.base import Calibration
from ....models.base import OpenModel
from ....progress import Progress, step
from ....runtime.manifest import QuantizedModule
from ....runtime.memory import return_freed_memory
from ..balance import Transform
from ..building import Original, layer_of, output_sqnr_db, rounded, settled
from ..first_tokens import FirstTokens, settle_first_tokens
from ..inputs import Inputs, gather, gather_grams, portions, sources_of
from ..scheme import Choice, Group, Survey, by_block, grid_of, options_of
from ..transforms import transform_of
from .bank import Bank, Candidate
from .candidates import AllocatingSettings, LayerChoices, allocation_of
from .folding import Transforms, fold, fold_all, read_transforms, write_transforms
from .offers import nominal_bits
from .problem import allocated_weights

TRANSFORMS_FILE = "transforms.safetensors"
BANK_FOLDER = "bank"


def likely_bits(
    layers: Sequence[LayerChoices], settings: AllocatingSettings, fixed_bytes: int, original_bytes: int
) -> float:
    """Return the average bits that a budget leaves for the layers that have a choice."""
    budget = allocation_of(settings).budget
    found = [] if budget.mean_bits is None else [budget.mean_bits]
    limits: list[float] = [] if budget.bytes is None else [budget.bytes]
    limits += [] if budget.ratio is None else [budget.ratio * original_bytes]
    single = sum(next(iter(layer.costs.values())) for layer in layers if len(layer.costs) == 1)
    weights = max(1, allocated_weights(layers))
    found += [8 * (limit - fixed_bytes - single) / weights for limit in limits]
    return min(found)


class Filling:
    """Decides transforms and fills the bank; what an earlier run has finished is taken from its folder.

    To be used in this order: `gather`, `transforms`, `bank`.

    Args:
        model: computing in float32; its weights absorb the scales.
        survey: of its linears.
        settings: of the stage.
        calibration: recorded inputs of the model as it is.
        folder: of the stage alone.
        progress: to report to.
    """

    def __init__(
        self,
        model: OpenModel,
        survey: Survey,
        settings: AllocatingSettings,
        calibration: Calibration,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.model, self.survey, self.settings = model, survey, settings
        self.calibration, self.folder, self.progress = calibration, folder, progress
        self._inputs = Inputs({}, {})
        self._sources: dict[str, str] = {}
        self._first_tokens = FirstTokens({}, {}, {})
        self._transforms = Transforms.of({}, ())

    @property
    def transforms_file(self) -> Path | None:
        """Where the transforms are kept; None for a method without any."""
        options = options_of(self.settings)
        free = options.act_exponent is None and options.rotation == "none"
        return None if free else self.folder / TRANSFORMS_FILE

    def transforms(self, layers: Sequence[LayerChoices], likely: float) -> Transforms:
        """Decide the transforms of all groups, and let producers absorb the scales.

        Args:
            layers: of `candidates`, as planned.
            likely: bits that decide the grid on which transforms are compared, of `likely_bits`.

        Raises:
            StageError: the calibration never reached a layer, or its inputs are not finite.
        """
        file = self.transforms_file
        if file is None:
            return self._transforms
        groups = self.survey.groups
        device = next(self.model.module.parameters()).device
        if file.is_file():
            decided = read_transforms(file, device)
            fold_all(self.model.module, groups, decided)
            self._transforms = Transforms.of(decided, groups)
            return self._transforms
        singles = [single for layer in layers for single in layer.singles]
        schemes = {name: _near(layer, likely) for layer in singles for name in layer.names}
        decided = {}
        with step(self.progress, "choose transforms", len(groups)):
            for group in groups:
                scheme = next((found for name in group.targets if (found := schemes.get(name))), None)
                if scheme is None:  # all of its layers are fixed in floating point
                    continue
                decided[group.targets[0]] = self._decide(group, scheme)
                self.progress.advance(1, group.targets[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_transforms(file, decided)
        self._transforms = Transforms.of(decided, groups)
        return self._transforms

    def _decide(self, group: Group, scheme: QuantizedModule) -> Transform:
        transform = transform_of(
            group,
            self.model.module,
            self.settings,
            self._inputs,
            self._sources,
            self.calibration.seed,
            grid_of(self.settings, scheme),
            scheme.activation,
        )
        fold(self.model.module, group, transform)
        return transform

    def bank(self, layers: Sequence[LayerChoices]) -> Bank:
        """Round every layer at all its bits, where that is not done yet.

        Args:
            layers: of `candidates`, their schemes settled.

        Raises:
            StageError: the calibration never reached a layer, or its inputs are not finite.
        """
        bank = self._empty_bank()
        bank.prepare()
        missing = self._missing(bank, layers)
        if not missing:
            return bank
        blocks = by_block([Choice(layer.site, None, "") for layer in missing.values()])
        compensate, stored = options_of(self.settings).compensate, self._first_tokens.features
        widths = [self._gram_widths(block) for block in blocks]
        with step(self.progress, "round layers", len(missing)):
            for portion in portions(widths) if compensate else [range(len(blocks))]:
                wanted = {name: width for index in portion for name, width in widths[index].items()}
                grams: Mapping[str, Tensor] = {}
                if compensate and wanted:
                    grams = gather_grams(self.model, wanted, self.calibration, self.progress, stored)
                for index in portion:
                    for choice in blocks[index]:
                        self._round(bank, missing[choice.site.name], grams)
                        self.progress.advance(1, choice.site.name)
                    return_freed_memory()
        self._inputs = Inputs({}, {})
        return bank

    def settle(self, name: str, scheme: QuantizedModule) -> QuantizedModule:
        """Return a layer's planned scheme with the transform and the first token that it got."""
        return settled(self._first_tokens.scheme(name, scheme), self._original(name))

    def _original(self, name: str, gram: Tensor | None = None) -> Original:
        dense = self.model.module.get_submodule(name)
        weight, bias = dense.weight, dense.bias
        assert isinstance(weight, Tensor)
        token, absorbed = self._first_tokens.features.get(name), self._transforms.absorbed(name)
        return Original(
            name=name,
            weight=weight.detach().float().flatten(1),
            bias=bias.detach().to(self.model.spec.dtype) if isinstance(bias, Tensor) else None,
            transform=self._transforms.layer(name),
            gram=gram,
            # As the weight reads it by now.
            first_token=token if token is None or absorbed is None else token * absorbed.to(token.device),
        )

    def _round(self, bank: Bank, layer: LayerChoices, grams: Mapping[str, Tensor]) -> None:
        name, dtype = layer.site.name, self.model.spec.dtype
        source, absorbed = self._sources[name], self._transforms.absorbed(name)
        original = self._original(name, grams.get(source))
        rows = self._inputs.rows_of(source, layer.site.shape[1])
        rows = rows if absorbed is None else rows * absorbed.to(rows.device)
        made = {}
        for label, scheme in layer.schemes.items():
            tensors = rounded(original, scheme, self.settings, dtype)
            candidate = layer_of(scheme, dtype, tensors, original.bias)
            made[label] = Candidate(scheme, tensors, {"sqnr_db": output_sqnr_db(original, candidate, rows)})
        bank.write(name, made)

    def _gram_widths(self, block: Sequence[Choice]) -> dict[str, int]:
        return {
            self._sources[choice.site.name]: choice.site.shape[1]
            for choice in block
            if choice.site.role != "adaln"
        }

    def gather(self, layers: Sequence[LayerChoices]) -> None:
        """Look at the calibration, as far as an earlier run has not done all that it is needed for.

        Called before anything is folded: inputs are kept as the original has them.

        Args:
            layers: of `candidates`, as planned.

        Raises:
            StageError: the calibration never reached a layer, its inputs are not finite, or a first token
                cannot be stored that is to be.
        """
        singles = [single for layer in layers for single in layer.singles]
        planned = {name: scheme for layer in singles for name in layer.names for scheme in _any_scheme(layer)}
        self._first_tokens = settle_first_tokens(
            self.model, planned, self.settings, self.calibration, self.progress
        )
        bank, file = self._empty_bank(), self.transforms_file
        if (file is None or file.is_file()) and not self._missing(bank, layers):
            return
        roles = {site.name: str(site.role) for site in self.survey.sites}
        shapes = {name: layer.site.shape[1] for layer in layers for name in layer.names}
        self._sources = sources_of(self.survey.groups, roles)
        widths = {self._sources[name]: width for name, width in shapes.items()}
        ranges = options_of(self.settings).timestep_ranges
        stored = self._first_tokens.features
        self._inputs = gather(self.model, widths, ranges, self.calibration, self.progress, stored)

    def _empty_bank(self) -> Bank:
        return Bank(self.folder / BANK_FOLDER, self.model.spec.dtype)

    @staticmethod
    def _missing(bank: Bank, layers: Sequence[LayerChoices]) -> dict[str, LayerChoices]:
        singles = [single for layer in layers for single in layer.singles]
        return {
            layer.site.name: layer for layer in singles if layer.schemes and not bank.has(layer.site.name)
        }


def _any_scheme(layer: LayerChoices) -> list[QuantizedModule]:
    return list(layer.schemes.values())[:1]


def _near(layer: LayerChoices, bits: float) -> QuantizedModule | None:
    """Return the scheme whose bits are nearest, the fewer of two; None for a layer in floating point."""
    labels = sorted(layer.schemes, key=lambda label: (abs(nominal_bits(label) - bits), nominal_bits(label)))
    return layer.schemes[labels[0]] if labels else None
