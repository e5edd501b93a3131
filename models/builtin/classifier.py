"""The built-in scorer: a small CNN on Fashion-MNIST that tells whether samples are what was asked for.

Its penultimate layer gives the features of the Frechet distance that `evaluation` reports. The
weights, the feature statistics of the training images and the measured floor are in the folder
``classifier/`` beside this file; ``train_classifier.py`` made all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import SourceError

FOLDER = Path(__file__).parent / "classifier"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STATISTICS_FILE = "reference_features.safetensors"


class Classifier(nn.Module):
    """Three 3x3 convolutions with group norm, a pooled 3x3 plane, a feature vector, a linear head.

    Group norm keeps no running state, so that an image's score never depends on its batch.

    Args:
        width: channels of the first convolution; the others have twice as many.
        features: length of the penultimate vector.
        classes: number of classes.
    """

    def __init__(self, width: int = 32, features: int = 64, classes: int = 10) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = nn.Sequential(*self._stage(1, width), nn.MaxPool2d(2))
        self.body = nn.Sequential(
            *self._stage(width, wide), nn.MaxPool2d(2), *self._stage(wide, wide), nn.AvgPool2d(3, stride=2)
        )
        self.neck = nn.Linear(9 * wide, features)
        self.head = nn.Linear(features, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.GroupNorm(8, outputs), nn.ReLU()]

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate features.

        Args:
            images: [n, 1, 28, 28] float in [-1, 1].

        Returns:
            [n, features] float, not negative.
        """
        plane: Tensor = self.body(self.stem(images))
        vector: Tensor = self.neck(plane.flatten(1))
        return vector.relu()

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores [n, classes] of images [n, 1, 28, 28] in [-1, 1]."""
        scores: Tensor = self.head(self.features(images))
        return scores


@dataclass(frozen=True)
class Scorer:
    """The trained classifier and what its scores are held against.

    Attributes:
        network: in float32 and evaluation mode.
        mean: [features] float64, of the training images' features.
        covariance: [features, features] float64, likewise.
        classes: number of classes.
        sample_shape: (channels, height, width) that it can judge.
        test_accuracy: fraction of the 10,000 test images that it names correctly.
        fid_floor: Frechet distance between the training and the test images' features: what a
            perfect generator would score with 10,000 samples.
    """

    network: Classifier
    mean: Tensor
    covariance: Tensor
    classes: int
    sample_shape: tuple[int, int, int]
    test_accuracy: float
    fid_floor: float

    @torch.no_grad()
    def score(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Judge images as they would be saved: clipped to [-1, 1] and rounded to 256 levels.

        Args:
            images: [n, 1, 28, 28] float.
            batch_size: images per forward; the scores do not depend on it.

        Returns:
            labels: [n] int64, the most likely class.
            features: [n, features] float64.
        """
        labels, features = [], []
        levels = images.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().div(127.5).sub(1.0)
        for batch in torch.split(levels, batch_size):
            batch_features = self.network.features(batch)
            features.append(batch_features.double())
            labels.append(self.network.head(batch_features).argmax(dim=1))
        return torch.cat(labels), torch.cat(features)


def load_scorer(folder: Path = FOLDER) -> Scorer:
    """Open the shipped classifier.

    Raises:
        SourceError: a file of the installation is missing or does not fit the config.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        network = Classifier(**config["network"])
        weights = load_file(folder / WEIGHTS_FILE)
        network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        statistics = load_file(folder / STATISTICS_FILE)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise SourceError(
            f"{folder}: the built-in classifier cannot be read: {error}", hint="reinstall compress"
        ) from error
    channels, height, width = config["sample_shape"]
    return Scorer(
        network=network.eval(),
        mean=statistics["mean"].double(),
        covariance=statistics["covariance"].double(),
        classes=config["network"]["classes"],
        sample_shape=(channels, height, width),
        test_accuracy=config["figures"]["test_accuracy"],
        fid_floor=config["figures"]["fid_train_test"],
    )
