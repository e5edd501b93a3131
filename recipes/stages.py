"""Settings of every stage, as pydantic models: the schema of recipes, importable without torch.

A field's description is its documentation: `compress schema`, `compress methods` and editors show it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from .allocation import AllocationSettings, BudgetSettings
from .depth import DepthSettings, TinyFusionSettings
from .experts import EepSettings
from .kv_cache import CskvSettings
from .pruning import IsomorphicSettings
from .recovery import FinetuneSettings, MaskedDistillSettings
from .slimsam import SlimSamSettings
from .stage_base import PHASES, Phase, StageSettings

WeightBits = Literal[2, 3, 4, 6, 8]
ActivationBits = Literal[4, 6, 8, 16]

__all__ = ["PHASES", "STAGES", "Phase", "StageSettings"]


class BitsSettings(StageSettings):
    """Equal bits for all layers."""

    weight_bits: WeightBits = Field(8, description="Bits of a weight of the quantized linear layers.")
    activation_bits: ActivationBits = Field(
        8,
        description="Bits of an activation; 16 leaves activations in floating point.",
    )


class GridSettings(StageSettings):
    """The integer grids that all weight-and-activation quantizers share, bits aside."""

    phase: ClassVar[Phase] = "quantize"
    families: ClassVar[frozenset[str]] = frozenset({"dit", "pixart", "sd3", "unet", "llm", "moe"})

    group_size: int | None = Field(
        None,
        ge=16,
        description="Input channels that share a weight scale; null: one scale per output channel.",
    )
    weight_symmetric: bool = Field(
        False, description="Symmetric weight grid; false: min-max with a zero point, as the paper."
    )
    activation_symmetric: bool | None = Field(
        None,
        description="Symmetric activation grid; null: symmetric, but asymmetric at 4 bits and with static "
        "scales (the papers' choices), and in convolutions.",
    )
    activation_scale: Literal["token", "static"] = Field(
        "token",
        description="token: one scale per token (per image in convolutions), found while the model runs;"
        " static: one for a layer, found by calibration with all weights quantized, asymmetric unless told"
        " otherwise.",
    )
    activation_range: Literal["minmax", "ema"] | None = Field(
        None,
        description="Range of a static scale: minmax, over all calibration calls, or ema, their moving "
        "average (momentum 0.95, the paper's); null: minmax.",
    )
    first_token: Literal["auto", "store", "quantize"] = Field(
        "auto",
        description="store: keys and values of cross-attention keep their output for the text's first token "
        "in floating point, which must be the same for every prompt (CLIP); quantize: they do not; auto: "
        "store where scales are static and the recorded prompts have one first token.",
    )
    clip: Literal["minmax", "mse"] | None = Field(
        None, description="How the weight range is found; null: minmax at 6 and 8 bits, mse at 4 and below."
    )
    rescale: bool = Field(
        False,
        description="After rounding, scale every weight so that it is as long along the original as that is:"
        " clipping shrinks all layers alike, and such errors add up. Costs no bytes; beyond the papers.",
    )
    adaln_weight_bits: Literal[4, 6, 8, 16] | None = Field(
        16,
        description="Bits of the adaptive-norm modulation weights (weight-only); 16 leaves them in floating "
        "point; null, where bits are allocated: theirs are, too.",
    )
    keep: tuple[str, ...] = Field(
        (),
        description="Patterns of further linear layers left in floating point: full names, `*` matches within"
        " and across dots.",
    )

    @model_validator(mode="after")
    def _check_range(self) -> GridSettings:
        if self.activation_range is not None and self.activation_scale != "static":
            raise ValueError("activation_range has no effect with activation_scale: token; write static")
        return self


def _refuse_activation_keys(settings: GridSettings) -> None:
    """Refuse keys that say how inputs are rounded, where all of them stay in floating point.

    Raises:
        ValueError: naming the key.
    """
    if settings.activation_scale == "static":
        raise ValueError("activation_scale: static has no effect with activation_bits: 16")
    if settings.activation_symmetric is not None:
        raise ValueError("activation_symmetric has no effect with activation_bits: 16; leave it out")


class UniformSettings(GridSettings, BitsSettings):
    """Grids with equal bits for all layers."""

    @property
    def allocation(self) -> AllocationSettings | None:
        """How bits are chosen per layer; None where all have the same."""
        return None

    @model_validator(mode="after")
    def _check_adaln(self) -> UniformSettings:
        if self.adaln_weight_bits is None and self.allocation is None:
            raise ValueError("adaln_weight_bits: null is for allocated bits; write 4, 6, 8 or 16")
        return self

    @model_validator(mode="after")
    def _check_static(self) -> UniformSettings:
        allocation = self.allocation
        if self.activation_bits == 16 if allocation is None else not allocation.quantizes_activations:
            _refuse_activation_keys(self)
        return self


class RtnSettings(UniformSettings):
    """Round-to-nearest: the grids alone, no balancing. The baseline."""

    method: ClassVar[str] = "rtn"


class SmoothQuantSettings(UniformSettings):
    """SmoothQuant (arXiv 2211.10438): per-channel scales moved from activations to weights."""

    method: ClassVar[str] = "smoothquant"

    act_exponent: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Exponent of the activation's abs-max in s = a^e / w^(1-e); SmoothQuant's alpha.",
    )


def _ordered(bounds: tuple[int, int]) -> tuple[int, int]:
    low, high = bounds
    if low > high:
        raise ValueError(f"the range {low} to {high} is empty; write its lower end first")
    return bounds


Timestep = Annotated[int, Field(ge=0, le=1000)]
TimestepRange = Annotated[tuple[Timestep, Timestep], AfterValidator(_ordered)]


def _form(value: Any) -> str:
    return "word" if isinstance(value, str) else "mapping"


# One of the two is validated, so that an error names its key inside the mapping.
BitsChoice = Annotated[
    Annotated[AllocationSettings, Tag("mapping")] | Annotated[Literal["mixdq"], Tag("word")],
    Discriminator(_form),
]


class ViditQSettings(UniformSettings):
    """ViDiT-Q (arXiv 2406.02540): static-dynamic channel balance, then dynamic per-token quantization."""

    method: ClassVar[str] = "vidit_q"

    act_exponent: float | Literal["sweep"] = Field(
        "sweep",
        description="Exponent of the activation's abs-max (the paper's v1 alpha, 1 - v2 alpha); sweep: best "
        "per layer group on calibration data.",
    )
    rotation: Literal["none", "hadamard", "block", "auto"] = Field(
        "auto",
        description="Randomised Hadamard rotation: full width, blocks of at most 128, or auto: block only "
        "where it lowers the layer's error enough.",
    )
    timestep_ranges: tuple[TimestepRange, ...] = Field(
        (),
        description="v1's option: inclusive timestep ranges, none of which overlap, whose per-range abs-max "
        "(EMA 0.95) gives the activation statistic; empty: max over all steps.",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="gptq: error-compensating rounding (arXiv 2210.17323); beyond the paper."
    )
    low_rank: int = Field(
        0,
        ge=0,
        le=256,
        description="Rank of a 16-bit branch that carries the largest directions of the weight (SVDQuant, "
        "arXiv 2411.05007); 0: none; beyond the paper.",
    )

    bits: BitsChoice | None = Field(
        None,
        description="Bits per layer, chosen under a budget instead of weight_bits and activation_bits"
        " (ViDiT-Q-MP): the keys of `mixdq`; the word mixdq stands for a budget of weight_bits on average.",
    )

    @property
    def allocation(self) -> AllocationSettings | None:
        """How bits are chosen per layer; None where all have the same."""
        if self.bits != "mixdq":
            return self.bits
        budget = BudgetSettings(mean_bits=self.weight_bits)
        return AllocationSettings(budget=budget, activation_bits=(self.activation_bits,))

    @model_validator(mode="after")
    def _check_bits(self) -> ViditQSettings:
        if isinstance(self.bits, AllocationSettings):
            for name in BitsSettings.model_fields:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect beside bits; leave it out")
        return self

    @field_validator("timestep_ranges")
    @classmethod
    def _apart(cls, ranges: tuple[TimestepRange, ...]) -> tuple[TimestepRange, ...]:
        ordered = sorted(ranges)
        for first, second in zip(ordered, ordered[1:], strict=False):
            if second[0] <= first[1]:
                raise ValueError(
                    f"the ranges {first[0]} to {first[1]} and {second[0]} to {second[1]} overlap;"
                    " both ends of a range belong to it"
                )
        return ranges

    @model_validator(mode="after")
    def _check_exponent(self) -> ViditQSettings:
        if isinstance(self.act_exponent, float) and not 0.0 <= self.act_exponent <= 1.0:
            raise ValueError(f"act_exponent {self.act_exponent} is not between 0 and 1")
        return self


class MixdqSettings(GridSettings, AllocationSettings):
    """MixDQ (arXiv 2405.17873): bits per layer, allocated exactly under a budget by measured sensitivity."""

    method: ClassVar[str] = "mixdq"

    weight_symmetric: bool = Field(
        True, description="Symmetric weight grid, as the paper; false: min-max with a zero point."
    )
    adaln_weight_bits: Literal[4, 6, 8, 16] | None = Field(
        None,
        description="Bits of the adaptive-norm modulation weights (weight-only), 16 for floating point; null:"
        " allocated as the others.",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="gptq: error-compensating rounding (arXiv 2210.17323); beyond the paper."
    )

    @property
    def allocation(self) -> AllocationSettings:
        """How bits are chosen per layer."""
        return self

    @model_validator(mode="after")
    def _check_inputs(self) -> MixdqSettings:
        if not self.quantizes_activations:
            _refuse_activation_keys(self)
        return self


QuantizeSettings = UniformSettings | MixdqSettings
"""What the quantization methods of this package take."""

STAGES: dict[str, type[StageSettings]] = {
    settings.method: settings
    for settings in (
        IsomorphicSettings, TinyFusionSettings, DepthSettings, EepSettings, SlimSamSettings,
        FinetuneSettings, MaskedDistillSettings, RtnSettings, SmoothQuantSettings, ViditQSettings,
        MixdqSettings, CskvSettings,
    )
}  # fmt: skip
