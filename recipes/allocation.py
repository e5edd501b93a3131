"""Settings of a bit allocation: what may be chosen for a layer, and under which budget. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from .sizes import SIZE_PATTERN, bytes_of

AllocatedBits = Literal[2, 3, 4, 6, 8, 16]
AllocatedActivationBits = Literal[4, 6, 8, 16]

FLOAT_BITS = 16
"""What stands for floating point among offered bits, whatever the model's own type is."""

ALLOCATED = "allocated: "
"""Beginning of the rule that decided a layer whose bits were chosen, as it stands in a checkpoint."""

NAME = r"^[A-Za-z0-9_-]+$"
"""Pattern of the names of groups of layers."""

Item = TypeVar("Item", bound=int)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _each_once(values: tuple[Item, ...]) -> tuple[Item, ...]:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is there twice")
    return values


SizeBytes = Annotated[
    int,
    BeforeValidator(bytes_of),
    Field(ge=1),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE_PATTERN}]}
    ),
]
OfferedBits = Annotated[tuple[AllocatedBits, ...], Field(min_length=1), AfterValidator(_each_once)]
OfferedActivationBits = Annotated[
    tuple[AllocatedActivationBits, ...], Field(min_length=1), AfterValidator(_each_once)
]
Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class BudgetSettings(_Settings):
    """What the weights may take; several limits are all kept."""

    mean_bits: float | None = Field(
        None,
        gt=0.0,
        le=16.0,
        description="Average bits of the layers that have a choice, weighted by their weights; scales and"
        " biases are not counted, as in arXiv 2405.17873.",
    )
    bytes: SizeBytes | None = Field(
        None,
        description="Bytes of all tensors of the model after the stage, scales and biases included: a number,"
        " or text such as 1.5 MB (decimal units).",
    )
    ratio: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="The same as a share of the tensor bytes before the stage; the gate `size_ratio` counts"
        " alike.",
    )

    @model_validator(mode="after")
    def _any(self) -> BudgetSettings:
        if self.mean_bits is None and self.bytes is None and self.ratio is None:
            raise ValueError("the budget is empty; give mean_bits, bytes or ratio, or several of them")
        return self


class ActivationBudgetSettings(_Settings):
    """Which inputs stay in more bits than the fewest offered."""

    mean_bits: float | None = Field(
        None, gt=0.0, le=16.0, description="Average bits of the inputs, weighted by their elements."
    )
    protect: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="Share of the layers, by count, whose inputs stay in floating point: those that lose most"
        " (0.01 in arXiv 2405.17873).",
    )

    @model_validator(mode="after")
    def _one(self) -> ActivationBudgetSettings:
        if (self.mean_bits is None) == (self.protect is None):
            raise ValueError("give mean_bits or protect, one of the two")
        return self


class GroupSettings(_Settings):
    """Layers whose sensitivity is measured alike."""

    layers: Patterns = Field(description="Patterns of full layer names; `*` matches within and across dots.")
    metric: Literal["sqnr_db", "ssim"] = Field(
        "sqnr_db", description="sqnr_db: error power of the output; ssim: structural similarity (images)."
    )
    bits: OfferedBits | None = Field(None, description="Weight bits offered in the group; null: the stage's.")
    activation_bits: OfferedActivationBits | None = Field(
        None, description="Activation bits offered in the group; null: the stage's."
    )


class SensitivitySettings(_Settings):
    """What the sensitivities are measured on."""

    samples: int = Field(
        8,
        ge=1,
        description="Calibration samples (of a language model: sequences) that are measured on. Allocations"
        " are compared on as many others, so `calibration.samples` should be twice this.",
    )
    steps: int = Field(
        8, ge=1, le=1000, description="Timesteps of each, evenly spread; of no meaning for language models."
    )
    table: Path | None = Field(
        None, description="File of an earlier measurement of the same model and settings; null: measure."
    )


class AllocationSettings(_Settings):
    """A choice of bits for every layer, so that the model loses least under a budget."""

    budget: BudgetSettings = Field(description="What the weights may take: mean_bits, bytes, ratio.")
    bits: OfferedBits = Field(
        (2, 3, 4, 6, 8, 16),
        description="Weight bits offered; 16 is floating point. The paper has 2, 4 and 8.",
    )
    activation_bits: OfferedActivationBits = Field(
        (8,), description="Activation bits offered; 16 is floating point."
    )
    activation_budget: ActivationBudgetSettings | None = Field(
        None, description="Decides among several activation_bits: mean_bits or protect."
    )
    objective: Literal["power", "mixdq"] = Field(
        "power",
        description="power: least sum of relative error powers; mixdq: the paper's largest sum of decibels"
        " and similarities (arXiv 2405.17873), where 16 bits, which it does not offer, count 6.02 dB a bit.",
    )
    groups: dict[Annotated[str, Field(pattern=NAME)], GroupSettings] | None = Field(
        None, description="Name -> layers and their metric; null: those of the model's family."
    )
    experts: Literal["together", "each"] = Field(
        "together",
        description="Of a mixture of experts. together: the gates of all experts of a layer take one choice,"
        " their ups another, their downs a third, and are measured so; each: every expert's layers have"
        " choices of their own and are measured by themselves; one that no token meets counts as losing"
        " nothing.",
    )
    points: int = Field(12, ge=1, le=200, description="Allocations that are tried and measured, at most.")
    fixed: dict[str, AllocatedBits] = Field(
        default_factory=dict, description="Pattern of layer names -> weight bits that are not to be chosen."
    )
    fixed_activations: dict[str, AllocatedActivationBits] = Field(
        default_factory=dict,
        description="Pattern of layer names -> activation bits that are not to be chosen.",
    )
    sensitivity: SensitivitySettings = Field(
        SensitivitySettings.model_validate({}), description="What the sensitivities are measured on."
    )

    @property
    def quantizes_activations(self) -> bool:
        """Whether any layer's input may get less than floating point."""
        offered = {*self.activation_bits, *self.fixed_activations.values()}
        for group in (self.groups or {}).values():
            offered |= {*(group.activation_bits or ())}
        return offered != {FLOAT_BITS}

    @model_validator(mode="after")
    def _check_activations(self) -> AllocationSettings:
        offered = {*self.activation_bits}
        for group in (self.groups or {}).values():
            offered |= {*(group.activation_bits or ())}
        if len(offered) > 1 and self.activation_budget is None:
            raise ValueError(
                f"activation_bits offers {', '.join(map(str, sorted(offered)))}, but nothing decides among"
                " them; give activation_budget"
            )
        if len(offered) == 1 and self.activation_budget is not None:
            raise ValueError(
                f"activation_budget has nothing to decide: activation_bits offers {min(offered)} alone"
            )
        mean = None if self.activation_budget is None else self.activation_budget.mean_bits
        if mean is not None and not min(offered) <= mean <= max(offered):
            raise ValueError(
                f"activation_budget.mean_bits: {mean:g} bits cannot be kept or used; from {min(offered)} to"
                f" {max(offered)} bits can be asked"
            )
        protect = self.activation_budget is not None and self.activation_budget.protect is not None
        if protect and (FLOAT_BITS not in offered or len(offered) != 2):
            raise ValueError("activation_budget.protect needs activation_bits to be 16 and one other number")
        return self

    @model_validator(mode="after")
    def _check_bits(self) -> AllocationSettings:
        offered = {*self.bits}
        for group in (self.groups or {}).values():
            offered |= {*(group.bits or ())}
        if len(offered) == 1:
            raise ValueError(f"bits offers {min(offered)} alone: there is nothing to choose")
        return self
