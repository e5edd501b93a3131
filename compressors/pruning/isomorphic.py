"""Isomorphic Pruning (arXiv 2407.04616): structured pruning in which only sub-structures of one form compete.

The paper ranks the channels of every class of isomorphic sub-structures among themselves and removes the
least important share of each. This stage does what the official code computes (mean over tensors, division
by each layer's own mean, head scores on the layout before the cut), and differs from it where the code is
wrong or leaves a choice: exact class totals, layers that never vanish nor stay whole by accident, rounding
on the true dimension, sorted slices, and a check of the result. torch-pruning supplies the dependencies
and nothing else.

Beyond the paper: targets found without cutting, denoisers (whose loss is the error of the denoiser), losses
without labels, and `attn_scale: preserve`, with which removed channels are all that changes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...calibration.objectives import Objective, objective_for
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress, step
from ...recipes.pruning import IsomorphicSettings
from ..base import Preview, StagePlan, Workspace
from .baselines import apart, measure_baselines
from .checking import check
from .cutting import cut, planned_surgery
from .deciding import (
    Decision,
    Moment,
    Scored,
    cost_of,
    decide,
    loss_name,
    readable_json,
    score_groups,
    write_json,
)
from .details import ATTACHMENT, class_rows, effective_ratios, paper_pair, selection_document, widths_after
from .graph import find_groups
from .groups import Group, Selection
from .measuring import mean_loss
from .planning import plan_stage, preview_notes
from .selection import compose
from .target import Counter
from .widths import Widths


class Isomorphic:
    """The method. Stateless."""

    method: ClassVar[str] = "isomorphic"
    families: ClassVar[frozenset[str]] = IsomorphicSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: IsomorphicSettings) -> StagePlan:
        """Predict; class totals are exact, their spread over the layers is assumed even."""
        return plan_stage(spec, settings)

    def apply(
        self,
        model: OpenModel,
        settings: IsomorphicSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Cut `model` in place. What goes is written down before the first weight is cut.

        Raises:
            PlanError: what is asked does not fit the model.
            StageError: scores cannot be computed, or the cut model is not whole.
        """
        run = _Run(model, settings, calibration, workspace, progress)
        return run.details(run.prune())

    def preview(
        self,
        model: OpenModel,
        settings: IsomorphicSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> Preview:
        """Return what the first step of `apply` would decide; nothing is cut.

        Of a schedule with several steps it is the whole share by the scores of the first.

        Raises:
            PlanError, StageError: as `apply`.
        """
        once = settings.model_copy(update={"steps": 1, "baselines": ()})
        run = _Run(model, once, calibration, workspace, progress)
        decision = run.decide(0, run.groups)
        chosen = decision.selection
        after = widths_after(run.groups, chosen)
        kept = {name: len(places) for name, places in chosen.kept.items()}
        spec = run.before.cut(planned_surgery(run.before, run.groups, kept, after.heads))
        details = {**run.told(decision, chosen), "selection": chosen.to_json()}
        return Preview(details, spec, preview_notes(settings))


class _Run:
    """One application: what its parts share."""

    def __init__(
        self,
        model: OpenModel,
        settings: IsomorphicSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self.model, self.settings, self.calibration = model, settings, calibration
        self.workspace, self.progress = workspace, progress
        self.groups = find_groups(model)
        self.before = model.dense()
        self.initial = Widths.of(self.groups)
        self.scored: Scored | None = None
        self.untouched = apart(model) if settings.baselines else None
        # Made before the cut: a loss may be defined by the answers of the model as it is now.
        self.objective = self._objective()

    def _objective(self) -> Objective | None:
        if self.settings.importance == "magnitude" and not self.settings.baselines:
            return None
        instead = "importance: magnitude without baselines needs no loss"
        return objective_for(self.model, self.calibration, self.settings.loss, instead)

    def decide(self, index: int, groups: list[Group]) -> Decision:
        """Decide a step on the model as it is now, or read what was decided before a kill."""
        kept = self.workspace.folder / f"step-{index}.json"
        found = Decision.read(kept)
        if found is not None:
            self.progress.note(f"step {index + 1}: the selection of a run that was broken off is used")
            return found
        scored = score_groups(
            self.model, groups, self.settings, self.objective, self.workspace.folder, self.progress
        )
        if index == 0:
            self.scored = scored
        moment = Moment(index, self.settings.steps, self.initial, cost_of(self.model.spec))
        decision = decide(self.model, groups, scored, self.settings, moment, self.calibration.samples)
        decision.write(kept)
        return decision

    def prune(self) -> list[tuple[Decision, Selection]]:
        """Carry out all steps; return each decision with what stays after it of the model before all."""
        done: list[tuple[Decision, Selection]] = []
        groups = self.groups
        with step(self.progress, "pruning", self.settings.steps):
            for index in range(self.settings.steps):
                decision = self.decide(index, groups)
                whole = compose(done[-1][1], decision.selection) if done else decision.selection
                done.append((decision, whole))
                if index + 1 == self.settings.steps:
                    self._write_down(done)
                if decision.selection.kept:  # a step of a long schedule can be too small for any layer
                    cut(self.model, groups, decision.selection, attn_scale=self.settings.attn_scale)
                    groups = check(self.model)
                self.progress.advance(1, f"step {index + 1} of {self.settings.steps}")
        return done

    def _write_down(self, done: list[tuple[Decision, Selection]]) -> None:
        """Write what goes, for a reader and for the exported folder."""
        decision, whole = done[-1]
        cost = Counter(self.before, self.groups).cost
        document = selection_document(
            self.groups, whole, self.settings, seed=self.calibration.seed, samples=decision.samples,
            calibration=self.calibration.key,
            cost=(cost_of(self.before), cost(widths_after(self.groups, whole))),
        )  # fmt: skip
        write_json(self.workspace.folder / "selection.json", document)
        self.model.attachments[ATTACHMENT] = readable_json(document)

    def details(self, done: list[tuple[Decision, Selection]]) -> dict[str, Any]:
        """Return the details of the finished stage."""
        last, whole = done[-1]
        size = self.model.size()
        told = self.told(last, whole)
        loss = told["loss"]
        first = done[0][0].loss
        if self.objective is not None:
            loss = {
                "name": loss_name(self.model, self.settings),
                "before": first if first is not None else self._loss_before(),
                "after": mean_loss(self.model, self.objective, self.progress),
            }
        return told | {
            "macs": [self.before.size().macs, size.macs],
            "parameters": [self.before.parameters, size.parameters],
            "paper_macs": paper_pair(self.before, self.model),
            "loss": loss,
            "baselines": self._baselines(size.macs),
            "schedule": [
                {"channels": sum(widths_after(self.groups, whole).flat().values()), "loss": decision.loss}
                for decision, whole in done
            ],
        }

    def _loss_before(self) -> float | None:
        if self.untouched is None or self.objective is None:
            return None
        return mean_loss(self.untouched, self.objective, self.progress)

    def _baselines(self, macs: int) -> dict[str, Any]:
        if self.untouched is None or self.objective is None:
            return {}
        scored = self.scored or score_groups(
            self.untouched, self.groups, self.settings, self.objective, None, self.progress
        )
        return measure_baselines(
            self.untouched, self.groups, scored.scores, self.settings, self.objective, macs, self.progress
        )

    def told(self, decision: Decision, whole: Selection) -> dict[str, Any]:
        """Return what is known once everything is decided, cut or not."""
        settings = self.settings
        after = widths_after(self.groups, whole)
        cost = Counter(self.before, self.groups).cost(after)
        return {
            "classes": class_rows(self.groups, after, settings, decision.histograms),
            "macs": [self.before.size().macs, cost.macs],
            "parameters": [self.before.parameters, cost.parameters],
            "bytes": [self.before.size().bytes, cost.bytes],
            "samples": decision.samples,
            "loss": None
            if decision.loss is None
            else {"name": decision.loss_name, "before": decision.loss, "after": None},
            "target": decision.target,
            "ratios": effective_ratios(self.groups, after, settings),
            "ranking": settings.ranking,
            "importance": settings.importance,
            "selection_file": ATTACHMENT,
        }
