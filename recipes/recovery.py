"""Settings of the recovery stages: training after something was removed. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .depth import FAMILIES
from .stage_base import Phase, StageSettings


class DistillSettings(BaseModel):
    """Learning from the original's answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(1.0, gt=0.0, le=1.0, description="Share of this loss; the rest is the labels'.")
    temperature: float = Field(1.0, gt=0.0, le=100.0, description="Of the softened distributions.")
    mode: Literal["soft", "hard"] = Field(
        "soft", description="soft: the whole distribution; hard: the original's best class, as DeiT."
    )


class TrainingSettings(StageSettings):
    """AdamW with a warm-up and a cosine; what all recovery stages share."""

    phase: ClassVar[Phase] = "recover"
    rate_key: ClassVar[str] = "lr"
    """What a recipe calls the learning rate."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps; null: from `epochs`.")
    epochs: float | None = Field(
        None, gt=0.0, le=10000.0, description="Passes over the data, instead of steps."
    )
    batch_size: int = Field(64, ge=1, le=65536, description="Items of an optimizer step, on all devices.")
    accumulate: int = Field(1, ge=1, le=4096, description="Parts that a batch is computed in, one by one.")
    lr: float = Field(5e-4, gt=0.0, le=10.0, description="Largest learning rate.")
    min_lr: float = Field(0.0, ge=0.0, description="Learning rate at the end of the cosine.")
    warmup: float = Field(
        0.05, ge=0.0, lt=1.0, description="Share of the steps in which the learning rate rises linearly."
    )
    weight_decay: float = Field(
        0.05, ge=0.0, le=1.0, description="Of matrices; biases, norms and single parameters have none."
    )
    beta2: float = Field(0.999, gt=0.0, lt=1.0, description="Second moment of AdamW.")
    clip_norm: float | None = Field(1.0, gt=0.0, description="Largest norm of the gradient; null: any.")
    ema: float | None = Field(
        None, gt=0.0, lt=1.0, description="Keep the moving average of the weights with this decay."
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the arithmetic (autocast); weights are trained in float32."
    )
    checkpoint_every: int = Field(
        200, ge=1, description="Steps between states on disk, from which a killed run goes on."
    )

    @model_validator(mode="after")
    def _how_long(self) -> TrainingSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("say how long: write either steps or epochs")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self


class FinetuneSettings(TrainingSettings):
    """Train a classifier on labels, on the original's answers, or on both."""

    method: ClassVar[str] = "finetune"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "convnext", "swin"})

    images: Path | None = Field(
        None, description="What to train on, laid out as calibration.images; null: the images of that."
    )
    distill: DistillSettings | None = Field(
        None, description="Learn from the original as well; null: from labels alone."
    )
    label_smoothing: float = Field(0.1, ge=0.0, lt=1.0, description="Of the labels' loss.")
    mixup: float = Field(0.0, ge=0.0, le=10.0, description="Alpha of mixup (arXiv 1710.09412); 0: none.")
    augment: tuple[Literal["flip", "shift"], ...] = Field(
        ("flip",), description="flip: mirrored half of the time; shift: moved by up to an eighth."
    )


class MaskedDistillSettings(TrainingSettings):
    """Train a denoiser on its own loss, on the original's answers, and on what its blocks compute."""

    method: ClassVar[str] = "distill"
    families: ClassVar[frozenset[str]] = FAMILIES
    learns_from_data: ClassVar[bool] = True

    batch_size: int = Field(256, ge=1, le=65536, description="Samples of an optimizer step, on all devices.")
    lr: float = Field(2e-4, gt=0.0, le=10.0, description="Learning rate at the start of the cosine.")
    min_lr: float = Field(1e-4, ge=0.0, description="Learning rate at its end.")
    warmup: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of the steps in which the learning rate rises linearly."
    )
    weight_decay: float = Field(
        0.0, ge=0.0, le=1.0, description="Of matrices; biases, norms and single parameters have none."
    )
    ema: float | None = Field(
        0.9999, gt=0.0, lt=1.0, description="Keep the moving average of the weights with this decay."
    )
    teacher: str | None = Field(
        None,
        min_length=1,
        description="A Hub id or a folder: another model to learn from, of the same class, that sees and "
        "predicts the same on the same schedule of noise; null: the original, as it was before the first "
        "stage.",
    )
    answers: float = Field(
        0.9, ge=0.0, le=100.0, description="Weight of the distance to the original's predictions."
    )
    denoising: float = Field(
        0.1, ge=0.0, le=100.0, description="Weight of the loss that denoisers are trained with; 1 with the "
        "others 0 is plain fine-tuning.",
    )  # fmt: skip
    features: float = Field(
        0.01,
        ge=0.0,
        le=100.0,
        description="Weight of the distance between what matching blocks put out, at the first step; it "
        "falls linearly to 0 at the last. The paper has 0.01 for DiT and 0.0002 for SiT.",
    )
    mask: Literal["zero", "exclude", "none"] = Field(
        "zero",
        description="What becomes of values far from their mean in that distance, of the two models each by "
        "its own: zero: they count as 0, as published; exclude: where one is far, neither counts; none: all "
        "of them count.",
    )
    sigmas: float = Field(
        2.0, gt=0.0, le=1000.0, description="Standard deviations from the mean from which a value is far."
    )

    @model_validator(mode="after")
    def _towards_something(self) -> MaskedDistillSettings:
        if not (self.answers or self.denoising or self.features):
            raise ValueError("answers, denoising and features are all 0, so there is nothing to learn")
        for name in ("mask", "sigmas"):
            if not self.features and self.changed(name):
                raise ValueError(f"{name} has no effect with features: 0")
        if self.teacher is not None and not self.asks_original:
            raise ValueError("teacher has no effect with answers: 0 and features: 0")
        if self.mask == "none" and self.changed("sigmas"):
            raise ValueError("sigmas has no effect with mask: none")
        return self

    @property
    def asks_original(self) -> bool:
        """Whether the original answers beside the model."""
        return bool(self.answers or self.features)
