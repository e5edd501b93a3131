"""The weights of the best value that a training noted, on disk beside its state.

The state says by its rows which step was the best, and that step's file is there as long as a state names
it: a newer and better one is written before, and the older one removed after the state was replaced. So
a killed training always finds the file that its state is about, and one that is newer does no harm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...runtime.atomic import atomic_file
from ...runtime.tensor_hashes import tensors_sha256
from .state import DamagedStateError

_ABOUT = "best"
_PATTERN = "best-*.safetensors"
Rows = Sequence[Sequence[float]]
COPIES_ON_DISK = 3
"""That of the state on disk, that of the best row since, and the next one while it is written."""


@dataclass(frozen=True)
class Choosing:
    """How a training goes by values that it notes: which weights stay, and how large its steps are.

    Attributes:
        better: (a value, another) -> whether the first one is better.
        rate: (finished steps, rows noted so far) -> learning rate of the next step; a pure function.
    """

    better: Callable[[float, float], bool]
    rate: Callable[[int, Rows], float]


def best_step(rows: Rows, better: Callable[[float, float], bool]) -> int:
    """Return the step of the best row; of equally good ones the first.

    Args:
        rows: at least one; they begin with (finished steps, value).
        better: see `Choosing`.
    """
    best = rows[0]
    for row in rows[1:]:
        if better(row[1], best[1]):
            best = row
    return int(best[0])


class BestWeights:
    """Writes and reads them; see above.

    Args:
        folder: of the training's state.
        key: of the state.
        parameters: name -> float32 parameter.
        better: see `Choosing`.
        writes: false: another process does, and this one reads alone.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        parameters: Mapping[str, nn.Parameter],
        better: Callable[[float, float], bool],
        *,
        writes: bool = True,
    ) -> None:
        self._folder, self._key, self._parameters = folder, key, parameters
        self._better, self._writes = better, writes
        self._settled: int | None = None

    def offer(self, rows: Rows) -> None:
        """Keep the weights as they are now if the last row is the best."""
        step = best_step(rows, self._better)
        if not self._writes or step != int(rows[-1][0]):
            return
        tensors = {name: item.detach().cpu().contiguous() for name, item in self._parameters.items()}
        about = {"key": self._key, "step": step, "sha256": tensors_sha256(tensors)}
        with atomic_file(self._path(step)) as temporary:
            save_file(tensors, temporary, metadata={_ABOUT: json.dumps(about, sort_keys=True)})
        self._remove({step, self._settled})

    def settle(self, rows: Rows) -> None:
        """A state with these rows, or with none, is on disk: what only older states named goes."""
        self._settled = best_step(rows, self._better) if rows else None
        if self._writes:
            self._remove({self._settled})

    def read(self, step: int) -> dict[str, Tensor]:
        """Return the kept weights of a step, on the CPU.

        Raises:
            DamagedStateError: they are missing, damaged, or of another training.
        """
        path = self._path(step)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                about = json.loads(file.metadata()[_ABOUT])
            expected = {"key": self._key, "step": step, "sha256": tensors_sha256(tensors)}
        except (OSError, SafetensorError, TypeError, LookupError, ValueError) as error:
            raise DamagedStateError(f"{path}: not the best weights of a training ({error})") from None
        if about != expected:
            raise DamagedStateError(f"{path}: not the weights that were written, or of another training")
        return tensors

    def check(self, rows: Rows) -> None:
        """Refuse rows whose best weights cannot be read; see `read`."""
        if rows:
            self.read(best_step(rows, self._better))

    @torch.no_grad()
    def apply(self, step: int) -> None:
        """Make the weights of a step the parameters', rounded to the type of these; see `read`."""
        kept = self.read(step)
        for name, parameter in self._parameters.items():
            parameter.copy_(kept[name])

    def _path(self, step: int) -> Path:
        return self._folder / f"best-{step}.safetensors"

    def _remove(self, wanted: set[int | None]) -> None:
        """Remove the files of all other steps."""
        names = {self._path(step).name for step in wanted if step is not None}
        for path in self._others(names):
            path.unlink(missing_ok=True)

    def _others(self, names: set[str]) -> Iterator[Path]:
        return (path for path in self._folder.glob(_PATTERN) if path.name not in names)
