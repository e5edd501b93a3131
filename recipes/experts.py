"""Settings of the method that removes and merges experts. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import PlanError
from .stage_base import Phase, StageSettings

FAMILIES = frozenset({"moe"})
HEURISTICS = ("frequency", "soft_activation", "naee")
"""Choices that `seed_heuristics` adds to the first individuals."""
_EXACT = 1e-9  # 60 * 0.1 is a little more than 6

Indices = tuple[Annotated[int, Field(ge=0)], ...]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=1.0)]

_FIRST_PHASE = ("init_random", "seed_heuristics", "prune_evals", "mut_row", "random_draws")
_SECOND_PHASE = (
    "mut_entry", "mut_sigma", "crossover", "front_prob", "norm_prob", "cross_gap", "cross_rank", "router",
    "export",
)  # fmt: skip
_OF_GIVEN = ("experts", "active_experts")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FitnessSettings(_Settings):
    """What an individual is judged by, in points: 100 is the best that an accuracy can be."""

    by: Literal["exact_match", "tokens", "choices", "loss"] = Field(
        "exact_match",
        description="exact_match: share of the items whose generated text is the answer; tokens: share of "
        "the answers' tokens that the model has as its first choice, the right ones before it given; "
        "choices: share of the items of whose choices the right one is the most likely; loss: minus the mean "
        "loss of a token, times 100.",
    )
    data: Path | None = Field(
        None,
        description="JSONL, an item a line: `prompt` with `answer`, or `prompt` with `choices` and `answer`, "
        "the place of the right one; or a text, for by: loss; looked up as prompts are. null: what comes "
        "with the model.",
    )
    task: str | None = Field(
        None,
        min_length=1,
        description="Of a JSONL, also one of splits: only the lines whose `task` is this; null: all.",
    )
    new_tokens: int = Field(
        32, ge=1, le=65_536, description="Of by: exact_match: tokens that are generated at most."
    )
    batch_size: int = Field(32, ge=1, le=65_536, description="Items that are computed together.")
    tie_break: float = Field(
        1e-3,
        ge=0.0,
        le=1.0,
        description="Of an accuracy: the loss, times this, is taken off, since small splits have many ties.",
    )

    @model_validator(mode="after")
    def _used(self) -> FitnessSettings:
        fields = type(self).model_fields
        if self.by != "exact_match" and self.new_tokens != fields["new_tokens"].default:
            raise ValueError(f"new_tokens has no effect with by: {self.by}")
        if self.by == "loss" and self.tie_break != fields["tie_break"].default:
            raise ValueError("tie_break has no effect with by: loss")
        return self


class SplitSettings(_Settings):
    """Items that the search sees, that its best are scored on again, and that are only reported."""

    train: Count | Path = Field(128, description="A count of items of fitness.data, or a file of its own.")
    dev: Count | Path | None = Field(
        None, description="The same, for a second score of the best; null: the first score decides."
    )
    test: Count | Path = Field(512, description="The same, for the report.")

    @property
    def all_files(self) -> bool:
        """Whether no split is taken out of fitness.data."""
        return not any(isinstance(split, int) for split in (self.train, self.dev, self.test))


class EepSettings(StageSettings):
    """EEP (arXiv 2407.00945): which experts stay, and how they are merged, is found by evolution."""

    method: ClassVar[str] = "eep"
    phase: ClassVar[Phase] = "prune"
    calibrates: ClassVar[bool] = False
    hurts: ClassVar[bool] = False
    families: ClassVar[frozenset[str]] = FAMILIES

    keep_experts: int | float | None = Field(
        None,
        description="Experts that stay in every layer: a count, or a share below 1; null: all of them, so "
        "that they are merged only.",
    )
    active_experts: int | None = Field(
        None, ge=1, description="Experts that a token is sent to; null: as many as before."
    )
    experts: dict[int, Indices] | None = Field(
        None,
        description="Layer -> experts that stay, found elsewhere; nothing is searched then. Every layer with "
        "experts is named, all with equally many.",
    )
    groups: Annotated[int, Field(ge=1)] | Literal["per_layer"] = Field(
        "per_layer",
        description="Layers that share their choice: one each, or so many groups of consecutive layers.",
    )
    init_random: int = Field(31, ge=1, le=1_000_000, description="Random individuals that it starts with.")
    seed_heuristics: bool = Field(
        True,
        description=f"Start with the choices of {', '.join(HEURISTICS)} as well; false: as published.",
    )
    prune_evals: int = Field(
        100, ge=1, le=1_000_000, description="Evaluations that choose experts, the first ones included."
    )
    total_evals: int = Field(
        400,
        ge=1,
        le=1_000_000,
        description="Evaluations in all; the others merge. As prune_evals: nothing is merged.",
    )
    mut_row: Rate = Field(0.15, description="Chance of an expert of a flagged group to be replaced.")
    mut_entry: Rate = Field(0.25, description="Chance of a coefficient of a flagged matrix to be changed.")
    mut_sigma: float = Field(0.065, gt=0.0, le=10.0, description="Standard deviation of that change.")
    group_flag: Rate = Field(0.25, description="Chance of a matrix to be flagged; one at least is.")
    crossover: Probability = Field(0.3, description="Chance of a merging child to have two parents.")
    front_prob: Probability = Field(
        0.6, description="Chance of a row, or of a matrix that is not flagged, to be the first parent's."
    )
    norm_prob: Probability = Field(
        0.1, description="Chance of a child to have every row of its merging coefficients divided by its sum."
    )
    parent_gap: float = Field(
        3.0, ge=0.0, description="Points below the best down to which an individual can be a parent."
    )
    cross_gap: float = Field(1.0, ge=0.0, description="The same, for children of two parents.")
    cross_rank: int = Field(6, ge=2, description="So many of the best can be these in any case.")
    dev_top: int = Field(20, ge=1, description="So many of the best are scored again on splits.dev.")
    router: Literal["onehot", "free"] = Field(
        "onehot",
        description="onehot: the router keeps one of its rows for every expert, and only experts are merged; "
        "free: its weights are mixed as well, as published.",
    )
    export: Literal["stock", "stock-projected", "custom"] = Field(
        "stock",
        description="stock: opens without code of its own; stock-projected: as stock, after a free router is "
        "rounded to one row for every expert; custom: with code beside the weights, for a free router.",
    )
    lag: int = Field(
        1,
        ge=1,
        le=10_000,
        description="A child is bred from what was evaluated up to so many places before it, so that as many "
        "evaluations can go on at once. Changes the result; how many processes there are does not.",
    )
    random_draws: int = Field(
        30,
        ge=0,
        le=10_000,
        description="Random choices of experts that the result is compared with on the test items; their "
        "mean and deviation are reported. 0: none.",
    )
    fitness: FitnessSettings = Field(
        FitnessSettings.model_validate({}), description="What an individual is judged by."
    )
    splits: SplitSettings = Field(SplitSettings.model_validate({}), description="What it is judged on.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Of the search and of the splits; null: the recipe's."
    )

    @property
    def searches(self) -> bool:
        """Whether experts are searched, and not named."""
        return self.experts is None

    @property
    def uses_ray(self) -> bool:
        """Whether anything is evaluated."""
        return self.searches

    @property
    def merges(self) -> bool:
        """Whether coefficients are searched, or only experts chosen."""
        return self.searches and (self.keep_experts is None or self.total_evals > self.prune_evals)

    def kept(self, experts: int) -> int:
        """Return how many experts of a layer stay.

        Args:
            experts: of a layer of the model.

        Raises:
            PlanError: that is no whole number, or not from 1 to `experts`, or fewer than are active.
        """
        keep = self.keep_experts
        if self.experts is not None:
            count = len(next(iter(self.experts.values())))
        elif isinstance(keep, float):
            count = round(experts * keep)
            if count < 1 or abs(experts * keep - count) > _EXACT * experts:
                raise PlanError(
                    f"keep_experts: {keep:g} of {experts} experts is {experts * keep:g}, no whole number",
                    hint="write the number of experts that stay",
                )
        else:
            count = experts if keep is None else keep
        if count > experts:
            raise PlanError(f"keep_experts: {count} are to stay, but a layer has {experts} experts")
        if self.active_experts is not None and self.active_experts > count:
            raise PlanError(f"active_experts: {self.active_experts} of {count} experts that stay")
        return count

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        # What is validated from there on is Python, where a list is no tuple and "0" no number.
        if isinstance(value, dict) and isinstance(value.get("experts"), dict):
            experts = {
                int(layer) if isinstance(layer, str) and layer.isdecimal() else layer: (
                    tuple(kept) if isinstance(kept, list) else kept
                )
                for layer, kept in value["experts"].items()
            }
            return {**value, "experts": experts}
        return value

    @model_validator(mode="after")
    def _counts(self) -> EepSettings:
        keep = self.keep_experts
        if isinstance(keep, float) and not 0.0 < keep < 1.0:
            raise ValueError(f"keep_experts {keep!r} is no share between 0 and 1, and no whole number")
        if isinstance(keep, int) and keep < 1:
            raise ValueError("keep_experts: at least one expert stays")
        if isinstance(keep, int) and (self.active_experts or 0) > keep:
            raise ValueError(f"active_experts {self.active_experts} is more than keep_experts {keep}")
        return self

    @model_validator(mode="after")
    def _given(self) -> EepSettings:
        if self.experts is None:
            return self
        for name in type(self).model_fields:
            if name not in _OF_GIVEN and self.changed(name):
                raise ValueError(f"{name} has no effect with experts: nothing is searched")
        if not self.experts:
            raise ValueError("experts: name the layers and which of their experts stay")
        for layer, kept in self.experts.items():
            if layer < 0 or not kept or len(set(kept)) != len(kept):
                raise ValueError(
                    f"experts: {list(kept)} of layer {layer} are not distinct experts of a layer"
                )
        counts = sorted({len(kept) for kept in self.experts.values()})
        if len(counts) > 1:
            raise ValueError(f"experts: layers keep {counts[0]} to {counts[-1]} experts, not equally many")
        if (self.active_experts or 0) > counts[0]:
            raise ValueError(f"active_experts {self.active_experts} is more than the {counts[0]} that stay")
        return self

    @model_validator(mode="after")
    def _phases(self) -> EepSettings:
        if self.experts is not None:
            return self
        if self.keep_experts is None:
            self._refuse(_FIRST_PHASE, "without keep_experts: all experts stay")
            return self
        first = self.init_random + (len(HEURISTICS) if self.seed_heuristics else 0)
        if self.prune_evals < first:
            raise ValueError(f"prune_evals {self.prune_evals} is less than the {first} first individuals")
        if self.total_evals < self.prune_evals:
            raise ValueError(f"total_evals {self.total_evals} is less than prune_evals {self.prune_evals}")
        if not self.merges:
            self._refuse(_SECOND_PHASE, "with total_evals as prune_evals: nothing is merged")
        return self

    @model_validator(mode="after")
    def _shipped(self) -> EepSettings:
        if self.router == "free" and self.export == "stock":
            raise ValueError("export: stock cannot hold router: free; write stock-projected or custom")
        if self.router == "onehot" and self.export != "stock":
            raise ValueError(f"export: {self.export} has no effect with router: onehot; write stock")
        return self

    @model_validator(mode="after")
    def _judged(self) -> EepSettings:
        if self.splits.dev is None and self.changed("dev_top"):
            raise ValueError("dev_top has no effect without splits.dev")
        if self.splits.all_files and self.fitness.data is not None:
            raise ValueError("fitness.data has no effect where every split is a file of its own")
        return self

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if self.changed(name):
                raise ValueError(f"{name} has no effect {why}")
