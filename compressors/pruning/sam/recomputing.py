"""Layers of an encoder that keep their inputs alone, and compute the rest again on the way back.

The library does the same only for a module that trains; an encoder is scored and aligned as it is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(encoder: nn.Module) -> Iterator[None]:
    """Compute every layer again in the backward pass, within the context.

    Outputs and gradients stay bit-equal. Hooks on what is inside a layer run a second time on the way back;
    hooks on the layer itself do not.

    Args:
        encoder: with a list `layers`; nothing in it draws random numbers.
    """
    layers = list(encoder.get_submodule("layers").children())
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(again, layer.forward)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward`, keep its tensors among the arguments alone, and call it again on the way back."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
