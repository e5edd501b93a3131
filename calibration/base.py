"""What a method may look at while it works on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..models.base import OpenModel
from ..progress import Progress

Observer = Callable[[str, Tensor, Tensor], None]
"""Called as observer(name, x, timesteps): x [batch, tokens, channels] is the input of linear `name`
([batch, 1, channels] where the layer sees no token axis), timesteps [batch] float32. Of a convolution it
sees windows in several parts, with the timesteps of the items in a part; see `views.views`."""


class Calibration(Protocol):
    """Recorded inputs of the model, replayed as often as a method asks. Seeded; never global."""

    @property
    def seed(self) -> int:
        """Seed of everything random in the stage."""

    @property
    def key(self) -> str:
        """Content hash of everything that the recorded inputs depend on."""

    @property
    def samples(self) -> int:
        """How many trajectories or sequences are recorded."""

    def observe(self, model: OpenModel, names: Sequence[str], observer: Observer, progress: Progress) -> None:
        """Replay all recorded calls through `model.module` as it is now.

        `observer` sees the inputs of the named layers while they are computed; nothing is kept.

        Raises:
            StageError: when a name is never reached.
        """
