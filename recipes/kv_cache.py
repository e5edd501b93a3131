"""Settings of the method that compresses the key-value cache. Torch-free."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from .stage_base import Phase, StageSettings

FAMILIES = frozenset({"llm", "moe"})
DEFAULT_KEY_GROUP, MOST_KEY_GROUP = 32, 2**12
KEY_PART = Fraction(3, 8)
"""Of the channels that a total leaves, the part that keys get; values get the rest.

Values have the longer tail. Of the published splits at 75 % (arXiv 2409.10593, its ablation of K and V) the
best keeps 18.75 % of the keys and 31.25 % of the values, which is this; at 50 % it is better than an even
split, and a quarter for the keys is better still. Of those at 50 % it is the best of the built-in model.
"""

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class RemovedSettings(BaseModel):
    """Shares of the channels that the cache does without, of keys and of values."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    k: Share = Field(description="Of the keys; 0: none.")
    v: Share = Field(description="Of the values; 0: none.")


def _form(value: Any) -> str:
    return "number" if isinstance(value, int | float) else "mapping"


# One of the two is validated, so that an error names its key inside the mapping.
Removed = Annotated[
    Annotated[RemovedSettings, Tag("mapping")] | Annotated[Share, Tag("number")], Discriminator(_form)
]


class CskvSettings(StageSettings):
    """CSKV (arXiv 2409.10593): a cache of few channels of keys and values, and of the latest ones exactly."""

    method: ClassVar[str] = "cskv"
    phase: ClassVar[Phase] = "plan"
    families: ClassVar[frozenset[str]] = FAMILIES

    removed: Removed = Field(
        0.8,
        description="Share of the channels that is removed: one of keys and one of values, {k: 0.85, v: 0.75}"
        " say, or a number for both together, of whose rest keys get 3/8 and values 5/8. What a rank cannot"
        " be is rounded to more removed; the plan tells the true share.",
    )
    ranks: Literal["heads", "channels"] = Field(
        "heads",
        description="heads: every KV head's share of the kept channels is a whole number, as published (at"
        " 0.8 of 128 channels 25 stay, so that 0.8047 are removed); channels: any number of channels.",
    )
    allocate: Literal["uniform", "energy"] = Field(
        "uniform",
        description="uniform: all layers keep equally many channels; energy: as many in all, of keys and of"
        " values, dealt out over the layers so that the sum of the lost shares of variance is least.",
    )
    init: Literal["whiten", "asvd", "svd", "random"] = Field(
        "whiten",
        description="whiten: the factors with the least error on the calibration, in closed form; asvd: as"
        " published, the weight's singular vectors with input channels scaled by their mean magnitude; svd:"
        " without that; random: for comparison, needs steps.",
    )
    alpha: float = Field(
        0.5, ge=0.0, le=1.0, description="Of init: asvd: exponent of the input channels' magnitude."
    )
    steps: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Optimizer steps of every layer's factors, on its own error; 0: none. whiten leaves"
        " them nothing to find unless bits are given.",
    )
    lr: float = Field(
        5e-5, gt=0.0, le=10.0, description="Learning rate of the first step; falls linearly to 0."
    )
    batch_tokens: int = Field(1024, ge=1, le=2**20, description="Tokens of the calibration in a step.")
    qat: Literal["auto"] | bool = Field(
        "auto", description="Train through the rounding of the cache; auto: where bits are given."
    )
    window: int = Field(32, ge=0, le=2**24, description="Latest tokens that are kept exactly as well.")
    mode: Literal["sliding", "block"] = Field(
        "sliding",
        description="sliding: always the last `window` tokens are exact; block: those after the last whole"
        " block of `window` tokens, so that their number goes from 0 to window - 1.",
    )
    bits: Literal[2, 4] | None = Field(
        None, description="Bits of a stored number; null: the model's own type, nothing is rounded."
    )
    key_group: int | None = Field(
        None,
        ge=1,
        le=MOST_KEY_GROUP,
        description="Of bits: consecutive tokens of a key's channel that share a scale; null: 32, or window"
        " with mode: block.",
    )

    @property
    def kept(self) -> tuple[Fraction, Fraction]:
        """Shares of the channels of keys and of values that stay, exactly as they are written in decimals."""
        if isinstance(self.removed, RemovedSettings):
            return 1 - _exact(self.removed.k), 1 - _exact(self.removed.v)
        both = 2 * (1 - _exact(self.removed))
        values = min(Fraction(1), both * (1 - KEY_PART))
        return both - values, values

    @property
    def is_total(self) -> bool:
        """Whether `removed` is one number for keys and values together."""
        return not isinstance(self.removed, RemovedSettings)

    @property
    def tokens_per_scale(self) -> int:
        """Consecutive tokens of a key's channel that share a scale, where the cache is rounded."""
        if self.bits is not None and self.mode == "block":
            return self.key_group or self.window
        return self.key_group or DEFAULT_KEY_GROUP

    @property
    def trains_through_rounding(self) -> bool:
        """Whether training rounds as the cache does."""
        return self.steps > 0 and self.bits is not None and self.qat is not False

    @model_validator(mode="after")
    def _has_effect(self) -> CskvSettings:
        if min(self.kept) == 1 and self.bits is None:
            raise ValueError(
                "removed: nothing is removed and nothing is rounded; remove a share, or give bits"
            )
        if self.init != "asvd" and self.changed("alpha"):
            raise ValueError(f"alpha has no effect with init: {self.init}")
        for name in ("lr", "batch_tokens", "qat"):
            if not self.steps and self.changed(name):
                raise ValueError(f"{name} has no effect without steps")
        for name in ("key_group", "qat"):
            if self.bits is None and self.changed(name):
                raise ValueError(f"{name} has no effect without bits")
        return self

    @model_validator(mode="after")
    def _fits(self) -> CskvSettings:
        if self.init == "random" and not self.steps:
            raise ValueError("init: random without steps is noise; give steps, or another init")
        if self.mode == "block" and self.window == 0:
            raise ValueError("mode: block needs a window of at least one token")
        group = self.tokens_per_scale
        if self.bits is not None and self.mode == "block" and group != self.window:
            raise ValueError(
                f"key_group {group} is not the window of {self.window} tokens, which mode: block rounds"
                " together; leave key_group out"
            )
        if group > MOST_KEY_GROUP:
            raise ValueError(
                f"window {group} with bits and mode: block; at most {MOST_KEY_GROUP} tokens share a scale"
            )
        if self.trains_through_rounding and self.batch_tokens % group:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is no multiple of the {group} tokens that share a scale"
            )
        return self


def _exact(share: float) -> Fraction:
    # 1 - 0.9 is a little less than a tenth in binary, and a tenth of 20 channels would be one.
    return Fraction(str(share))
