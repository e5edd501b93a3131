"""What the settings of all stages have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Phase = Literal["prune", "recover", "quantize", "plan"]
PHASES: tuple[Phase, ...] = ("prune", "recover", "quantize", "plan")
"""The order in which stages may follow each other."""


class StageSettings(BaseModel):
    """Base of all settings: unknown keys are refused, and numbers without end; nothing is changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: ClassVar[str]
    phase: ClassVar[Phase]
    families: ClassVar[frozenset[str]]
    calibrates: ClassVar[bool] = True  # it looks at what the model reads where the recipe says
    hurts: ClassVar[bool] = True  # where it prunes: what is left needs training
    learns_from_data: ClassVar[bool] = False  # it trains a denoiser on calibration.data

    @property
    def uses_ray(self) -> bool:
        """Whether the stage can hand its work to a Ray cluster."""
        return False

    def changed(self, name: str) -> bool:
        """Tell whether a key has another value than it has anyway; a resolved recipe holds all keys."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default())
