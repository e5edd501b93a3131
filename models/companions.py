"""The small files beside weights of transformers: tokenizer, defaults, preprocessing of images. Torch-free.

They belong to the model and go with it, byte by byte, into whatever is made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NAMES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json",
)  # fmt: skip

TOKENIZER = tuple(
    name for name in NAMES if name not in ("generation_config.json", "preprocessor_config.json")
)
"""Those of `NAMES` that turn text into tokens and back."""


def companion_files(folder: Path, names: Sequence[str] = NAMES) -> list[Path]:
    """Return those of some names that are in a folder."""
    return [folder / name for name in names if (folder / name).is_file()]
