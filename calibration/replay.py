"""Running recorded calls through a model while somebody looks at the inputs of some layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..models.base import OpenModel
from ..progress import Progress, step
from ..runtime.moe_names import expert_linear
from .base import Observer
from .sampler import place
from .views import views

Call = dict[str, Any]


@torch.no_grad()
def replay(
    model: OpenModel,
    names: Sequence[str],
    observer: Observer,
    calls: Iterable[Call],
    count: int,
    timesteps_of: Callable[[Call], Tensor],
    progress: Progress,
    *,
    kind: str = "recorded call",
) -> None:
    """Replay calls through `model.module` as it is now; see `calibration.base.Calibration.observe`.

    Hooks are removed however this ends.

    Args:
        model: to run.
        names: of the layers whose inputs are looked at.
        observer: sees them.
        calls: keyword arguments of forwards, on the CPU.
        count: how many there are, for the progress.
        timesteps_of: from a call on the model's device to the timesteps of its items, [batch] float32.
        progress: gets one step.
        kind: what a call is called in an error.

    Raises:
        StageError: a name is no module, or was never reached and is no layer of an expert.
    """
    reached: set[str] = set()
    timesteps = torch.empty(0)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            reached.add(name)
            for rows, times in views(name, layer, x, timesteps):
                observer(name, rows, times)

        return see

    with ExitStack() as hooks:
        for name in dict.fromkeys(names):
            handle = _module(model, name).register_forward_pre_hook(hook(name), with_kwargs=True)
            hooks.callback(handle.remove)
        with step(progress, "replaying calibration", count):
            for call in calls:
                kwargs = place(call, model.module)
                timesteps = timesteps_of(kwargs)
                model.module(**kwargs, return_dict=False)
                progress.advance()
    # A token goes through a few experts; that none goes through one of them is no mistake.
    unreached = [name for name in names if name not in reached and expert_linear(name) is None]
    if unreached:
        raise StageError(f"{unreached[0]}: no {kind} reaches this layer ({len(unreached)} such layers)")


def _module(model: OpenModel, name: str) -> nn.Module:
    try:
        return model.module.get_submodule(name)
    except AttributeError:
        raise StageError(f"{name}: the model has no such layer") from None
