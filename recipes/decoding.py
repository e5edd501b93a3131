"""Settings of what is measured token by token, through a compressed key-value cache. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

COMPRESSES_CACHE = frozenset({"cskv"})
"""Methods after which a model reads a compressed cache."""
MOST_ANSWER = 16
"""Tokens of an answer to a hidden number: room for its digits and what a model puts before them."""
_USUAL_PROMPT = 32

PromptTokens = Annotated[int, Field(ge=64, le=2**22)]


class PasskeySettings(BaseModel):
    """A number is hidden in a long text and asked for at its end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(
        20, ge=1, le=10_000, description="Hidden numbers for every length, spread over the text."
    )
    lengths: tuple[PromptTokens, ...] = Field(
        (1024, 2048), min_length=1, max_length=16, description="Tokens of the text, the question included."
    )


class DecodingSettings(BaseModel):
    """What the result says where it reads a text token by token, through its compressed cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int | None = Field(
        None, ge=1, description="Sequences, the first of those of fidelity; null: all of them."
    )
    prompt: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="Tokens that are read in one pass before the others are, one at a time; null: 32, or half"
        " of calibration.length where that is less.",
    )
    passkey: PasskeySettings | None = Field(
        None, description="Finding a number again that a long text hides; null: not measured."
    )

    def prompt_tokens(self, length: int) -> int:
        """Return how many tokens of a sequence are read in one pass.

        Args:
            length: of a sequence, in tokens.
        """
        return self.prompt if self.prompt is not None else min(_USUAL_PROMPT, length // 2)
