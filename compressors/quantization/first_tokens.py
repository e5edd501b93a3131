"""Which cross-attention layers store their output for the first token: MixDQ, arXiv 2405.17873.

A causal text encoder with a fixed first token gives that token one and the same feature for every
prompt. Whether a model's text comes from such an encoder is no question of its family; the recorded
prompts answer it. A bidirectional encoder (T5) mixes all tokens into the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...calibration.base import Calibration
from ...errors import PlanError, StageError
from ...models.base import LinearSite, OpenModel
from ...progress import Progress, step
from ...recipes.stages import GridSettings
from ...runtime.encoders import hashes_beside
from ...runtime.first_token import distance
from ...runtime.manifest import ActivationScheme, FirstToken, QuantizedModule

_ROLES = ("cross.k", "cross.v")
_PLANNED = FirstToken(sha256="0" * 64)
IDENTICAL = 0.01
"""Distance up to which first tokens are one: 16-bit text encoders round by less, others are farther."""
_OTHER_PROMPT = 1e-3
"""Distance of the average of all further tokens from which on it is another prompt's."""


def planned(
    site: LinearSite, settings: GridSettings, activation: ActivationScheme | None
) -> FirstToken | None:
    """Return what is planned for a layer: a stored first token where it is asked for or may pay.

    Left to itself (`auto`), a token is stored beside static activations alone: with a scale per token
    an outlier costs the others nothing.
    """
    static = activation is not None and activation.scope == "tensor"
    wanted = settings.first_token == "store" or (settings.first_token == "auto" and static)
    return _PLANNED if wanted and site.role in _ROLES else None


def check_wanted(settings: GridSettings, sites: Sequence[LinearSite]) -> None:
    """Refuse to store first tokens in a model that has no layer for it.

    Raises:
        PlanError: the model has no cross-attention.
    """
    if settings.first_token == "store" and not any(site.role in _ROLES for site in sites):
        raise PlanError(
            "first_token: store: the model has no cross-attention that reads text",
            hint="leave the key out; it is for U-Nets and transformers with cross-attention to CLIP features",
        )


@dataclass
class Evidence:
    """What the calibration says about the first token that a layer reads.

    Attributes:
        feature: [in] float32, of the first row seen; None before.
        spread: largest distance of another row's first token to it; 0 is bit for bit the same.
        others: largest distance of another row's further tokens, averaged, to those of the first row.
        tokens: most tokens of a row.
    """

    feature: Tensor | None = None
    spread: float = 0.0
    others: float = 0.0
    tokens: int = 0
    _rest: Tensor | None = None

    def update(self, x: Tensor, timesteps: Tensor) -> None:
        """Take one batch: x [batch, tokens, in]; timesteps are not looked at."""
        x = x.detach().float()
        self.tokens = max(self.tokens, x.shape[1])
        if self.feature is None:
            self.feature = x[0, 0].clone()
        self.spread = max(self.spread, _largest(distance(x[:, 0], self.feature)))
        if x.shape[1] > 1:
            rest = x[:, 1:].mean(dim=1)
            if self._rest is None:
                self._rest = rest[0].clone()
            self.others = max(self.others, _largest(distance(rest, self._rest)))

    def objection(self) -> str | None:
        """Return why the first token cannot be stored; None where it can."""
        if self.tokens < 2:
            return "the text has one token only, so that nothing would be left to quantize"
        if not self.spread <= IDENTICAL:
            return (
                f"the first token is not the same for every recorded prompt: it is off by up to"
                f" {self.spread:.3g} of its size, as with encoders that read both ways (T5), or with"
                " negative prompts replaced by zeros"
            )
        if not self.others > _OTHER_PROMPT:
            return "the calibration has one prompt only, which cannot tell whether the first token is fixed"
        return None


def _largest(distances: Tensor) -> float:
    return float(torch.nan_to_num(distances, nan=torch.inf).amax())


def gather_first_tokens(
    model: OpenModel, names: Sequence[str], calibration: Calibration, progress: Progress
) -> dict[str, Evidence]:
    """Replay the calibration once and look at the first tokens that layers read."""
    found = {name: Evidence() for name in names}
    if not names:
        return found

    def observe(name: str, x: Tensor, timesteps: Tensor) -> None:
        found[name].update(x, timesteps)

    with step(progress, "first tokens"):
        calibration.observe(model, names, observe, progress)
    return found


@dataclass(frozen=True)
class FirstTokens:
    """The first tokens that layers store.

    Attributes:
        features: layer -> [in] float32, the token as the layer reads it before any transform.
        encoders: file of a text encoder beside the model -> SHA-256.
        objections: layer that was planned with one -> why it stores none.
    """

    features: Mapping[str, Tensor]
    encoders: Mapping[str, str]
    objections: Mapping[str, str]

    def details(self) -> dict[str, Any]:
        """Return what a report says: layers that store their token, and why others do not; JSON values."""
        if not self.features and not self.objections:
            return {}
        return {"first_token": {"stored": list(self.features), "computed": dict(self.objections)}}

    def scheme(self, name: str, scheme: QuantizedModule) -> QuantizedModule:
        """Return a planned scheme with what was found: the encoders, or no first token at all."""
        if scheme.first_token is None:
            return scheme
        found = None
        if name in self.features:
            found = scheme.first_token.model_copy(update={"encoders": dict(self.encoders)})
        return scheme.model_copy(update={"first_token": found})


def settle_first_tokens(
    model: OpenModel,
    schemes: Mapping[str, QuantizedModule],
    settings: GridSettings,
    calibration: Calibration,
    progress: Progress,
) -> FirstTokens:
    """Find out on the calibration which of the planned layers store their first token.

    Args:
        model: as it came in.
        schemes: layer -> planned scheme.
        settings: of the stage.
        calibration: to replay.
        progress: to report to.

    Raises:
        StageError: `first_token: store`, and the first token differs or cannot be told.
    """
    names = [name for name, scheme in schemes.items() if scheme.first_token is not None]
    evidence = gather_first_tokens(model, names, calibration, progress)
    objections = {name: reason for name in names if (reason := evidence[name].objection())}
    if objections and settings.first_token == "store":
        name, reason = next(iter(objections.items()))
        raise StageError(
            f"first_token: store: {name}: {reason}",
            hint="use first_token: quantize with activation_scale: token, which needs no fixed first token",
        )
    features = {
        name: found.feature
        for name, found in evidence.items()
        if name not in objections and found.feature is not None
    }
    encoders = hashes_beside(model.source.folder) if features else {}
    return FirstTokens(features, encoders, objections)
