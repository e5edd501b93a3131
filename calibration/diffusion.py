"""Recorded denoiser inputs of the original model: on disk, keyed by content, replayed at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SourceError, StageError
from ..models.base import OpenModel
from ..models.headers import read_header
from ..progress import Progress, step
from ..runtime.atomic import atomic_file
from ..runtime.hashes import file_sha256
from .base import Observer
from .captions import with_empty_caption
from .conditions import Conditions, conditions_for, is_guided
from .content import (
    condition_content,
    content_key,
    is_intact,
    read_index,
    recording_folder,
    write_index,
)
from .latents import LatentSet
from .replay import replay
from .sampler import denoise_batch, make_scheduler
from .training_data import TrainingData

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

FORMAT_VERSION = 2
INDEX_FILE = "index.json"
_INPUT_PREFIX = "inputs/"
_STATES = "hidden_states"
_CLEAN = "clean"


@dataclass(frozen=True)
class DiffusionCalibration:
    """Trajectories on disk. Implements `calibration.base.Calibration`.

    One file per batch of samples: `hidden_states` [steps, batch, C, H, W] (one half: guidance feeds
    both halves the same), `timesteps` [steps], the samples they end in, and the conditions of both halves.
    The latents are called `hidden_states` there, whatever the model calls them.

    Attributes:
        seed: of the recording, and of the run.
        key: content hash of everything that the recorded inputs depend on.
        files: one per batch, in order.
        guided: whether a call has two rows per sample, the conditional half first.
        samples: how many trajectories there are.
        latents: name of the denoiser's argument that takes the latents.
        keeper: keeps a temporary folder alive as long as this object; None where the cache is the user's.
        data: what stages that train the model learn from; None: the recipe names none.
    """

    seed: int
    key: str
    files: tuple[Path, ...]
    guided: bool
    samples: int
    latents: str = "hidden_states"
    keeper: Any = None
    data: TrainingData | None = None

    def training(
        self, model: OpenModel, original: Callable[[], OpenModel] | None, progress: Progress
    ) -> LatentSet:
        """Return what the model is trained on; see `TrainingData.latents` and `captions`.

        Raises:
            SourceError: the recipe names no data, or they cannot be read.
            StageError: samples are missing, and the original is not at hand.
        """
        if self.data is None:
            raise SourceError(
                f"{model.source.id}: a stage trains the model, and the recipe names nothing to train on",
                hint="add `data: {generate: 1000}` to calibration, or latents or images of your own",
            )
        found = self.data.latents(model, original, progress)
        return with_empty_caption(model, found, self._guided_inputs(), progress)

    def _guided_inputs(self) -> dict[str, Any] | None:
        """Return what the first calls were conditioned on, both halves; None without guidance."""
        if not self.guided:
            return None
        with safe_open(self.files[0], framework="pt") as file:
            return _nested(file)

    def calls(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments of every recorded forward, on the CPU, one at a time."""
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                inputs = _nested(file)
                timesteps, states = file.get_tensor("timesteps"), file.get_slice(_STATES)
                for index, time in enumerate(timesteps):
                    half = states[index : index + 1][0]
                    rows = torch.cat([half, half]) if self.guided else half
                    yield {self.latents: rows, "timestep": time.expand(len(rows)), **inputs}

    def clean(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield, batch by batch, the samples that the trajectories end in and what they were drawn for.

        Samples are [batch, C, H, W] float32; the conditions are those of the conditional half.
        """
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                samples, inputs = file.get_tensor(_CLEAN), _nested(file)
            yield samples, _rows(inputs, len(samples)) if self.guided else inputs

    def image_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of a sample."""
        return tuple(read_header(self.files[0])[_CLEAN].shape[1:])

    def count(self) -> int:
        """Return how many forwards are recorded."""
        return sum(read_header(path)["timesteps"].shape[0] for path in self.files)

    def observe(self, model: OpenModel, names: Sequence[str], observer: Observer, progress: Progress) -> None:
        """Replay all recorded calls through `model.module` as it is now.

        `observer(name, x, timesteps)` sees the inputs of the named layers while they are computed: x
        [batch, tokens, channels] in the module's dtype, timesteps [batch] float32; of convolutions
        windows in parts, see `views.views`. Hooks are removed however this ends.

        Raises:
            StageError: a name is no module, or was never reached.
        """

        def timesteps(call: dict[str, torch.Tensor]) -> torch.Tensor:
            return call["timestep"].float()

        replay(model, names, observer, self.calls(), self.count(), timesteps, progress)


def record(
    model: OpenModel,
    settings: CalibrationSettings,
    *,
    seed: int,
    cache: Path | None,
    progress: Progress,
    fresh: bool = False,
) -> DiffusionCalibration:
    """Sample with the original model and keep what the denoiser is fed.

    Batches that the cache holds already are not computed again, so a stopped recording continues, and
    a finished one costs a read: the SHA-256 of every batch is held against the index, and a damaged
    one is recorded again. No more than one batch of trajectories is in memory.

    Args:
        model: as it was opened, before any stage.
        settings: of the recipe.
        seed: of the run.
        cache: folder for recordings, shared between runs; None: a temporary folder that lives as long
            as the returned object.
        progress: gets one step, in denoiser calls.
        fresh: record every batch anew; each replaces a kept one when it is finished.

    Raises:
        StageError: a stage has already changed the model.
        SourceError: there is nothing to condition on, or it cannot be read.
    """
    if model.quantization or model.history:
        raise StageError("calibration records the original model, but a stage has changed it already")
    guided = is_guided(model, settings.guidance_scale)
    key = recording_key(model, settings, seed)
    folder, keeper = recording_folder(cache, key)
    starts = range(0, settings.samples, settings.batch_size)
    files = tuple(folder / f"batch-{index:05d}.safetensors" for index in range(len(starts)))
    hashes = read_index(folder / INDEX_FILE) or {}
    missing = [
        (path, start)
        for path, start in zip(files, starts, strict=True)
        if fresh or not is_intact(path, hashes.get(path.name))
    ]
    if missing:
        conditions = conditions_for(model, settings, settings.samples, seed)
        scheduler = make_scheduler(model, settings.scheduler)
        with step(progress, "recording calibration", len(missing) * settings.steps):
            for path, start in missing:
                hashes[path.name] = _record_batch(
                    model, scheduler, conditions, start, settings, seed, path, progress
                )
                write_index(folder / INDEX_FILE, hashes)
    data = TrainingData.of(model, settings, seed=seed, cache=cache)
    return DiffusionCalibration(
        seed, key, files, guided, settings.samples, model.family.latents, keeper, data
    )


def recording_key(model: OpenModel, settings: CalibrationSettings, seed: int) -> str:
    """Return the content hash of everything that a recording depends on, 64 hexadecimal digits.

    Prompts, embeddings and text encoders count by their content, not by their path.

    Raises:
        SourceError: one of these files cannot be read.
    """
    content = {"format": FORMAT_VERSION, "calibration": condition_content(model, settings), "seed": seed}
    return content_key(model, content)


def _record_batch(
    model: OpenModel,
    scheduler: Any,
    conditions: Conditions,
    start: int,
    settings: CalibrationSettings,
    seed: int,
    path: Path,
    progress: Progress,
) -> str:
    """Record one batch and return the SHA-256 of its file."""
    stop = min(start + settings.batch_size, settings.samples)
    guided = is_guided(model, settings.guidance_scale)
    states: list[Tensor] = []
    times: list[Tensor] = []

    def keep(kwargs: dict[str, Any], _: Tensor) -> None:
        states.append(kwargs[model.family.latents][: stop - start].cpu().clone())
        times.append(kwargs["timestep"][0].cpu().clone())

    clean = denoise_batch(
        model, scheduler, conditions, (start, stop), steps=settings.steps,
        guidance_scale=settings.guidance_scale, seed=seed, on_call=keep, progress=progress,
    )  # fmt: skip
    inputs = _flat(conditions.inputs(start, stop, guided=guided), _INPUT_PREFIX)
    tensors = {
        _STATES: torch.stack(states), "timesteps": torch.stack(times), _CLEAN: clean.cpu(), **inputs
    }  # fmt: skip
    with atomic_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        return file_sha256(temporary)


def _flat(inputs: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def _rows(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the first `count` rows of conditions that stand twice, nested ones included."""
    return {
        name: _rows(value, count)
        if isinstance(value, dict)
        else (value[:count] if value.ndim and len(value) == 2 * count else value)
        for name, value in inputs.items()
    }


def _nested(file: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for key in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
        if key.startswith(_INPUT_PREFIX):
            *parents, leaf = key.removeprefix(_INPUT_PREFIX).split("/")
            target = inputs
            for parent in parents:
                target = target.setdefault(parent, {})
            target[leaf] = file.get_tensor(key)
    return inputs
