"""Batches of noised latents for training a denoiser: everything in them follows from seed, step and item."""

from __future__ import annotations

from ...calibration.diffusion_loss import DiffusionTask, Noised
from ...calibration.latents import LatentSet
from ...calibration.seeds import generator_for
from .schedule import item_order


class NoisedBatches:
    """Which items a step trains on, and how they are noised.

    Every item of a batch has random numbers of its own, so what is drawn for a batch does not depend on
    how it is divided.

    Args:
        data: the latents.
        task: how the model is trained.
        size: items of a batch.
        seed: of the stage.
    """

    def __init__(self, data: LatentSet, task: DiffusionTask, size: int, seed: int) -> None:
        self._data, self._task, self._size, self._seed = data, task, size, seed
        self._order = item_order(seed, len(data))

    def __call__(self, step: int, part: int, parts: int) -> Noised:
        """Return part `part` of `parts` equal parts of a step's batch, on the CPU."""
        count = self._size // parts
        rows = range(part * count, (part + 1) * count)
        items = self._order(step, self._size)[rows.start : rows.stop].tolist()
        generators = [generator_for(self._seed, "noised", step, row) for row in rows]
        latents, conditions = self._data.batch(items, generators)
        return self._task.draw(latents, conditions, generators, self._data.empty)
