"""Settings of the pruning methods. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from .sizes import bytes_of, count_of
from .stage_base import Phase, StageSettings

Share = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
"""What is removed of something: 0 nothing, 1 (excluded) all of it."""
_AMOUNT: dict[str, Any] = {
    "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "examples": ["4.2G", "20.7M"]}]
}
Amount = Annotated[
    float,
    BeforeValidator(count_of),
    Field(gt=0.0, allow_inf_nan=False),
    WithJsonSchema(_AMOUNT),
]
SizeAmount = Annotated[
    float,
    BeforeValidator(bytes_of),
    Field(gt=0.0, allow_inf_nan=False),
    WithJsonSchema(_AMOUNT),
]


_LEAST_AMOUNT = 100.0  # what lies between it and 1 is a share gone wrong


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RatioSettings(_Settings):
    """The removed share of every kind of sub-structure; classes of one kind all lose this share."""

    width: Share = Field(0.0, description="Of the channels of the residual stream.")
    ff: Share | None = Field(
        None, description="Of the inner channels of feed-forward networks; null: as `width`."
    )
    heads: Share = Field(0.0, description="Of the attention heads of the whole model.")
    head_dim: Share = Field(0.0, description="Of the channels of the heads.")
    modules: dict[str, Share] = Field(
        default_factory=dict,
        description="Pattern of layer names -> share: layers ranked among themselves, with a share of their "
        "own. A layer is the one whose outputs are removed: the first of a feed-forward network, an "
        "attention's query projection (its head channels).",
    )

    @property
    def inner(self) -> float:
        """The removed share of feed-forward networks."""
        return self.width if self.ff is None else self.ff


class TargetSettings(_Settings):
    """What the pruned model may take. At most 1: a share of the original's; several limits are all kept."""

    macs: Amount | None = Field(
        None, description="Multiply-accumulates of one forward at the reference input, as `4.2G` or a share."
    )
    parameters: Amount | None = Field(None, description="Parameters, as `20.7M` or a share.")
    bytes: SizeAmount | None = Field(None, description="Tensor bytes, as `80MB` or a share.")

    @model_validator(mode="after")
    def _some(self) -> TargetSettings:
        if self.macs is None and self.parameters is None and self.bytes is None:
            raise ValueError("a target needs macs, parameters or bytes")
        for name in ("macs", "parameters", "bytes"):
            value = getattr(self, name)
            if value is not None and 1.0 < value < _LEAST_AMOUNT:
                raise ValueError(
                    f"{name}: {value:g} is neither a share, which is at most 1, nor an amount, as 4.2G"
                )
        return self


class IsomorphicSettings(StageSettings):
    """Isomorphic Pruning (arXiv 2407.04616): sub-structures of one form compete among themselves."""

    method: ClassVar[str] = "isomorphic"
    phase: ClassVar[Phase] = "prune"
    families: ClassVar[frozenset[str]] = frozenset({"vit", "convnext", "swin", "dit", "pixart"})

    ratios: RatioSettings | None = Field(
        None,
        description="Removed shares. With a target they are proportions: all are scaled alike until the "
        "target is met.",
    )
    target: TargetSettings | None = Field(
        None, description="Find the shares that meet a limit; without ratios in the paper's proportions."
    )
    ranking: Literal["isomorphic", "global", "local"] = Field(
        "isomorphic",
        description="Who competes: isomorphic sub-structures of all layers, everything of a kind of share "
        "(global), or each layer with itself (local). The last two are baselines.",
    )
    importance: Literal["taylor", "magnitude"] = Field(
        "taylor", description="taylor: |sum of gradient * weight| on calibration samples; magnitude: no data."
    )
    loss: Literal["cross_entropy", "pseudo_labels", "output_norm", "denoising"] | None = Field(
        None,
        description="Whose gradient: cross_entropy needs labels, pseudo_labels takes the model's own answers,"
        " output_norm the mean square of its outputs, denoising the error of a denoiser on its own "
        "samples. null: cross_entropy of a classifier, denoising of a denoiser.",
    )
    normalizer: Literal["mean", "none"] = Field(
        "mean", description="mean: divide the scores of every layer by their mean, as the official code does."
    )
    head_dim_mode: Literal["per_head", "shared"] = Field(
        "per_head", description="Every head loses its own least channels, or all heads of a layer the same."
    )
    attn_scale: Literal["preserve", "reset"] = Field(
        "preserve",
        description="preserve: fold the change of the softmax scale into the queries, so that removed "
        "channels are all that changes; reset: let the scale follow the new size, as the official code.",
    )
    round_to: int = Field(
        8, ge=1, le=1024, description="Widths are multiples of this where they change; 2 in the paper."
    )
    rounding: Literal["down", "nearest"] = Field(
        "down", description="down: to the next smaller multiple, as the official code does."
    )
    steps: int = Field(
        1, ge=1, le=100, description="Remove the share in so many equal steps, with new scores for each."
    )
    keep: tuple[str, ...] = Field((), description="Patterns of layers of which nothing is removed.")
    baselines: tuple[Literal["global", "local"], ...] = Field(
        (), description="Rankings whose loss at equal cost is measured too, for the report; costs time."
    )

    @model_validator(mode="before")
    @classmethod
    def _explain_ranking(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "global_pruning" in value:
            raise ValueError(
                "global_pruning: isomorphic sub-structures are ranked over all layers by definition, and "
                "pruning them layer by layer is `ranking: local`; leave the key out"
            )
        # What is validated from here on is Python, where a list is no tuple; in JSON it is.
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}

    @model_validator(mode="after")
    def _removes_something(self) -> IsomorphicSettings:
        ratios = self.ratios
        if ratios is None and self.target is None:
            raise ValueError("nothing says how much is removed; write ratios, or a target")
        if ratios is not None and not any(
            (ratios.width, ratios.inner, ratios.heads, ratios.head_dim, *ratios.modules.values())
        ):
            raise ValueError("all ratios are 0, so nothing would be removed")
        if self.importance == "magnitude" and self.loss is not None:
            raise ValueError("loss has no effect with importance: magnitude")
        if self.ranking in self.baselines:
            raise ValueError(f"baselines: {self.ranking} is the ranking itself")
        return self
