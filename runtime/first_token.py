"""The first token of a causal text encoder: the same for every prompt, so its keys and values are stored.

Such a token (the start of a CLIP prompt) is many times larger than all others; on a grid for the
whole tensor it would leave the others few levels. A layer that reads it therefore stores its output
for this token in floating point and quantizes the tokens after it: MixDQ, arXiv 2405.17873.

Whoever runs the model may feed another first token: a tokenizer of their own, or the zeros that a
pipeline puts in the place of an empty prompt. So the token that the output belongs to is stored with
it and looked at in every row. Another one is computed like the rest, on a grid of its own, which
zeros and outliers pass as well as all others; no row ever gets an output that is not its own. A long
text that was encoded in pieces has such a token at the start of each: only the very first is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 0.03
"""Distance up to which a token is the stored one: more than rounding to 16 bits in the text encoder
makes, and less than another token's."""

_TEXT_ARGUMENT = "encoder_hidden_states"


def distance(x: Tensor, feature: Tensor) -> Tensor:
    """Return the relative distance of tokens to a feature.

    Sums of absolute values are compared, because the few channels in which such a token is large
    may be large for others in its place, too.

    Args:
        x: [..., channels] float.
        feature: [channels] float.

    Returns:
        float32 [...]: sum |x - feature| / sum |feature|; 0 where both are all zero.
    """
    feature = feature.float()
    size = feature.abs().sum()
    apart = (x.float() - feature).abs().sum(dim=-1)
    return torch.where(apart == 0, apart, apart / size)


def digest(feature: Tensor) -> str:
    """Return the SHA-256 of a feature's float32 values."""
    values: Any = feature.detach().float().cpu().contiguous().numpy()
    return sha256(values.astype("<f4").tobytes()).hexdigest()


def around(
    x: Tensor,
    feature: Tensor,
    stored: Tensor,
    rest: Callable[[Tensor], Tensor],
    alone: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute a layer whose output for the first token is stored.

    Args:
        x: [..., tokens, channels].
        feature: [channels]; the token that `stored` belongs to.
        stored: [outputs].
        rest: computes all other tokens, [..., tokens - 1, channels] -> [..., tokens - 1, outputs].
        alone: computes a first token that is another one, of the same shapes.

    Returns:
        [..., tokens, outputs] in the dtype that `rest` and `alone` return.

    Raises:
        ValueError: x has no axis of tokens.
    """
    if x.dim() < 3 or x.shape[-2] < 1:
        raise ValueError(
            f"input {list(x.shape)}: a layer that stores its output for the first token reads"
            " [batch, tokens, channels]"
        )
    first = x[..., :1, :]
    known = (distance(first, feature) <= TOLERANCE).unsqueeze(-1)
    free = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if free and bool(known.all()):
        head = stored.expand(*first.shape[:-1], len(stored))
    else:
        # Elsewhere the question would stop the device; the answer for one token costs less.
        other = alone(first)
        head = torch.where(known, stored.to(other.dtype), other)
    if x.shape[-2] == 1:
        return head.to(x.dtype).clone()
    tail = rest(x[..., 1:, :])
    return torch.cat([head.to(tail.dtype), tail], dim=-2)


def feature_of(module: nn.Module) -> Tensor | None:
    """Return the first token that the module's layers store, [channels]; None where they store none."""
    features = (getattr(layer, "first_token_input", None) for layer in module.modules())
    return next((feature for feature in features if isinstance(feature, Tensor)), None)


def put_first(feature: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return example inputs whose first row starts with a stored token.

    So that what is stored takes part when two copies of a model are compared. Inputs of a model
    that stores no such token, or does not read it directly, come back as they are.

    Args:
        feature: [channels], of `feature_of`.
        inputs: keyword arguments of a forward.
    """
    text = inputs.get(_TEXT_ARGUMENT)
    if feature is None or not isinstance(text, Tensor) or text.shape[-1] != len(feature):
        return inputs
    text = text.clone()
    text[0, 0] = feature.to(text.device, text.dtype)
    return {**inputs, _TEXT_ARGUMENT: text}
