"""The small files beside weights of transformers: tokenizer, defaults, preprocessing of images. Torch-free.

They belong to the model and go with it, byte by byte, into whatever is made of it.
"""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json",
)  # fmt: skip


def companion_files(folder: Path) -> list[Path]:
    """Return those of `NAMES` that are in a folder."""
    return [folder / name for name in NAMES if (folder / name).is_file()]
