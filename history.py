"""What compress.json says of a stage: the same however the stage was carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import report
from .recipes.answer_files import with_plain_names
from .recipes.schema import Stage
from .runtime.manifest import HistoryEntry
from .workdir import digest

if TYPE_CHECKING:
    import torch

    from .models.base import Source

# Of a stage's details: rows per layer, per measured sensitivity, per allocation that was tried; how scores
# and singular values spread; how a search or an aligning went; and times and kills, with which equal runs
# would write different files.
_REPORT_ALONE = frozenset(
    {
        *("layers", "sensitivity", "points", "seconds", "histogram", "decisions", "search"),
        *("singular_values", "training_loss", "choice_values", "resumed_at"),
    }
)


def source_hash(source: Source, dtype: torch.dtype, config: Mapping[str, Any]) -> str:
    """Return the hash of the first stage's input.

    Args:
        source: with the hashes of its files.
        dtype: that the weights are opened in.
        config: of the model as it was opened.
    """
    # Which blocks stand for each other depends on what it tells of its origins.
    told = [] if source.origins is None else [source.origins]
    return digest([sorted(source.hashes.items()), str(dtype), config, *told])


def entry_of(stage: Stage, seed: int, input_hash: str, details: Mapping[str, Any]) -> HistoryEntry:
    """Return the entry of a finished stage.

    Args:
        stage: of the recipe; files of questions and answers are written down by their names alone.
        seed: of the recipe.
        input_hash: of the model before the stage.
        details: of the report.
    """
    return HistoryEntry(
        method=stage.method,
        settings=with_plain_names(stage.settings).model_dump(mode="json"),
        seed=seed,
        input_hash=input_hash,
        versions=report.versions(),
        details=kept_in_history(details),
    )


def kept_in_history(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the details of a stage without what stands in the report alone."""
    kept = {name: value for name, value in details.items() if name not in _REPORT_ALONE}
    return {name: _kept_inside(value) for name, value in kept.items()}


def _kept_inside(value: Any) -> Any:
    if isinstance(value, dict):
        return kept_in_history(value)
    return [_kept_inside(item) for item in value] if isinstance(value, list) else value
