"""Which linear gets which scheme: one rule for the plan and for the work itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...errors import PlanError
from ...models.base import Family, FoldGroup, LinearSite
from ...recipes.patterns import select, unmatched
from ...recipes.stages import GridSettings, SmoothQuantSettings, ViditQSettings
from ...runtime.manifest import ActivationScheme, QuantizedModule, RotationScheme
from ...runtime.rotation import block_for, has_hadamard
from .grid import Clip, Grid

_FLOAT_ROLES = ("embedder", "head")
_MSE_BITS = 4


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
    """Return what the settings of any of the three methods ask for."""
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


def activation_of(settings: GridSettings) -> ActivationScheme | None:
    """Return the activation grid; None leaves activations in floating point."""
    bits = settings.activation_bits
    if bits == 16:
        return None
    symmetric = settings.activation_symmetric
    return ActivationScheme(bits=bits, symmetric=bits != 4 if symmetric is None else symmetric)


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


def _adaln(site: LinearSite, settings: GridSettings, options: Options, bias: bool) -> Choice:
    if settings.adaln_weight_bits == 16:
        return Choice(site, None, "adaln_weight_bits: 16")
    rule = f"adaln_weight_bits: {settings.adaln_weight_bits}"
    scheme = QuantizedModule(
        shape=site.shape,
        bits=settings.adaln_weight_bits,
        symmetric=True,
        bias=bias,
        method=options.method,
        decided_by=rule,
    )
    return Choice(site, scheme, rule)


def _main(site: LinearSite, settings: GridSettings, options: Options, bias: bool, folded: bool) -> Choice:
    columns = site.shape[1]
    if settings.group_size and columns % settings.group_size:
        raise PlanError(
            f"{site.name}: group_size {settings.group_size} does not divide its {columns} input channels",
            hint="choose a divisor, or keep the layer in floating point",
        )
    block = rotation_block("block" if options.rotation == "auto" else options.rotation, columns)
    scheme = QuantizedModule(
        shape=site.shape,
        bits=settings.weight_bits,
        group_size=settings.group_size,
        symmetric=settings.weight_symmetric,
        activation=activation_of(settings),
        input_scale=options.act_exponent is not None and not folded,
        rotation=RotationScheme(block=block) if block else None,
        low_rank=min(options.low_rank, *site.shape),
        bias=bias,
        method=options.method,
        decided_by=f"weight_bits: {settings.weight_bits}",
    )
    return Choice(site, scheme, scheme.decided_by)


def choose(
    family: Family,
    module: nn.Module,
    settings: GridSettings,
    quantization: Mapping[str, QuantizedModule],
) -> tuple[list[Choice], list[Group]]:
    """Decide what happens to every linear of a model.

    A rule earlier in this list wins: a pattern of `keep`; `adaln_weight_bits` for modulation layers;
    the family's own list of layers left in floating point; embedders and heads in floating point;
    `weight_bits` and `activation_bits` for the rest.

    Args:
        family: of the model.
        module: with or without weights (meta device).
        settings: of the stage.
        quantization: what earlier stages have quantized.

    Returns:
        One choice per linear in forward order, and the quantized ones grouped by shared input.

    Raises:
        PlanError: a pattern matches nothing, nothing is left to quantize, a layer is quantized
            already, or `group_size` does not divide a layer's inputs.
    """
    options = options_of(settings)
    _check_unquantized(options.method, quantization)
    sites = family.linears(module)
    names = [site.name for site in sites]
    _check_keep(settings.keep, names)
    float_rules = _float_rules(family, sites, settings.keep)
    main = {site.name for site in sites if site.role != "adaln" and site.name not in float_rules}
    if not main:
        raise PlanError(
            f"{options.method}: no linear layer is left to quantize",
            hint="`keep` covers all of them; take out a pattern or the stage",
        )
    groups = _groups(family.folds(module), names, main, set(select(settings.keep, names)))
    folded = {name for group in groups if group.fold for name in group.targets}

    choices: list[Choice] = []
    for site in sites:
        bias = module.get_submodule(site.name).bias is not None
        if site.name in float_rules:
            choices.append(Choice(site, None, float_rules[site.name]))
        elif site.role == "adaln":
            choices.append(_adaln(site, settings, options, bias))
        else:
            choices.append(_main(site, settings, options, bias, site.name in folded))
    return choices, groups


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
