"""Which blocks stay, as something that can be learned: a logit for every choice of every group.

TinyFusion (arXiv 2412.01199) draws a choice for every item of a batch (Gumbel-softmax, arXiv 1611.01144): the
forward pass has one of the choices, the backward pass the gradient of their soft mixture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import PlanError
from .block_groups import BlockGroup

INITIAL = 0.02
"""Of all logits."""


@dataclass(frozen=True)
class Annealing:
    """How sharply a choice is drawn.

    Attributes:
        tau: temperature of the soft mixture at the first and at the last step.
        scaling: what the logits are multiplied by, at the same.
        steps: all of them, at least 2.
    """

    tau: tuple[float, float]
    scaling: tuple[float, float]
    steps: int

    def at(self, step: int) -> tuple[float, float]:
        """Return (tau, scaling) of a step, counted from 0; on a line between first and last."""
        done = step / (self.steps - 1)
        return _between(self.tau, done), _between(self.scaling, done)


def _between(ends: tuple[float, float], done: float) -> float:
    return ends[0] * (1 - done) + ends[1] * done


@dataclass(frozen=True)
class Decision:
    """What has been learned so far.

    Attributes:
        choices: row of `BlockGroup.candidates` with the largest logit, of every group.
        confidences: its probability.
    """

    choices: tuple[int, ...]
    confidences: tuple[float, ...]


class ChoiceGates(nn.Module):
    """Logits of the choices of all groups; see the top of the file.

    Args:
        groups: of `groups_of`.
        depths: list of blocks -> how many there are.
        annealing: see there.
        pinned: (list, place) of blocks that have to stay: choices without them are never drawn.

    Raises:
        PlanError: a group has no choice that keeps its pinned blocks.
    """

    def __init__(
        self,
        groups: Sequence[BlockGroup],
        depths: Mapping[str, int],
        annealing: Annealing,
        pinned: Collection[tuple[str, int]] = (),
    ) -> None:
        super().__init__()
        self._groups, self._annealing = tuple(groups), annealing
        self.logits = nn.ParameterList(
            nn.Parameter(torch.full((group.choices,), INITIAL)) for group in groups
        )
        always = {group.blocks: torch.ones(depths[group.blocks]) for group in groups}
        for index, group in enumerate(groups):
            table = _table(group, depths[group.blocks])
            always[group.blocks][list(group.members)] = 0.0
            self.register_buffer(f"table_{index}", table, persistent=False)
            self.register_buffer(f"barred_{index}", _barred(group, table, pinned), persistent=False)
        # Blocks of no group stay, in lists of which other blocks can go.
        for name, row in always.items():
            self.register_buffer(f"always_{name}", row, persistent=False)

    @property
    def numbers(self) -> int:
        """How many random numbers a draw for one item takes."""
        return sum(group.choices for group in self._groups)

    def masks(self, noise: Tensor, step: int) -> dict[str, Tensor]:
        """Return list of blocks -> [batch, blocks] float32, exactly 0 and 1, with a gradient to the logits.

        Args:
            noise: [batch, numbers] float32, of `gumbel`; on the device of the logits.
            step: counted from 0.
        """
        tau, scaling = self._annealing.at(step)
        parts = noise.split([group.choices for group in self._groups], dim=1)
        found = {
            group.blocks: self.get_buffer(f"always_{group.blocks}").expand(len(noise), -1)
            for group in self._groups
        }
        with torch.autocast(noise.device.type, enabled=False):
            for index, (group, part) in enumerate(zip(self._groups, parts, strict=True)):
                scores = self._barring(index, self.logits[index] * scaling) + part
                soft = torch.softmax(scores / tau, dim=1)
                hard = nn.functional.one_hot(scores.argmax(dim=1), group.choices).to(soft.dtype)
                # In this order the difference is exactly 0, and so every mask exactly 0 or 1.
                drawn = hard + (soft - soft.detach())
                found[group.blocks] = found[group.blocks] + drawn @ self.get_buffer(f"table_{index}")
        return found

    @torch.no_grad()
    def decide(self, step: int, logits: Sequence[Tensor] | None = None) -> Decision:
        """Return the likeliest choice of every group.

        Args:
            step: counted from 0; says what the logits are multiplied by.
            logits: of every group, such as their moving average; None: as they are.
        """
        chosen, sure = [], []
        for odds in self._odds(step, self.logits if logits is None else logits):
            best = int(odds.argmax())
            chosen.append(best)
            sure.append(float(odds[best]))
        return Decision(tuple(chosen), tuple(sure))

    @torch.no_grad()
    def least_confidence(self, step: int) -> Tensor:
        """Return the least of the confidences of `decide`; on its device, so that nothing waits for it."""
        return torch.stack([odds.max() for odds in self._odds(step, self.logits)]).min()

    def _odds(self, step: int, logits: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the probabilities of the choices of every group."""
        _, scaling = self._annealing.at(step)
        for index, values in enumerate(logits):
            yield torch.softmax(self._barring(index, values.float() * scaling), dim=0)

    def _barring(self, index: int, scores: Tensor) -> Tensor:
        barred = self.get_buffer(f"barred_{index}")
        return scores.masked_fill(barred, float("-inf"))


def gumbel(count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Return [items, count] float32: numbers of the standard Gumbel distribution, each row of its own."""
    rows = [torch.empty(count, dtype=torch.float64).exponential_(generator=one) for one in generators]
    return -torch.stack(rows).clamp_min(1e-30).log().float()


def _table(group: BlockGroup, depth: int) -> Tensor:
    """Return [choices, depth]: 1 where a block of the group stays, 0 everywhere else."""
    units = torch.zeros(len(group.units), depth)
    for row, places in zip(units, group.units, strict=True):
        row[list(places)] = 1.0
    return group.candidates() @ units


def _barred(group: BlockGroup, table: Tensor, pinned: Collection[tuple[str, int]]) -> Tensor:
    """Return [choices] bool: those without a block that has to stay."""
    places = [place for name, place in pinned if name == group.blocks and place in group.members]
    barred: Tensor = (table[:, places] == 0).any(dim=1)
    if bool(barred.all()):
        raise PlanError(
            f"{group.blocks}: blocks {places} have to stay, and of the group {list(group.members)} only"
            f" {group.kept * len(group.units[0])} do",
            hint="let more blocks of that group stay",
        )
    return barred
