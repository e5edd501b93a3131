"""Settings of questions with known answers, on which a language model is measured. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AnswersSettings(BaseModel):
    """How many questions original and result answer rightly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["exact_match", "tokens", "choices"] | None = Field(
        None,
        description="As fitness.by of the stage eep. null: as the first search of the recipe judges, else "
        "exact_match.",
    )
    data: Path | None = Field(
        None,
        description="JSONL, an item a line, as fitness.data of the stage eep; looked up as prompts are. "
        "null: the test items of the recipe's first search, else those that come with the model.",
    )
    task: str | None = Field(
        None, min_length=1, description="Only the lines whose `task` is this. null: as by, else all."
    )
    samples: int | None = Field(
        None, ge=1, le=10_000_000, description="So many items, drawn by seed; null: all of them."
    )
    new_tokens: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Of by: exact_match: tokens that are generated at most; null: as by, else 32.",
    )
    batch_size: int | None = Field(
        None, ge=1, le=65_536, description="Items that are computed together; null: as by, else 32."
    )

    @model_validator(mode="after")
    def _used(self) -> AnswersSettings:
        if self.by in ("tokens", "choices") and self.new_tokens is not None:
            raise ValueError(f"new_tokens has no effect with by: {self.by}")
        return self
