"""Gates on sizes that a plan shows to be out of reach: refused before anything is computed."""

from __future__ import annotations

from .errors import PlanError
from .evaluation.size import counted_sizes
from .models.base import ModelSpec
from .recipes.decoding import COMPRESSES_CACHE
from .recipes.export import ExportSettings
from .recipes.pruning import IsomorphicSettings
from .recipes.schema import Recipe

# What is decided on data (rotations, run-time scales) is counted at its largest.
_DATA_SLACK = 0.02
# How a cut is spread over the layers moves what is counted; on a ConvNeXt by 8 %, elsewhere by less.
_SPREAD_SLACK = 0.1
_AMOUNTS = {
    "isomorphic": "`target` or `ratios` of isomorphic",
    "tinyfusion": "`groups` of tinyfusion",
    "depth": "`keep` of depth",
}
_OF_CACHE = ("kv_bytes_per_token", "kv_bytes_ratio")
"""Method that removes -> the keys that say how much."""
_AIMS = {"macs": ("macs",), "parameters": ("parameters",), "bytes": ("bytes", "size_ratio")}


def check_gates(
    recipe: Recipe,
    export: ExportSettings,
    before: ModelSpec,
    after: ModelSpec,
    stored_bytes: int,
    *,
    decided: bool = False,
) -> None:
    """Refuse gates on an export's sizes that the plan shows to be out of reach.

    Args:
        recipe: that requires them.
        export: one of the recipe's.
        before: of the original.
        after: of what the export holds.
        stored_bytes: of its tensors.
        decided: the first stage has decided on the data what it removes.

    Raises:
        PlanError: naming the gate and what is predicted.
    """
    for name, value in counted_sizes(after.size(), before.size(), stored_bytes).items():
        gate = recipe.require.get(name)
        if gate is None or gate.operator not in ("<=", "<"):
            continue
        if not gate.holds(value * (1.0 - _slack(recipe, name, decided=decided))):
            which = "" if len(recipe.export) == 1 else f" by {export.path} ({export.format})"
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            raise PlanError(
                f"require.{name}: {gate} cannot be reached{which}; the plan predicts {shown}",
                hint=_hint(recipe, name),
            )


def _slack(recipe: Recipe, name: str, *, decided: bool) -> float:
    """Return by which share a metric may come out below its prediction."""
    stages = [stage.settings for stage in recipe.stages]
    cuts = [item for item in stages if isinstance(item, IsomorphicSettings)]
    known = decided and len(cuts) == 1 and cuts[0].steps == 1
    if cuts and not known and not _is_aimed_at(cuts[-1], name):
        return _SPREAD_SLACK
    return 0.0 if name in ("macs", "parameters") and (known or not cuts) else _DATA_SLACK


def _is_aimed_at(stage: IsomorphicSettings, name: str) -> bool:
    """Tell whether a stage goes as near to a limit of this metric as widths allow; of several, one binds."""
    asked = [] if stage.target is None else list(stage.target.model_dump(exclude_none=True))
    return len(asked) == 1 and name in _AIMS[asked[0]]


def _hint(recipe: Recipe, name: str) -> str:
    """Say which stages of the recipe could bring the metric down."""
    if name in _OF_CACHE:
        compresses = any(stage.method in COMPRESSES_CACHE for stage in recipe.stages)
        way = "remove more (`removed` of cskv) or use fewer `bits`" if compresses else "add a stage cskv"
        return f"{way}, or relax the gate"
    phases = {stage.settings.phase for stage in recipe.stages}
    keys = [_AMOUNTS[stage.method] for stage in recipe.stages if stage.method in _AMOUNTS]
    ways = [f"remove more ({', '.join(dict.fromkeys(keys))})"] if keys else []
    if "prune" in phases and not keys:
        ways.append("remove more")
    if "quantize" in phases and name not in ("macs", "parameters"):
        ways.append("use fewer bits for more layers")
    if any(export.padded for export in recipe.export):
        ways.append("leave `padded` out of the export")
    if not ways and name in ("macs", "parameters"):
        ways.append("add a pruning stage: no stage of the recipe removes anything")
    return ", or ".join([*ways, "relax the gate"])
