"""Choose the photographs of Fashion-MNIST that the built-in ViT is calibrated, recovered and judged on.

    python -m compress.models.builtin.write_images --data FOLDER

Writes ``vit/images/train.safetensors`` (of the training split) and ``vit/images/test.safetensors`` (of the
test split): ``pixels`` uint8 [n, 28, 28] and ``labels`` uint8 [n], every class equally often, drawn with a
seed and in random order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .data import CLASS_NAMES, load_split

FOLDER = Path(__file__).parent / "vit" / "images"


def balanced(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Draw equally many places of every class, in random order.

    Args:
        labels: [n] int64 in 0..9.
        per_class: how many of each.
        generator: of the draw.

    Returns:
        [10 * per_class] int64 places in `labels`, none twice.

    Raises:
        ValueError: a class has fewer.
    """
    drawn = []
    for label, name in enumerate(CLASS_NAMES):
        places = (labels == label).nonzero().flatten()
        if len(places) < per_class:
            raise ValueError(f"{per_class} images of {name!r} are wanted and {len(places)} are there")
        drawn.append(places[torch.randperm(len(places), generator=generator)[:per_class]])
    together = torch.cat(drawn)
    return together[torch.randperm(len(together), generator=generator)]


def write(data: Path, out: Path, split: str, per_class: int, seed: int) -> None:
    """Write a balanced part of one split as bytes; see the module."""
    images, labels = load_split(data, split)
    places = balanced(labels, per_class, torch.Generator().manual_seed(seed))
    pixels = images[places, 0].add(1.0).mul(127.5).round().to(torch.uint8)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"pixels": pixels.contiguous(), "labels": labels[places].to(torch.uint8)}, out)


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST IDX files")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--train-per-class", type=int, default=500)
    parser.add_argument("--test-per-class", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.data, args.out / "train.safetensors", "train", args.train_per_class, args.seed)
    write(args.data, args.out / "test.safetensors", "t10k", args.test_per_class, args.seed)


if __name__ == "__main__":
    main()
