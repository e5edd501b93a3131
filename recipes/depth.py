"""Settings of the methods that remove whole blocks. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from .stage_base import Phase, StageSettings

FAMILIES = frozenset({"dit", "pixart", "sd3", "flux", "hunyuan"})
GROUP = r"^[1-9][0-9]{0,2}:[1-9][0-9]{0,2}$"
"""Pattern of a group."""
Group = Annotated[str, StringConstraints(pattern=GROUP)]
"""`N:M`: of M consecutive blocks N stay."""
Groups = Group | Annotated[tuple[Group, ...], Field(min_length=1)]
# Strict: `true` is no count, though it is a number to Python.
Places = tuple[Annotated[int, Field(ge=0, strict=True)], ...]
Amount = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)]
SETTLED = 0.9
"""A learned choice with less than this probability is called open."""


def pair_of(group: str) -> tuple[int, int]:
    """Return (N, M) of `N:M`."""
    kept, size = group.split(":")
    return int(kept), int(size)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _lists_as_tuples(value: Any) -> Any:
    # What is validated from there on is Python, where a list is no tuple; in JSON it is.
    if isinstance(value, dict):
        return {key: _lists_as_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


class LoraSettings(_Settings):
    """Low-rank changes of every linear layer, with which a search looks ahead; thrown away afterwards."""

    rank: int = Field(8, ge=1, le=1024, description="Of the change of a layer.")
    alpha: float | None = Field(
        None, gt=0.0, description="The change is multiplied by alpha / rank; null: alpha is twice the rank."
    )


class TinyFusionSettings(StageSettings):
    """TinyFusion (arXiv 2412.01199): which blocks stay is learned, with an eye on how well they recover."""

    method: ClassVar[str] = "tinyfusion"
    phase: ClassVar[Phase] = "prune"
    families: ClassVar[frozenset[str]] = FAMILIES
    learns_from_data: ClassVar[bool] = True

    groups: Groups | dict[str, Groups] = Field(
        "2:4",
        description="N:M: of every M consecutive blocks N stay; repeated to the model's depth, or a list of "
        "such groups that add up to it. Of models with several lists of blocks: a mapping from list to "
        "groups.",
    )
    mode: Literal["frozen", "lora", "full"] = Field(
        "lora",
        description="What learns beside the choice, and is thrown away: nothing, low-rank changes, or all "
        "weights. Without it blocks stay that lower the loss at once, not those that recover best.",
    )
    lora: LoraSettings = Field(LoraSettings(), description="Of mode lora.")
    steps: int = Field(10_000, ge=2, description="Optimizer steps; 10,000 of 128 samples in the paper.")
    batch_size: int = Field(128, ge=1, le=65536, description="Samples of an optimizer step, on all devices.")
    accumulate: int = Field(1, ge=1, le=4096, description="Parts that a batch is computed in, one by one.")
    lr: float = Field(1e-4, gt=0.0, le=10.0, description="Of the weights, or of their low-rank changes.")
    gate_lr: float = Field(1e-3, gt=0.0, le=10.0, description="Of the logits that choose.")
    tau: tuple[float, float] = Field(
        (4.0, 0.1), description="Temperature of the choice, first and last step; linear between them."
    )
    scaling: tuple[float, float] = Field(
        (100.0, 100.0), description="What the logits are multiplied by, first and last step."
    )
    clip_norm: float | None = Field(1.0, gt=0.0, description="Largest norm of the gradient; null: any.")
    ema: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Decay of the moving average that the decision is read from; null: the paper's 0.999, or "
        "1 - 10 / steps where that is less.",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the arithmetic (autocast); what is learned stays in float32."
    )
    checkpoint_every: int = Field(
        200, ge=1, description="Steps between states on disk, from which a killed run goes on."
    )

    @property
    def decay(self) -> float:
        """Of the moving average."""
        return (
            min(0.999, 1.0 - 10.0 / self.steps) if self.ema is None and self.steps > 10 else self.ema or 0.0
        )

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return _lists_as_tuples(value)

    @model_validator(mode="after")
    def _fits(self) -> TinyFusionSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if min(*self.tau, *self.scaling) <= 0:
            raise ValueError("tau and scaling are above 0")
        if self.mode != "lora" and self.changed("lora"):
            raise ValueError(f"lora has no effect with mode: {self.mode}")
        if self.mode == "frozen" and self.changed("lr"):
            raise ValueError("lr has no effect with mode: frozen; gate_lr is the rate of what is learned")
        return self


class DepthSettings(StageSettings):
    """Remove whole blocks by a rule: the baselines of learned depth pruning, or a list of your own."""

    method: ClassVar[str] = "depth"
    phase: ClassVar[Phase] = "prune"
    families: ClassVar[frozenset[str]] = FAMILIES

    by: Literal["shortgpt", "flux_lite", "sensitivity", "oracle", "random", "indices"] = Field(
        description="shortgpt: the blocks that turn their input least go; flux_lite: those that change it "
        "least; sensitivity: those without which the loss rises least; oracle: of every pair the first stays "
        "in the first half of the model, the second in the second; random: of random choices the one with "
        "the least, the middle or the largest loss; indices: those of `keep` stay.",
    )
    keep: Amount | Places | dict[str, Amount | Places] = Field(
        0.5,
        description="Blocks that stay: a count, a share below 1, or with `by: indices` their places. Of "
        "models with several lists of blocks: a mapping from list to these.",
    )
    draws: int = Field(
        100,
        ge=3,
        le=10_000_000,
        description="Choices that `random` draws; where there are no more, all are measured.",
    )
    pick: Literal["least", "middle", "largest"] = Field("least", description="Which of them, by their loss.")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return _lists_as_tuples(value)

    @model_validator(mode="after")
    def _fits(self) -> DepthSettings:
        values = self.keep.values() if isinstance(self.keep, dict) else (self.keep,)
        for value in values:
            if isinstance(value, tuple) != (self.by == "indices"):
                wanted = "a list of places" if self.by == "indices" else "a count or a share"
                raise ValueError(f"keep is {wanted} with by: {self.by}")
            if isinstance(value, float) and not 0.0 < value < 1.0:
                raise ValueError(f"keep {value:g} is no share between 0 and 1, and no whole number")
            if isinstance(value, int) and value < 1:
                raise ValueError("keep at least one block")
        for name in ("draws", "pick"):
            if self.by != "random" and self.changed(name):
                raise ValueError(f"{name} has no effect with by: {self.by}")
        return self
