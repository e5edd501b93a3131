"""One search of the experts of one model: from its items to what stays, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ....calibration.answer_scores import Scorer
from ....calibration.answers import Item, Splits
from ....calibration.content import hash_weights
from ....errors import StageError
from ....models.base import OpenModel
from ....models.expert_choice import mixture_shape
from ....progress import Progress
from ....recipes.experts import EepSettings
from ....runtime.hashes import digest
from ...base import Workspace
from .archive import Archive
from .baselines import measure, random_choices
from .candidate import Candidates
from .comparison import FINAL, FREE, ORIGINAL, PRUNED, RANDOM, Contender, compared, scored, spread
from .evolution import Found, Search, Submit, choose, evolve, in_turn
from .field import Field
from .genome import Individual, given_choice, is_one_hot
from .judging import VERSION, Judge, JudgingJob
from .needs import search_bytes
from .shipping import change, shipped, told_coefficients
from .skipping import skipping, thresholds
from .told import told, write_down
from .workers import idle_note, submitters


class Searching:
    """One search.

    Args:
        model: open, in floating point.
        settings: of the stage.
        field: what is searched over.
        splits: the items.
        seed: of everything random.
        workspace: of the stage; it keeps the archive.
        progress: gets a step for every part.
    """

    def __init__(
        self, model: OpenModel, settings: EepSettings, field: Field, splits: Splits, seed: int,
        workspace: Workspace, progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.field = model, settings, field
        self.splits, self.seed = splits, seed
        self.workspace, self.progress = workspace, progress
        self.candidates = Candidates(model, field.groups, field.active)
        self.weights = hash_weights(model.module)

    def run(self) -> dict[str, Any]:
        """Search, score the result and all that it is compared with, and change the model.

        Returns:
            details for the report.

        Raises:
            StageError: no individual has a score, or nothing new can be bred.
        """
        train = self._judge(self.splits.train)
        rules = self._rules(train)
        seeded = rules if self.settings.seed_heuristics else {}
        search = Search(self.field.space, self.settings, self.seed, seeded)
        archive = Archive(
            self.workspace.folder / "archive", search.key(self._fitness_key()), self.field.space
        )
        idle = idle_note(self.workspace.ray or self.workspace.workers, self.settings.lag)
        if idle:
            self.progress.note(idle)
        with self._evaluations(train, self.splits.train) as submit:
            evolve(search, archive, submit, self.progress)
        found = self._choose(search, archive)
        if not math.isfinite(found.best.fitness):
            raise StageError(
                f"none of {search.total_evals} models that were tried gives finite outputs",
                hint="evaluate the original; float16 may be too narrow for it (`model: {dtype: bfloat16}`)",
            )
        result, fitness = self._result(found, train)
        scores = self._scores(search, archive, found, rules, train, Contender(FINAL, result, fitness))
        skipped = self._skipped(train)
        before = mixture_shape(self.model.config).routing
        self.candidates.forget()  # or its merged experts would lie beside those that ship
        kept = change(self.model, result, self.field)
        write_down(
            self.model, before, kept, found=result, groups=self.field.groups,
            about={"method": self.settings.method, "evaluations": search.total_evals, "seed": self.seed},
        )  # fmt: skip
        return {
            **told(self.model, before, kept),
            "groups": [group.name for group in self.field.groups],
            "fitness": self._told_fitness(),
            "scores": scores,
            **({} if skipped is None else {"skipping": skipped}),
            "merged": not result.is_choice,
            "router": "onehot" if is_one_hot(result.router) else "free",
            **told_coefficients(result, self.field),
            "seed": self.seed,
            "search": {
                "evaluations": search.total_evals,
                "prune_evals": 0 if search.merges_only else search.prune_evals,
                "best": found.best.index,
                "history": archive.history(search.total_evals),
            },
        }

    def _fitness_key(self) -> str:
        """Return the hash of all that decides a score."""
        fitness = self.settings.fitness.model_dump(mode="json", exclude={"data"})
        return digest([self.weights, self.splits.key, fitness, self.field.active, VERSION])

    def _judge(self, items: Sequence[Item]) -> Judge:
        return Judge(self.candidates, Scorer(self.model, items, self.settings.fitness))

    def _rules(self, train: Judge) -> dict[str, Individual]:
        """Return what simpler rules would keep, judged on the train items; nothing where all experts stay."""
        space = self.field.space
        if space.kept == space.experts:
            return {}
        choices = measure(
            self.model, train.scorer.prompts(), self.field.groups, space.kept,
            active=self.field.active, seed=self.seed, progress=self.progress,
            items=len(self.splits.train),
        )  # fmt: skip
        return {name: given_choice(space, kept, name) for name, kept in choices.items()}

    def _evaluations(self, judge: Judge, items: Sequence[Item]) -> AbstractContextManager[Submit]:
        """Evaluate in this process, or in workers that open the model themselves."""
        workspace, field = self.workspace, self.field
        if workspace.reopen is None:
            return nullcontext(in_turn(judge))
        job = JudgingJob(
            workspace.reopen, self.weights, field.groups, field.active, items, self.settings.fitness
        )
        needed = self.model.size().bytes + search_bytes(self.model.spec, self.settings, field)
        return submitters(
            job, workspace.ray or workspace.workers, lag=self.settings.lag, here=judge,
            device=str(next(self.model.module.parameters()).device), memory_bytes=needed,
        )  # fmt: skip

    def _choose(self, search: Search, archive: Archive) -> Found:
        if not self.splits.dev:
            return choose(search, archive, progress=self.progress)
        with self._evaluations(self._judge(self.splits.dev), self.splits.dev) as submit:
            return choose(search, archive, submit, progress=self.progress)

    def _result(self, found: Found, train: Judge) -> tuple[Individual, float]:
        """Return what ships, and its fitness: the best, or the best that is left where that is rounded."""
        result = shipped(found.best.individual, self.settings.export, self.field.space.pools)
        if result is found.best.individual:
            return result, found.best.fitness
        fitness = train(result)
        if found.pruned is None or found.pruned.fitness <= fitness:
            return result, fitness
        self.progress.note(
            f"the free router scores {found.best.fitness:.2f} on the train items, and {fitness:.2f} rounded;"
            f" experts that are only chosen score {found.pruned.fitness:.2f}, and ship"
        )
        return found.pruned.individual, found.pruned.fitness

    def _scores(
        self, search: Search, archive: Archive, found: Found, rules: Mapping[str, Individual], train: Judge,
        result: Contender,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return the rows of the table: the original, the rules, random choices, and what was found."""
        judge = self._judge(self.splits.test)
        original = Contender(ORIGINAL, None, train.scorer.score().points)
        contenders = [original, *self._ruled(rules, found, train)]
        if found.pruned is not None and found.pruned.index != found.best.index:
            contenders.append(Contender(PRUNED, found.pruned.individual, found.pruned.fitness))
        if result.individual is not found.best.individual:
            contenders.append(Contender(FREE, found.best.individual, found.best.fitness))
        contenders.append(result)
        rows = compared(judge, judge.scorer, contenders, self.progress)
        draws = self._drawn(search, archive, train)
        if draws:
            rows.insert(1, spread(compared(judge, judge.scorer, draws, self.progress)))
        return rows

    def _drawn(self, search: Search, archive: Archive, train: Judge) -> list[Contender]:
        """Return random choices: those that the search began with, and more of them where more are wanted."""
        count = 0 if search.merges_only else self.settings.random_draws
        known = [
            Contender(RANDOM, record.individual, record.fitness)
            for record in archive.first(search.prune_evals)
            if record.origin["kind"] == "random"
        ][:count]
        more = random_choices(search.space, count - len(known), self.seed)
        return [*known, *(Contender(RANDOM, one, train(one)) for one in more)]

    def _ruled(self, rules: Mapping[str, Individual], found: Found, train: Judge) -> list[Contender]:
        """Return the rules, with the fitness that the search measured of them or that is measured now."""
        return [
            Contender(name, one, found.given[name].fitness if name in found.given else train(one))
            for name, one in rules.items()
        ]

    def _skipped(self, train: Judge) -> dict[str, Any] | None:
        """Return how the original does where tokens leave out a second expert that hardly counts."""
        medians = thresholds(self.model, train.scorer.prompts(), progress=self.progress)
        if medians is None:
            return None
        scorer = Scorer(self.model, self.splits.test, self.settings.fitness)
        with skipping(self.model, medians) as skipped:
            score = scorer.score()
        return {"experts_per_token": round(skipped.experts_per_token, 4), **scored(score)}

    def _told_fitness(self) -> dict[str, Any]:
        fitness = self.settings.fitness
        return {
            "by": fitness.by,
            "task": fitness.task,
            "train": len(self.splits.train),
            "dev": len(self.splits.dev),
            "test": len(self.splits.test),
        }
