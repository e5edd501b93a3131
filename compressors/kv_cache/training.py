"""Training of the factors, attention by attention, on what each gets wrong (arXiv 2409.10593).

The loss is the mean square error of keys plus that of values. Attentions read what the model computes with
its own keys and values, so the factors of one decide nothing for another: no gradient passes through the
model, and each attention has an optimizer and a gradient norm of its own. Published: AdamW, learning rate
5e-5 with a linear decay, no weight decay, gradients clipped to norm 1, 1024 tokens a step, float32 weights.
There the norm is taken over all attentions together and the arithmetic is in bfloat16; here it is float32.

Where the cache is rounded, so are the states between the two factors, with the arithmetic of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...calibration.base import Calibration
from ...errors import StageError
from ...models.base import OpenModel
from ...progress import Progress, step
from ...recipes.kv_cache import CskvSettings
from ...runtime.hashes import digest
from ...runtime.kv.scheme import KvCacheScheme, KvLayer
from ...runtime.tensor_hashes import tensors_sha256
from .energies import portions
from .factorise import KvFactors, weight_of
from .kept import (
    LayerState,
    PartState,
    keep_factors,
    kept_factors,
    read_state,
    remove_state,
    write_state,
)
from .rounded import Rounding

STATE_BUDGET_BYTES = 2 * 2**30
"""States of attentions that are trained in one replay; one is, however large it is."""
INPUT_BUDGET_BYTES = 2**30
"""Inputs that are kept after the first replay, so that there need be no other; more are replayed."""
SAVE_SECONDS = 30.0
"""Time between two states on disk; more where writing is slow."""
CLIP_NORM = 1.0
_FLOAT32_BYTES = 4
_COPIES = 4  # weights, gradients, and AdamW's two moments
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SAVED_AT_MOST = 0.05  # of the time


def state_bytes(layer: KvLayer, settings: CskvSettings) -> int:
    """Return what an attention's training holds: the optimizer, the targets' weights, tokens that wait."""
    factors = _COPIES * (layer.hidden + layer.width) * (layer.rank_k + layer.rank_v)
    return _FLOAT32_BYTES * (factors + 2 * layer.hidden * layer.width + settings.batch_tokens * layer.hidden)


def kept_bytes(layer: KvLayer, settings: CskvSettings) -> int:
    """Return what the state of an attention's training takes on disk: factors, moments, tokens that wait."""
    factors = (1 + len(_MOMENTS)) * (layer.hidden + layer.width) * (layer.rank_k + layer.rank_v)
    return _FLOAT32_BYTES * (factors + settings.batch_tokens * layer.hidden)


def reconstruction_loss(
    x: Tensor, weights: tuple[Tensor, Tensor], factors: Mapping[str, Tensor], rounding: Rounding | None
) -> Tensor:
    """Return MSE(K) + MSE(V), a scalar.

    Args:
        x: what the attention reads, [tokens, h] float32.
        weights: of keys and values, [h_kv, h] float32; biases would cancel.
        factors: `k_a`, `k_b`, `v_a`, `v_b`, as of linears.
        rounding: of the states between them; None: they are not rounded.
    """
    c_k, c_v = F.linear(x, factors["k_a"]), F.linear(x, factors["v_a"])
    if rounding is not None:
        c_k, c_v = rounding.keys(c_k), rounding.values(c_v)
    keys = F.mse_loss(F.linear(c_k, factors["k_b"]), F.linear(x, weights[0]))
    return keys + F.mse_loss(F.linear(c_v, factors["v_b"]), F.linear(x, weights[1]))


class LayerTraining:
    """The training of one attention: takes tokens as they come, and steps whenever there are enough.

    Args:
        factors: that it starts from; copies are trained.
        weights: of keys and values, [h_kv, h] float32.
        settings: `steps`, `lr`, `batch_tokens`.
        rounding: None: states are not rounded.
    """

    def __init__(
        self,
        factors: KvFactors,
        weights: tuple[Tensor, Tensor],
        settings: CskvSettings,
        rounding: Rounding | None,
    ) -> None:
        self.weights, self.settings, self.rounding = weights, settings, rounding
        device = weights[0].device
        self.parameters = {
            name: nn.Parameter(tensor.to(device=device, dtype=torch.float32, copy=True))
            for name, tensor in factors.tensors().items()
        }
        start = tensors_sha256(self.parameters)
        shared = None if rounding is None else [rounding.bits, rounding.key_group, rounding.value_group]
        self._key = digest([start, settings.model_dump(mode="json"), shared])
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.lr, weight_decay=0.0)
        self.steps = 0
        self.tokens = 0
        self._rows: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.steps >= self.settings.steps

    def take(self, x: Tensor) -> int:
        """Take sequences [sequences, tokens, h], and return how many steps that made.

        Of rounded states only whole groups of consecutive tokens of a sequence are of use.
        """
        rows = x.reshape(-1, x.shape[-1]) if self.rounding is None else self.rounding.whole(x)
        rows = rows.float()
        self.tokens += len(rows)
        if self._rows is not None:
            rows = torch.cat([self._rows, rows])
        size, before = self.settings.batch_tokens, self.steps
        while len(rows) >= size and not self.done:
            self._step(rows[:size])
            rows = rows[size:]
        self._rows = None if self.done else rows.clone()
        return self.steps - before

    def _step(self, x: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * (1 - self.steps / self.settings.steps)
        with torch.enable_grad():
            loss = reconstruction_loss(x, self.weights, self.parameters, self.rounding)
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def state(self) -> LayerState:
        """Return where it stands; tensors are those of the training, not copies."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach()
            known = self.optimizer.state.get(parameter, {})
            for moment in _MOMENTS:  # zeros before the first step, as AdamW itself begins
                tensors[f"{moment}/{name}"] = known[moment] if known else torch.zeros_like(parameter)
        hidden = self.weights[0].shape[1]
        tensors["rows"] = torch.empty(0, hidden) if self._rows is None else self._rows
        return LayerState(self._key, self.steps, self.tokens, tensors)

    def restore(self, state: LayerState) -> None:
        """Go on from a state of the same key."""
        device = self.weights[0].device
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(state.tensors[f"weight/{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.steps)),
                **{moment: state.tensors[f"{moment}/{name}"].to(device, copy=True) for moment in _MOMENTS},
            }
        self.steps, self.tokens = state.steps, state.tokens
        self._rows = state.tensors["rows"].to(device, copy=True)

    def result(self, name: str) -> KvFactors:
        """Return the trained factors, on the CPU.

        Raises:
            StageError: they are not finite.
        """
        tensors = {key: parameter.detach().cpu() for key, parameter in self.parameters.items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise StageError(
                f"{name}: the training of its factors diverged", hint="write a smaller lr, or steps: 0"
            )
        return KvFactors.of(tensors)


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes:
        factors: attention -> its factors, float32 on the CPU.
        seconds: wall-clock time of this run.
        kept: attentions that an earlier run had finished.
    """

    factors: dict[str, KvFactors]
    seconds: float
    kept: int


def train(
    model: OpenModel,
    start: Mapping[str, KvFactors],
    scheme: KvCacheScheme,
    settings: CskvSettings,
    calibration: Calibration,
    folder: Path,
    progress: Progress,
) -> Trained:
    """Train the factors of all attentions; what is finished is kept in `folder`, a file each.

    Of those that are trained side by side the state is kept every `SAVE_SECONDS`: a killed run goes on
    with it, to equal bytes.

    The tokens are those of the calibration in their order, from the start again where they end. What
    comes out of one attention does not depend on which others are trained with it.

    Args:
        model: as it is without a compressed cache.
        start: attention -> the factors to start from.
        scheme: of the cache.
        settings: of the stage.
        calibration: to learn on.
        folder: named by all that the result depends on.
        progress: to report to.

    Raises:
        StageError: the training diverged, or the calibration has no whole group of tokens.
    """
    began = time.perf_counter()
    found = kept_factors(folder, start, progress)
    kept = len(found)
    needed = {name: state_bytes(scheme.layers[name], settings) for name in start}
    for part in portions(needed, STATE_BUDGET_BYTES):  # the same parts, whatever is finished
        names = [name for name in part if name not in found]
        if not names:
            continue
        training = _Part(model, names, start, scheme, settings, calibration, folder, progress)
        for name, factors in training.run().items():
            keep_factors(folder, name, factors)
            found[name] = factors
        remove_state(folder)
    return Trained({name: found[name] for name in start}, time.perf_counter() - began, kept)


class _Part:
    """Attentions that are trained side by side, on one replay of the calibration after the other."""

    def __init__(
        self,
        model: OpenModel,
        names: list[str],
        start: Mapping[str, KvFactors],
        scheme: KvCacheScheme,
        settings: CskvSettings,
        calibration: Calibration,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.model, self.scheme, self.settings = model, scheme, settings
        self.calibration, self.folder, self.progress = calibration, folder, progress
        self.trainings: dict[str, LayerTraining] = {}
        for name in names:
            attention = model.module.get_submodule(name)
            weights = [weight_of(attention.get_submodule(f"{side}_proj"), name).float() for side in "kv"]
            rounding = Rounding.of(scheme, name) if settings.trains_through_rounding else None
            training = LayerTraining(start[name], (weights[0], weights[1]), settings, rounding)
            self.trainings[f"{name}.k_proj"] = training
        self.taken = dict.fromkeys(self.trainings, 0)
        self.known = 0  # inputs of each at the beginning of a replay that the kept state has seen
        self._saved, self._interval = time.monotonic(), SAVE_SECONDS

    def run(self) -> dict[str, KvFactors]:
        """Take all steps that are left, and return the factors, attention by attention."""
        first = next(iter(self.trainings.values()))
        self._go_on(first)
        inputs = _Inputs()

        def observe(name: str, x: Tensor, timesteps: Tensor) -> None:
            if not self.trainings[name].done:
                inputs.add(name, x.detach())
            self._take(name, x.detach())

        with step(self.progress, "training the factors", self.settings.steps * len(self.trainings)):
            if first.steps:
                done = f"{first.steps} steps of a run that was broken off"
                self.progress.advance(first.steps * len(self.trainings), done)
            while not first.done:  # all of them see the same tokens
                self.taken = dict.fromkeys(self.trainings, 0)
                if inputs.complete:
                    for name, x in inputs.kept:
                        self._take(name, x)
                else:
                    self.calibration.observe(self.model, list(self.trainings), observe, self.progress)
                    inputs.end()
                self.known = 0
                if not first.tokens:
                    group = self.scheme.key_group
                    raise StageError(
                        f"no sequence of the calibration has the {group} tokens that share a scale",
                        hint=f"write `calibration: {{length: {group}}}` or more, or less key_group",
                    )
        return {_attention(name): it.result(_attention(name)) for name, it in self.trainings.items()}

    def _take(self, name: str, x: Tensor) -> None:
        self.taken[name] += 1
        if self.taken[name] <= self.known:
            return
        self.progress.advance(self.trainings[name].take(x), name)
        due = time.monotonic() - self._saved >= self._interval
        if due and min(self.taken.values()) == max(self.taken.values()):
            self._save()

    def _states(self) -> dict[str, LayerState]:
        return {_attention(name): training.state() for name, training in self.trainings.items()}

    def _save(self) -> None:
        before = time.monotonic()
        write_state(self.folder, PartState(max(self.taken.values()), self._states()))
        self._saved = time.monotonic()
        self._interval = max(SAVE_SECONDS, (self._saved - before) / _SAVED_AT_MOST)

    def _go_on(self, first: LayerTraining) -> None:
        state = read_state(self.folder, self._states(), self.progress)
        if state is None:
            return
        for name, training in self.trainings.items():
            training.restore(state.layers[_attention(name)])
        self.known = state.inputs
        self.progress.note(
            f"the training of the factors goes on after step {first.steps} of {self.settings.steps}"
        )


def _attention(linear: str) -> str:
    return linear.removesuffix(".k_proj")


class _Inputs:
    """What attentions read during the first replay, in that order, as long as all of it fits the budget.

    Attributes:
        kept: name of a linear and its input.
        complete: `kept` is a whole replay.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[str, Tensor]] = []
        self.complete = False
        self._room = INPUT_BUDGET_BYTES

    def add(self, name: str, x: Tensor) -> None:
        """Keep an input, or give up."""
        self._room -= x.numel() * x.element_size()
        if self._room >= 0:
            self.kept.append((name, x))
        else:
            self.kept.clear()

    def end(self) -> None:
        """Note that a replay has ended."""
        self.complete = self._room >= 0
