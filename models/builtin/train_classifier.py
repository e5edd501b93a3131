"""Train the built-in classifier on Fashion-MNIST and measure what it is good for.

    python -m compress.models.builtin.train_classifier --data FOLDER --out FOLDER

Writes the weights (float16), the mean and covariance of the training images' features (float32),
``config.json`` with the measured figures, and the README that quotes them. Shifts by a pixel stand
against overfitting (no flips: every shoe of the data points to the left); the learning rate follows
half a cosine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from .classifier import CONFIG_FILE, STATISTICS_FILE, WEIGHTS_FILE, Classifier, Scorer, load_scorer
from .data import CLASS_NAMES, load_split
from .frechet import frechet_distance, moments

NETWORK = {"width": 32, "features": 64, "classes": 10}

README = """\
---
license: apache-2.0
datasets:
- zalandoresearch/fashion-mnist
pipeline_tag: image-classification
---
# The built-in classifier

A CNN of {parameters:,} parameters (three 3x3 convolutions with group norm, a feature vector of
{features}, a linear head) that judges the samples of the built-in DiT: whether they are what was
asked for (class agreement), and how far their features are from those of real images (Frechet
distance, FID).

| measured by the training script | |
| --- | --- |
| accuracy on the 10,000 test images | {test_accuracy:.2%} |
| accuracy on the 60,000 training images, without augmentation | {train_accuracy:.2%} |
| feature-FID, training against all test images: **the floor** | {fid_train_test:.3f} |
| feature-FID, training against {small} test images, mean of {draws} draws | {fid_train_test_small:.3f} |
| epochs; seconds on {threads} thread of a shared machine | {epochs}; {seconds} |

Class agreement cannot be expected far above the accuracy on real images. The FID is comparable only
with figures of this very network and of the same number of samples: with few samples it is biased
upwards, as the row with {small} real images shows.

| file | holds |
| --- | --- |
| `model.safetensors` | weights in float16; computed with in float32 |
| `reference_features.safetensors` | mean and covariance of the training images' features, float32 |
| `config.json` | sizes of the network and the figures above |

Made by

    python -m compress.models.builtin.train_classifier \\
        --data FASHION_MNIST --out FOLDER --epochs {epochs} --seed {seed}

Data: Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747), copyright Zalando SE, MIT licence,
https://github.com/zalandoresearch/fashion-mnist. No image of it is in this folder.
"""


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the images of a batch together by up to one pixel.

    Args:
        images: [n, 1, 28, 28] in [-1, 1]; -1 is the background that shifting brings in.
    """
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    return functional.pad(images, (1, 1, 1, 1), value=-1.0)[:, :, down : down + 28, right : right + 28]


def train(images: Tensor, labels: Tensor, *, epochs: int, batch: int, lr: float, seed: int) -> Classifier:
    """Return a trained classifier in float32.

    Args:
        images: [n, 1, 28, 28] float32 in [-1, 1].
        labels: [n] int64.
        epochs: passes over the images.
        batch: images per step.
        lr: peak learning rate of AdamW.
        seed: of the initial weights, the order and the augmentation.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Classifier(**NETWORK).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01, fused=True)
    steps_per_epoch = len(images) // batch
    total, step = epochs * steps_per_epoch, 0
    for epoch in range(epochs):
        order, running = torch.randperm(len(images), generator=generator), 0.0
        for index in order[: steps_per_epoch * batch].split(batch):
            decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = lr * decay * min(1.0, (step + 1) / 200)
            inputs = augment(images[index], generator).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(network(inputs), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            running += loss.item()
            step += 1
        print(json.dumps({"epoch": epoch + 1, "loss": round(running / steps_per_epoch, 4)}), flush=True)  # noqa: T201
    return network.eval().to(memory_format=torch.contiguous_format)


def measure(scorer: Scorer, data: Path, small: int) -> tuple[dict[str, float], Tensor, Tensor]:
    """Return the figures, and the mean and covariance of the training images' features."""
    train_images, train_labels = load_split(data, "train")
    test_images, test_labels = load_split(data, "t10k")
    train_predicted, train_features = scorer.score(train_images)
    test_predicted, test_features = scorer.score(test_images)
    mean, covariance = moments(train_features)
    draws = [
        frechet_distance(mean, covariance, *moments(part))
        for part in test_features.split(small)
        if len(part) == small
    ]
    figures = {
        "train_accuracy": round(float((train_predicted == train_labels).double().mean()), 4),
        "test_accuracy": round(float((test_predicted == test_labels).double().mean()), 4),
        "fid_train_test": round(frechet_distance(mean, covariance, *moments(test_features)), 4),
        "fid_train_test_small": round(sum(draws) / len(draws), 4),
        "small": small,
        "draws": len(draws),
    }
    return figures, mean, covariance


def write(network: Classifier, data: Path, out: Path, record: dict[str, int | float]) -> None:
    """Write the folder; the figures are those of the weights as stored."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in network.state_dict().items()}, out / WEIGHTS_FILE)
    features = NETWORK["features"]
    placeholder = {"mean": torch.zeros(features), "covariance": torch.eye(features)}
    save_file(placeholder, out / STATISTICS_FILE)
    config: dict[str, Any] = {
        "network": NETWORK, "sample_shape": [1, 28, 28], "class_names": CLASS_NAMES, "training": record,
        "figures": {"test_accuracy": 0.0, "fid_train_test": 0.0},
    }  # fmt: skip
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    config["figures"], mean, covariance = measure(load_scorer(out), data, small=500)
    save_file({"mean": mean.float(), "covariance": covariance.float()}, out / STATISTICS_FILE)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    text = README.format(parameters=parameters, features=features, **config["figures"], **record)
    (out / "README.md").write_text(text)
    print(json.dumps({"parameters": parameters, **config["figures"], **record}), flush=True)  # noqa: T201


def main() -> None:
    """Parse the command line, train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the classifier")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    images, labels = load_split(args.data, "train")
    network = train(images, labels, epochs=args.epochs, batch=args.batch, lr=args.lr, seed=args.seed)
    record = {
        "epochs": args.epochs, "batch": args.batch, "lr": args.lr, "seed": args.seed,
        "threads": args.threads, "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    write(network, args.data, args.out, record)


if __name__ == "__main__":
    main()
