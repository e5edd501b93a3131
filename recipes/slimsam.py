"""Settings of SlimSAM. Torch-free."""

from __future__ import annotations

from math import ceil
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .stage_base import Phase, StageSettings

Ranking = Literal["uniform", "global"]
Normalizer = Literal["gaussian", "mean", "max", "sum", "min_max"]
PAPER_FEATURE_EPOCHS = 10


class SlimSamSettings(StageSettings):
    """SlimSAM (arXiv 2312.05284): a Segment Anything encoder becomes narrower in turns, and learns between.

    First the residual stream (embedding) is pruned and aligned with the original, then heads' channels and
    inner channels (bottleneck). Prompt encoder and mask decoder stay as they are.
    """

    method: ClassVar[str] = "slimsam"
    phase: ClassVar[Phase] = "prune"
    families: ClassVar[frozenset[str]] = frozenset({"sam"})
    hurts: ClassVar[bool] = False  # it trains what it leaves

    ratio: float = Field(
        gt=0.0,
        lt=1.0,
        description="Removed share of the embedding and of the bottleneck alike; 0.5 and 0.77 in the paper.",
    )
    ranking: Ranking = Field(
        "uniform",
        description="Who competes in the bottleneck: the channels of a layer, so that all layers are equally "
        "wide and the stock class loads the result (uniform), or those of all layers, which needs "
        "compress to load (global).",
    )
    normalizer: Normalizer = Field(
        "gaussian",
        description="Of the scores of a layer before layers compete (global): gaussian: less their mean, by "
        "their deviation; mean, max, sum: divided by it; min_max: from 0 to 1.",
    )
    sigma: float = Field(
        0.01,
        ge=1e-6,
        le=1e3,
        description="Deviation of the noise that disturbs the embedding which scores are gradients towards; "
        "the choice does not depend on it, but without noise there is no gradient.",
    )
    gradients: Literal["summed", "per_image"] = Field(
        "summed",
        description="summed: |weight * sum of gradients| over calibration.samples images, as published; "
        "per_image: sum of |weight * gradient|.",
    )
    attn_scale: Literal["preserve", "reset"] = Field(
        "preserve",
        description="preserve: fold the change of the softmax scale into the keys, so that removed "
        "channels are all that changes; reset: let the scale follow the new size, as the official code.",
    )
    rel_pos: Literal["slice", "zero"] = Field(
        "slice",
        description="Tables of relative positions keep the columns of the channels that stay (slice), or "
        "start again from zero, as the official code.",
    )
    round_to: int | None = Field(
        None, ge=1, le=1024, description="Widths are multiples of this; null: of the number of heads."
    )
    slimming: Literal["alternate", "one_step"] = Field(
        "alternate",
        description="alternate: the embedding is pruned and aligned, then the bottleneck; one_step: both are "
        "pruned at once and aligned for as many steps with the original's output, a baseline.",
    )
    features: bool = Field(
        True,
        description="Align inner features too, which the part that was not pruned makes comparable; false: "
        "outputs alone, a baseline.",
    )
    epochs: float | None = Field(
        None, gt=0.0, le=10000.0, description="Passes over the images of each aligning; null: 20, or `steps`."
    )
    steps: int | None = Field(None, ge=1, description="Optimizer steps of each aligning, instead of epochs.")
    feature_weight: float = Field(
        0.5, ge=0.0, le=1.0, description="Share of the features in the loss of the first aligning."
    )
    feature_epochs: int = Field(
        PAPER_FEATURE_EPOCHS,
        ge=1,
        le=10000,
        description="Epochs in which features count: constantly in the first aligning, with a share that "
        "falls linearly to 0 in the second.",
    )
    batch_size: int = Field(4, ge=1, le=4096, description="Images of an optimizer step, on all devices.")
    accumulate: int | None = Field(
        None, ge=1, le=4096, description="Parts that a batch is computed in, one by one; null: single images."
    )
    lr: float = Field(1e-4, gt=0.0, le=1.0, description="Learning rate of Adam at the start of an aligning.")
    patience: int = Field(
        4,
        ge=1,
        le=1000,
        description="The learning rate is halved after so many epochs in which the choice images did not "
        "improve.",
    )
    choice_images: int = Field(
        50,
        ge=1,
        le=100_000,
        description="Images that are not trained on, by which the epoch is chosen whose weights stay: by "
        "mIoU with their masks, by the error of the output where they have none.",
    )
    recompute: bool = Field(
        True,
        description="Compute the layers again on the way back instead of keeping their activations: less "
        "memory, a third more time.",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the arithmetic (autocast); weights are trained in float32."
    )
    checkpoint_every: int = Field(
        200, ge=1, description="Steps between states on disk, from which a killed run goes on."
    )

    @property
    def length(self) -> tuple[int | None, float | None]:
        """(steps, epochs) of each aligning; one of them is None."""
        return (self.steps, None) if self.steps is not None else (None, self.epochs or 20.0)

    def steps_for(self, images: int) -> int:
        """Return the optimizer steps of each aligning on so many images; the last may go over their end."""
        steps, epochs = self.length
        return steps if steps is not None else max(1, ceil((epochs or 0) * images / self.batch_size))

    @property
    def parts(self) -> int:
        """How many parts a batch is computed in."""
        return self.accumulate or self.batch_size

    @field_validator("sigma", mode="before")
    @classmethod
    def _noise(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
            raise ValueError(
                "without noise the gradient of every weight is 0, so nothing can be ranked; 0.01 is published"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> SlimSamSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("say how long: write either steps or epochs")
        if self.accumulate is not None and self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if self.ranking == "uniform" and self.changed("normalizer"):
            raise ValueError("normalizer has no effect with ranking: uniform")
        with_features = self.features and self.slimming == "alternate"
        for name in ("feature_weight", "feature_epochs"):
            if not with_features and self.changed(name):
                off = "features: false" if not self.features else "slimming: one_step"
                raise ValueError(f"{name} has no effect with {off}")
        if self.slimming == "one_step" and not self.features:
            raise ValueError("features has no effect with slimming: one_step, which aligns outputs alone")
        return self
