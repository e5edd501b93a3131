"""A tiny mixture of experts with a tokenizer and items of its own, as a folder that a recipe can name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .tiny_moe import make_moe

WORDS = ("<pad>", "<s>", "</s>", "<unk>", *"0123456789", "=", "?", "a", "b")


def add_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters, which needs at most 60 ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_items(path: Path, count: int, seed: int = 0) -> Path:
    """Write items whose answer has three digits, and choices for them."""
    generator = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for _ in range(count):
        digits = [str(generator.randrange(10)) for _ in range(3)]
        lines.append({"task": "copy", "prompt": "".join(digits) + "=", "answer": "".join(digits)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_asked_moe(folder: Path, class_name: str = "MixtralForCausalLM", **changes: Any) -> Path:
    """Save a tiny model, its tokenizer, and items of its own: 40 to learn from, 40 for the report."""
    make_moe(folder, class_name, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes)
    add_tokenizer(folder)
    write_items(folder / "answers" / "train.jsonl", 40)
    write_items(folder / "answers" / "test.jsonl", 40, seed=1)
    return folder
