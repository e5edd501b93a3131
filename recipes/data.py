"""What a denoiser is trained on: latents on disk, images, or samples that it draws itself. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

SOURCES = ("latents", "images", "generate")
"""Keys of `calibration.data` that say where the data come from; one of them is written."""
PATH_KEYS = ("latents", "images")
"""Those that name a file or a folder."""


class DataSettings(BaseModel):
    """What the stages that train a denoiser learn from; write `latents`, `images` or `generate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latents: Path | None = Field(
        None,
        description="Latents as the denoiser sees them, scaled: a safetensors file or a folder of these "
        "(latents [n, C, H, W]; perhaps flipped, the same of the mirrored images; labels [n], or "
        "prompt_embeds and what else the model is conditioned on), or a folder with two folders of .npy "
        "files, *features and *labels, with equal names; looked up in the current directory, then beside "
        "the recipe.",
    )
    images: Path | None = Field(
        None,
        description="Images of a class-conditional model, laid out as calibration.images; encoded once, by "
        "the VAE beside the denoiser. A model of 1 or 3 channels without a VAE sees the pixels.",
    )
    generate: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="Draw so many samples with the original, as calibration says: its steps, guidance, "
        "scheduler and classes or prompts.",
    )
    flip: bool | None = Field(
        None,
        description="Half of the time the mirrored image instead; null: of images, and of latents that have "
        "it. Samples that are drawn can be mirrored where the model sees pixels.",
    )
    steps: int | None = Field(
        None, ge=1, le=1000, description="Of generate: sampling steps; null: calibration.steps."
    )
    guidance_scale: float | None = Field(
        None,
        ge=0.0,
        allow_inf_nan=False,
        description="Of generate: classifier-free guidance; null: calibration.guidance_scale.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Images that are encoded, or samples that are drawn, together; null: "
        "calibration.batch_size.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} exclude each other" if given else "it names no data"
            raise ValueError(f"{found}; write one of {', '.join(SOURCES)}")
        unused = {"steps": ("generate",), "guidance_scale": ("generate",), "batch_size": SOURCES[1:]}
        for name, sources in unused.items():
            if getattr(self, name) is not None and given[0] not in sources:
                raise ValueError(f"{name} has no effect with {given[0]}")
        return self
