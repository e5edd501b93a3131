"""Let the built-in language model write the text that it is calibrated and measured on.

    python -m compress.models.builtin.write_stories --out models/builtin/stories/calibration.jsonl

The stories are drawn from the model's own distribution, at temperature 1 and without any cut, so nothing
of anybody's text is shipped, and the model's perplexity on them is what its own uncertainty gives.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.load import load

FOLDER = Path(__file__).parent / "stories"
CONTEXT = 512


def main() -> None:
    """Parse the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "calibration.jsonl")
    parser.add_argument("--stories", type=int, default=160, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = [json.dumps({"text": text}) for text in write(arguments.stories, arguments.seed)]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def write(stories: int, seed: int, batch: int = 50) -> list[str]:
    """Sample stories that end by themselves within the context; others are left out.

    Args:
        stories: how many.
        seed: of the sampling.
        batch: stories that are written together.
    """
    from transformers import AutoTokenizer

    module: Any = load(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER), local_files_only=True)
    generator = torch.Generator().manual_seed(seed)
    found: list[str] = []
    while len(found) < stories:
        for ids in _sample(module, batch, generator):
            ends = {module.config.bos_token_id, module.config.eos_token_id}
            stop = next((place for place, token in enumerate(ids) if place and token in ends), None)
            if stop is not None:
                text = tokenizer.decode(ids[1:stop]).strip()
                # Byte tokens can come out in an order that is no text.
                if text and "\ufffd" not in text:
                    found.append(text)
    return found[:stories]


def _sample(module: Any, batch: int, generator: torch.Generator) -> list[list[int]]:
    """Return [batch] sequences of ids that begin with the mark of a beginning."""
    ids = torch.full((batch, 1), int(module.config.bos_token_id))
    cache: Any = None
    newest: Tensor = ids
    while ids.shape[1] < CONTEXT:
        output = module(input_ids=newest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = torch.softmax(output.logits[:, -1].float(), dim=-1)
        newest = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, newest], dim=1)
    rows: list[list[int]] = ids.tolist()
    return rows


if __name__ == "__main__":
    main()
