"""CSKV: a key-value cache of few channels (arXiv 2409.10593).

An attention's cache keeps c_K = x A_K and c_V = x A_V of a token, and the latest tokens exactly; keys and
values are rebuilt from c when a token is decoded. The stage finds the factors, and leaves the model's
weights alone.

Where paper and official code are otherwise: both start from ASVD and train, which is `init: asvd` with
`steps`; the default is the closed form that this training ends at. The official quantizer clamps its zero
point to the grid, which destroys groups away from zero; ours does not. Factors are found for biased
projections as well, which the official code refuses. Ranks by layer are not in the paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...calibration.base import Calibration
from ...calibration.seeds import generator_for
from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress, step
from ...recipes.kv_cache import CskvSettings
from ...runtime.kv.attach import factors_of, put_kv_cache
from ...runtime.kv.scheme import KvCacheScheme
from ..base import StagePlan, Workspace
from .details import LayerFindings, described
from .energies import Energies, Energy
from .factorise import KvFactors, Pair, factorise, mean_square_error, spectrum_of, weight_of
from .planning import attentions_of, plan_cskv
from .ranks import SIDES, Ranks, dealt_out, scheme_of, uniform_ranks
from .rounded import rounded_errors
from .training import Trained, train


class Cskv:
    """The method. Stateless."""

    method: ClassVar[str] = "cskv"
    families: ClassVar[frozenset[str]] = CskvSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: CskvSettings) -> StagePlan:
        """Predict; see `planning.plan_cskv`."""
        return plan_cskv(spec, settings)

    def apply(
        self,
        model: OpenModel,
        settings: CskvSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Compress the cache in place; no weight of the model changes.

        Raises:
            PlanError: the cache is compressed already, the model cannot, or a share leaves no channel.
            StageError: the calibration is not finite, or the training diverged.
        """
        if model.kv_cache is not None:
            raise PlanError("the cache of this model is compressed already")
        with torch.no_grad():
            return _Run(model, settings, calibration, workspace, progress).run()


class _Run:
    """State of one run of the stage."""

    def __init__(
        self,
        model: OpenModel,
        settings: CskvSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self.model, self.settings, self.calibration = model, settings, calibration
        self.workspace, self.progress = workspace, progress
        attentions = attentions_of(model.config)
        self.sites, self.skipped = attentions.compressible, attentions.skipped
        self.energies = Energies(
            model,
            calibration,
            progress,
            sources={site.name: f"{site.name}.k_proj" for site in self.sites},
            widths={site.name: site.hidden for site in self.sites},
        )
        self.dealt: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        """Do all of it."""
        before = self.model.size()
        ranks = self._ranks()
        scheme = scheme_of(self.sites, ranks, self.settings)
        found = self._factorise(ranks)
        sets = {name: [findings.factors] for name, findings in found.items()}
        trained = None
        if self.settings.steps:
            trained = self._train(found, scheme)
            for name, factors in trained.factors.items():
                sets[name].append(factors)
        if scheme.bits is not None:
            self._measure_rounded(found, sets, scheme)
        put_kv_cache(self.model.module, scheme)
        for name, placed in factors_of(self.model.module).items():
            for key, tensor in found[name].factors.tensors().items():
                placed.get_submodule(key).get_parameter("weight").copy_(tensor)
        self.model.kv_cache = scheme
        return {
            "kv_cache": described(
                self.model, scheme, self.settings, found, self.skipped, before, trained, self.dealt
            )
        }

    def _weight(self, name: str, side: str) -> Tensor:
        linear = f"{name}.{side}_proj"
        return weight_of(self.model.module.get_submodule(linear), linear)

    def _ranks(self) -> Ranks:
        equal = uniform_ranks(self.sites, self.settings)
        if self.settings.allocate == "uniform":
            return equal
        lost = {}
        with step(self.progress, "what every rank loses", len(self.sites)):
            for name, energy in self.energies.each():
                shares = [spectrum_of(self._weight(name, side), energy.gram).lost_shares() for side in SIDES]
                lost[name] = shares[0], shares[1]
                self.progress.advance(1, name)
        ranks, allocation = dealt_out(self.sites, self.settings, lost)
        self.dealt = {
            "lost_shares": allocation.loss,
            "lower_bound": allocation.lower_bound,
            "lost_shares_of_equal_ranks": sum(
                lost[name][index][rank - 1] for name, pair in equal.items() for index, rank in enumerate(pair)
            ),
        }
        self.progress.note(
            f"ranks by layer: lost shares of variance add up to {allocation.loss:.4g}, those of equal"
            f" ranks to {self.dealt['lost_shares_of_equal_ranks']:.4g}"
        )
        return ranks

    def _factorise(self, ranks: Ranks) -> dict[str, LayerFindings]:
        found = {}
        with step(self.progress, "factors", len(self.sites)):
            for name, energy in self.energies.each():
                found[name] = self._layer(name, energy, ranks[name])
                self.progress.advance(1, name)
        return found

    def _layer(self, name: str, energy: Energy, ranks: tuple[int, int]) -> LayerFindings:
        pairs: dict[str, Pair] = {}
        variances, errors = {}, {}
        for side, rank in zip(SIDES, ranks, strict=True):
            weight = self._weight(name, side)
            spectrum = spectrum_of(weight, energy.gram)
            generator = generator_for(self.calibration.seed, "factors", name, side)
            pair = factorise(
                weight, energy, spectrum, rank, self.settings.init,
                alpha=self.settings.alpha, generator=generator,
            )  # fmt: skip
            errors[side] = mean_square_error(weight, pair, energy.gram)
            variances[side] = spectrum.variances.cpu()
            pairs[side] = Pair(pair.a.cpu(), pair.b.cpu())
        return LayerFindings(KvFactors(pairs["k"], pairs["v"]), variances, errors, None, energy.tokens)

    def _train(self, found: dict[str, LayerFindings], scheme: KvCacheScheme) -> Trained:
        start = {name: findings.factors for name, findings in found.items()}
        trained = train(
            self.model, start, scheme, self.settings, self.calibration, self.workspace.folder, self.progress
        )
        with step(self.progress, "errors of the trained factors", len(self.sites)):
            for name, energy in self.energies.each():
                factors = trained.factors[name]
                errors = {
                    side: mean_square_error(self._weight(name, side), _on(pair, energy.gram), energy.gram)
                    for side, pair in zip(SIDES, (factors.k, factors.v), strict=True)
                }
                found[name] = found[name].trained(factors, errors)
                self.progress.advance(1, name)
        return trained

    def _measure_rounded(
        self, found: dict[str, LayerFindings], sets: dict[str, list[KvFactors]], scheme: KvCacheScheme
    ) -> None:
        with step(self.progress, "errors with rounding", None):
            measured = rounded_errors(self.model, sets, scheme, self.calibration, self.progress)
        for name, errors in measured.items():
            found[name] = replace(found[name], rounded=errors)


def _on(pair: Pair, like: Tensor) -> Pair:
    return Pair(pair.a.to(like.device), pair.b.to(like.device))
