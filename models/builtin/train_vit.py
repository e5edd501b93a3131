"""Train the built-in vision transformer on Fashion-MNIST and measure it.

    python -m compress.models.builtin.train_vit --data FOLDER --out FOLDER --minutes 30

Learns from the labels and, in equal parts, from the answers of the built-in CNN: a convolutional teacher
saves a small transformer most of the epochs that it would need by itself (DeiT, arXiv 2012.12877; here the
teacher's whole distribution is taken). Every image is shifted by itself, and none is mirrored: all shoes of
the data point to the left.

Notable choices
- Matrices of the blocks are trained by Muon (orthogonalised momentum), everything else by AdamW.
- The run is bounded by wall time, so the learning rate follows the clock; the number of steps that it
  reached is written down, and `--steps` makes as many anywhere.
- The weights kept are the moving average, in bfloat16; the figures are those of the file as written.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from .classifier import load_scorer
from .course import Course
from .data import CLASS_NAMES, load_split

README = """\
---
license: apache-2.0
datasets:
- zalandoresearch/fashion-mnist
pipeline_tag: image-classification
---
# The built-in vision transformer

A `ViTForImageClassification` of {parameters:,} parameters: {layers} layers, hidden {hidden}, {heads} heads,
patches of {patch} pixels, 28 x 28 pixels of grey, {classes} classes. It is what `recipes/vit_isomorphic.yaml`
prunes, and loads with `from_pretrained`.

| measured by the training script, on the weights as stored | |
| --- | --- |
| accuracy on the 10,000 test images | {test_accuracy:.2%} |
| accuracy on the 2,000 of them that are shipped | {shipped_accuracy:.2%} |
| steps of {batch} images; minutes on {threads} thread of a shared machine | {steps:,}; {minutes:.0f} |

| file | holds |
| --- | --- |
| `model.safetensors` | weights in bfloat16 |
| `images/train.safetensors` | 5,000 of the training images, 500 a class, for calibration and recovery |
| `images/test.safetensors` | 2,000 of the test images, 200 a class, for evaluation |
| `training.json` | settings and course of the training |

In the image files: `pixels` uint8 [n, 28, 28], `labels` uint8 [n]. Made by

    python -m compress.models.builtin.write_images --data FASHION_MNIST
    python -m compress.models.builtin.train_vit \\
        --data FASHION_MNIST --out FOLDER --minutes {minutes:.0f} --seed {seed}

The learning rate follows the clock, so another machine makes another model; `--steps {steps}` makes as many
steps anywhere.

Data: Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747), copyright Zalando SE, MIT licence,
https://github.com/zalandoresearch/fashion-mnist. Teacher: the built-in classifier beside this folder.
"""


def build_model(hidden: int, layers: int, heads: int, patch: int) -> ViTForImageClassification:
    """Return an untrained model with the initialisation of its class."""
    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden,
        image_size=28, patch_size=patch, num_channels=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: label for label, name in enumerate(CLASS_NAMES)},
    )  # fmt: skip
    return ViTForImageClassification(config)


def shifted(images: Tensor, generator: torch.Generator, by: int = 2) -> Tensor:
    """Move every image by up to `by` pixels; background comes in.

    Args:
        images: [n, 1, 28, 28] in [-1, 1].
        generator: of the shifts.
        by: pixels.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (by,) * 4, value=-1.0)[:, 0]
    down, right = torch.randint(0, 2 * by + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest, at one learning rate."""
    inner = {name for name, value in model.named_parameters() if value.ndim == 2 and ".layers." in name}
    matrices = [value for name, value in model.named_parameters() if name in inner]
    others = [value for name, value in model.named_parameters() if name not in inner]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True),
    ]


def train(
    model: ViTForImageClassification,
    images: Tensor,
    labels: Tensor,
    course: Course,
    args: argparse.Namespace,
) -> ViTForImageClassification:
    """Train and return the moving average of the weights.

    Args:
        model: changed in place.
        images: [n, 1, 28, 28] float32 in [-1, 1].
        labels: [n] int64.
        course: says when it ends, and keeps the losses.
        args: the command line.
    """
    generator = torch.Generator().manual_seed(args.seed)
    teacher, average = load_scorer().network, copy.deepcopy(model)
    parameters, both = list(model.parameters()), optimizers(model, args.lr)
    order, cursor, running = torch.randperm(len(images), generator=generator), 0, 0.0
    while course.progress < 1.0:
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * course.progress))
        for group in (group for optimizer in both for group in optimizer.param_groups):
            group["lr"] = args.lr * decay * min(1.0, (course.steps + 1) / 200)
        if cursor + args.batch > len(order):
            order, cursor = torch.randperm(len(images), generator=generator), 0
        index = order[cursor : cursor + args.batch]
        cursor += args.batch
        loss = step_loss(model, teacher, shifted(images[index], generator), labels[index])
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in both:
            optimizer.step()
        course.steps += 1
        keep = min(args.ema, (1 + course.steps) / (10 + course.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        running += loss.item()
        if course.steps % 500 == 0:
            course.note(loss=running / 500)
            print(json.dumps(course.history[-1]), flush=True)  # noqa: T201
            running = 0.0
    return average.eval()


def step_loss(model: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy against the mean of the label and the teacher's distribution."""
    with torch.no_grad():
        wanted = teacher(images).softmax(dim=-1)
    wanted = 0.5 * wanted + 0.5 * functional.one_hot(labels, wanted.shape[-1])
    # The fused CPU attention spends half of the whole step in its bfloat16 backward pass.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        logits = model(pixel_values=images).logits
    return functional.cross_entropy(logits.float(), wanted)


@torch.no_grad()
def hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return [n] bool: is the most likely class the label?"""
    model.eval()
    pairs = zip(images.split(500), labels.split(500), strict=True)
    return torch.cat([model(pixel_values=part).logits.argmax(dim=-1) == truth for part, truth in pairs])


def shipped_accuracy(model: nn.Module, file: Path) -> float:
    """Return the accuracy on a file of `write_images`."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    images = tensors["pixels"][:, None].float().div_(127.5).sub_(1.0)
    return float(hits(model, images, tensors["labels"].long()).double().mean())


def save(average: ViTForImageClassification, args: argparse.Namespace, course: Course) -> None:
    """Write the folder, and measure what stands in it."""
    copy.deepcopy(average).to(torch.bfloat16).save_pretrained(args.out)
    ViTImageProcessorPil(
        size={"height": 28, "width": 28}, do_resize=True, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(args.out)
    stored = ViTForImageClassification.from_pretrained(args.out, dtype=torch.float32)
    record: dict[str, Any] = {
        "steps": course.steps, "batch": args.batch, "lr": args.lr, "ema": args.ema, "seed": args.seed,
        "threads": torch.get_num_threads(), "minutes": round(course.seconds / 60, 1),
        "test_accuracy": round(float(hits(stored, *load_split(args.data, "t10k")).double().mean()), 4),
        "shipped_accuracy": round(shipped_accuracy(stored, args.images / "test.safetensors"), 4),
    }  # fmt: skip
    text = json.dumps({**record, "history": course.history}, indent=2)
    (args.out / "training.json").write_text(text + "\n", encoding="utf-8")
    shape = {"layers": args.layers, "hidden": args.hidden, "heads": args.heads, "patch": args.patch}
    parameters = sum(parameter.numel() for parameter in stored.parameters())
    page = README.format(parameters=parameters, classes=len(CLASS_NAMES), **shape, **record)
    (args.out / "README.md").write_text(page, encoding="utf-8")
    print(json.dumps({"parameters": parameters, **record}), flush=True)  # noqa: T201


def main() -> None:
    """Parse the command line, train, write and measure."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--images", type=Path, default=here / "vit" / "images", help="of write_images")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--patch", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = load_split(args.data, "train")
    course = Course(limit_steps=args.steps, limit_seconds=60 * args.minutes)
    model = build_model(args.hidden, args.layers, args.heads, args.patch).train()
    average = train(model, images, labels, course, args)
    save(average, args, course)


if __name__ == "__main__":
    main()
