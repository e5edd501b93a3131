"""Which linear gets which scheme: one rule for the plan and for the work itself."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from ...errors import PlanError
from ...models.base import Family, FoldGroup, LinearSite
from ...recipes.patterns import select, unmatched
from ...recipes.stages import (
    GridSettings,
    MixdqSettings,
    SmoothQuantSettings,
    UniformSettings,
    ViditQSettings,
    WeightBits,
)
from ...runtime.manifest import ActivationScheme, QuantizedModule, RotationScheme
from ...runtime.rotation import block_for, has_hadamard
from .first_tokens import check_wanted as check_first_token
from .first_tokens import planned as planned_first_token
from .grid import Clip, Grid

_FLOAT_ROLES = ("embedder", "head", "router")
_MSE_BITS = 4
_IntegerBits = Literal[4, 6, 8]


@dataclass(frozen=True)
class Options:
    """What a method does beyond the grids; every method's settings become one of these.

    Attributes:
        method: name for the manifest.
        act_exponent: a number, "sweep", or None for no channel scales.
        rotation: as in `ViditQSettings`.
        timestep_ranges: as in `ViditQSettings`.
        compensate: GPTQ instead of rounding to nearest.
        low_rank: rank of the floating-point branch.
    """

    method: str
    act_exponent: float | str | None = None
    rotation: str = "none"
    timestep_ranges: tuple[tuple[int, int], ...] = ()
    compensate: bool = False
    low_rank: int = 0


def options_of(settings: GridSettings) -> Options:
    """Return what the settings of any of the methods ask for."""
    if isinstance(settings, ViditQSettings):
        return Options(
            settings.method,
            settings.act_exponent,
            settings.rotation,
            settings.timestep_ranges,
            settings.rounding == "gptq",
            settings.low_rank,
        )
    if isinstance(settings, SmoothQuantSettings):
        return Options(settings.method, settings.act_exponent)
    if isinstance(settings, MixdqSettings):
        return Options(settings.method, compensate=settings.rounding == "gptq")
    return Options(settings.method)


@dataclass(frozen=True)
class Choice:
    """What happens to one linear.

    Attributes:
        site: the linear.
        scheme: as planned (transforms that depend on data at their largest), None: floating point.
        decided_by: the rule or pattern.
    """

    site: LinearSite
    scheme: QuantizedModule | None
    decided_by: str


def by_block(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Group choices by block, in order; what lies outside the blocks comes last."""
    blocks: dict[int | None, list[Choice]] = defaultdict(list)
    for choice in choices:
        blocks[choice.site.block].append(choice)
    outside = blocks.pop(None, [])
    return [blocks[index] for index in sorted(blocks, key=lambda key: key or 0)] + [outside]


@dataclass(frozen=True)
class Group:
    """Quantized linears that share one input, hence one channel scale and one rotation.

    Attributes:
        targets: their names.
        fold: absorbs the scale into a producer; None: the scale is applied when the model runs.
    """

    targets: tuple[str, ...]
    fold: FoldGroup | None


def clip_of(settings: GridSettings, bits: int) -> Clip:
    """Return how the range is found: as set, or min-max above 4 bits and mse from there down."""
    return settings.clip or ("mse" if bits <= _MSE_BITS else "minmax")


def grid_of(settings: GridSettings, scheme: QuantizedModule) -> Grid:
    """Return the weight grid of a scheme."""
    return Grid(scheme.bits, scheme.symmetric, clip_of(settings, scheme.bits), scheme.group_size)


@dataclass(frozen=True)
class Survey:
    """The linears of a model before anything is decided about bits.

    Attributes:
        sites: all of them, in forward order.
        biased: names of those with a bias.
        float_rules: those left in floating point -> the rule that decided.
        groups: the other linear layers, modulation layers aside, grouped by shared input.
    """

    sites: tuple[LinearSite, ...]
    biased: frozenset[str]
    float_rules: Mapping[str, str]
    groups: tuple[Group, ...]

    @property
    def folded(self) -> frozenset[str]:
        """Names of the layers whose channel scale a producer absorbs."""
        return frozenset(name for group in self.groups if group.fold for name in group.targets)


def activation_of(settings: GridSettings, bits: int) -> ActivationScheme | None:
    """Return the activation grid of so many bits; None leaves activations in floating point."""
    if bits == 16:
        return None
    static = settings.activation_scale == "static"
    symmetric = settings.activation_symmetric
    if symmetric is None:
        symmetric = bits != 4 and not static
    return ActivationScheme(
        bits=cast(_IntegerBits, bits), symmetric=symmetric, scope="tensor" if static else "token"
    )


def rotation_block(kind: str, columns: int) -> int | None:
    """Return the block of the rotation `kind` for a width; None where it has none."""
    if kind == "none":
        return None
    block = columns if kind == "hadamard" and has_hadamard(columns) else block_for(columns)
    return block if block > 1 else None


def _check_keep(keep: Sequence[str], names: Sequence[str]) -> None:
    for pattern in unmatched(keep, names):
        near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.0)
        raise PlanError(
            f"keep: pattern {pattern!r} matches no linear layer",
            hint=f"patterns describe full names, `*` stands for anything; nearest: {', '.join(near)}",
        )


def _check_unquantized(method: str, quantization: Mapping[str, QuantizedModule]) -> None:
    if quantization:
        name, scheme = next(iter(quantization.items()))
        raise PlanError(
            f"{method}: the model is quantized already ({len(quantization)} layers;"
            f" {name} has {scheme.bits} bits, made by {scheme.method})",
            hint="quantize once, from the floating-point checkpoint",
        )


def modulation_scheme(survey: Survey, site: LinearSite, method: str, bits: int, rule: str) -> QuantizedModule:
    """Return the scheme of an adaptive-norm modulation layer: weight-only, symmetric, one scale per row."""
    return QuantizedModule(
        shape=site.shape,
        bits=cast(WeightBits, bits),
        symmetric=True,
        bias=site.name in survey.biased,
        method=method,
        decided_by=rule,
    )


def linear_scheme(
    survey: Survey, site: LinearSite, settings: GridSettings, bits: int, activation_bits: int, rule: str
) -> QuantizedModule:
    """Return the scheme of a layer at so many bits, transforms that depend on data at their largest.

    A convolution is rounded plainly, whatever the method does to linear layers: it has no scales of
    its input, no rotation and no low-rank branch, and groups only where `group_size` divides it.

    Args:
        survey: of the model.
        site: the layer.
        settings: of the stage.
        bits: of a weight: 2, 3, 4, 6 or 8.
        activation_bits: 4, 6, 8 or 16, which stands for floating point.
        rule: what decided the bits.

    Raises:
        PlanError: `group_size` does not divide the layer's inputs.
    """
    if site.kernel is not None:
        return _convolution_scheme(survey, site, settings, bits, activation_bits, rule)
    options, columns = options_of(settings), site.shape[1]
    if settings.group_size and columns % settings.group_size:
        raise PlanError(
            f"{site.name}: group_size {settings.group_size} does not divide its {columns} input channels",
            hint="choose a divisor, or keep the layer in floating point",
        )
    block = rotation_block("block" if options.rotation == "auto" else options.rotation, columns)
    activation = activation_of(settings, activation_bits)
    return QuantizedModule(
        shape=site.shape,
        bits=cast(WeightBits, bits),
        group_size=settings.group_size,
        symmetric=settings.weight_symmetric,
        activation=activation,
        input_scale=options.act_exponent is not None and site.name not in survey.folded,
        rotation=RotationScheme(block=block) if block else None,
        low_rank=min(options.low_rank, *site.shape),
        bias=site.name in survey.biased,
        first_token=planned_first_token(site, settings, activation),
        method=options.method,
        decided_by=rule,
    )


def _convolution_scheme(
    survey: Survey, site: LinearSite, settings: GridSettings, bits: int, activation_bits: int, rule: str
) -> QuantizedModule:
    activation = activation_of(settings, activation_bits)
    if activation is not None:
        # Windows overlap: a pixel has to be the same integer in all of them. What comes from a SiLU lies
        # almost all on one side of zero, and a zero point costs nothing here.
        scope = "sample" if activation.scope == "token" else activation.scope
        symmetric = bool(settings.activation_symmetric)
        activation = activation.model_copy(update={"scope": scope, "symmetric": symmetric})
    size = settings.group_size
    return QuantizedModule(
        shape=site.shape,
        bits=cast(WeightBits, bits),
        group_size=size if size and site.shape[1] % size == 0 else None,
        symmetric=settings.weight_symmetric,
        activation=activation,
        bias=site.name in survey.biased,
        kernel=site.kernel,
        method=settings.method,
        decided_by=rule,
    )


def survey_linears(
    family: Family,
    module: nn.Module,
    settings: GridSettings,
    quantization: Mapping[str, QuantizedModule],
) -> Survey:
    """Find out which linears stay in floating point, and which of the others share an input.

    Args:
        family: of the model.
        module: with or without weights (meta device).
        settings: of the stage.
        quantization: what earlier stages have quantized.

    Raises:
        PlanError: a pattern matches nothing, nothing is left to quantize, or a layer is quantized already.
    """
    method = options_of(settings).method
    _check_unquantized(method, quantization)
    sites = family.linears(module)
    names = [site.name for site in sites]
    _check_keep(settings.keep, names)
    float_rules = _float_rules(family, sites, settings.keep)
    main = {site.name for site in sites if site.role != "adaln" and site.name not in float_rules}
    if not main:
        raise PlanError(
            f"{method}: no linear layer is left to quantize",
            hint="`keep` covers all of them; take out a pattern or the stage",
        )
    check_first_token(settings, [site for site in sites if site.name in main])
    balanced = main - {site.name for site in sites if site.kernel is not None}
    groups = _groups(family.folds(module), names, balanced, set(select(settings.keep, names)))
    biased = frozenset(name for name in names if module.get_submodule(name).bias is not None)
    return Survey(tuple(sites), biased, float_rules, tuple(groups))


def choose(
    family: Family,
    module: nn.Module,
    settings: UniformSettings,
    quantization: Mapping[str, QuantizedModule],
) -> tuple[list[Choice], list[Group]]:
    """Decide what happens to every linear of a model, with equal bits for all.

    A rule earlier in this list wins: a pattern of `keep`; `adaln_weight_bits` for modulation layers;
    the family's own list of layers left in floating point; embedders, heads and routers in floating
    point; `weight_bits` and `activation_bits` for the rest.

    Args:
        family: of the model.
        module: with or without weights (meta device).
        settings: of the stage.
        quantization: what earlier stages have quantized.

    Returns:
        One choice per linear in forward order, and the quantized ones grouped by shared input.

    Raises:
        PlanError: see `survey_linears` and `linear_scheme`.
    """
    survey = survey_linears(family, module, settings, quantization)
    choices: list[Choice] = []
    bits: int
    for site in survey.sites:
        scheme: QuantizedModule | None = None
        rule = survey.float_rules.get(site.name)
        if rule is None and site.role == "adaln":
            bits = settings.adaln_weight_bits or 16
            rule = f"adaln_weight_bits: {bits}"
            if bits != 16:
                scheme = modulation_scheme(survey, site, settings.method, bits, rule)
        elif rule is None:
            bits, rule = settings.weight_bits, f"weight_bits: {settings.weight_bits}"
            scheme = linear_scheme(survey, site, settings, bits, settings.activation_bits, rule)
        choices.append(Choice(site, scheme, rule))
    return choices, list(survey.groups)


def _float_rules(family: Family, sites: Sequence[LinearSite], keep: Sequence[str]) -> dict[str, str]:
    """Return the layers left in floating point -> the rule that decided."""
    names = [site.name for site in sites]
    kept = {name: f"keep: {pattern}" for name, pattern in select(keep, names).items()}
    family_kept = {n: f"{family.name} default: {p}" for n, p in select(family.default_keep(), names).items()}
    rules: dict[str, str] = {}
    for site in sites:
        rule = kept.get(site.name)
        if rule is None and site.role != "adaln":
            rule = family_kept.get(site.name)
            if rule is None and site.role in _FLOAT_ROLES:
                rule = f"role: {site.role}"
        if rule is not None:
            rules[site.name] = rule
    return rules


def _groups(
    folds: Sequence[FoldGroup], names: Sequence[str], quantized: set[str], kept: set[str]
) -> list[Group]:
    """Group quantized linears by shared input, in forward order.

    A fold whose targets are not all quantized, or one of whose producers the recipe keeps, would
    change a layer that must stay as it is: its quantized targets are scaled when the model runs.
    """
    by_name: dict[str, Group] = {}
    for fold in folds:
        whole = quantized.issuperset(fold.targets) and kept.isdisjoint(fold.producers)
        members = tuple(target for target in fold.targets if target in quantized)
        if members:
            group = Group(members, fold if whole else None)
            by_name.update(dict.fromkeys(members, group))
    ordered: dict[tuple[str, ...], Group] = {}
    for name in names:
        if name in quantized:
            group = by_name.get(name) or Group((name,), None)
            ordered.setdefault(group.targets, group)
    return list(ordered.values())
