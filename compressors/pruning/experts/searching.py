"""One search of the experts of one model: from its items to what stays, and how good that is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from ....calibration.answer_scores import Score, Scorer
from ....calibration.answers import Item, Splits
from ....calibration.content import hash_weights
from ....errors import StageError
from ....models.base import OpenModel
from ....models.expert_choice import mixture_shape
from ....progress import Progress
from ....recipes.experts import EepSettings
from ....runtime.atomic import atomic_file
from ....runtime.hashes import digest
from ...base import Workspace
from .archive import Archive
from .baselines import Rules, measure, random_choices
from .candidate import Candidates
from .comparison import FINAL, FREE, ORIGINAL, PRUNED, RANDOM, Contender, compared, scored, spread
from .evolution import Found, Search, Submit, choose, evolve, in_turn
from .field import Field
from .genome import Individual, Space, given_choice, is_one_hot
from .judging import VERSION, Judge, JudgingJob
from .layer_groups import layer_groups
from .needs import search_bytes
from .shipping import change, shipped, told_coefficients
from .skipping import skipping, thresholds
from .told import told, write_down
from .workers import idle_note, submitters

_HARDLY_ANY = 0.05
"""Share of items below which the original's answers say nothing."""


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
        single = layer_groups(mixture_shape(model.config).sparse, "per_layer")
        shared = len(field.groups) < len(single)
        self.layers = Candidates(model, single, field.active) if shared else self.candidates
        self.weights = hash_weights(model.module)

    def run(self) -> dict[str, Any]:
        """Search, score the result and all that it is compared with, and change the model.

        Returns:
            details for the report.

        Raises:
            StageError: no individual has a score, or nothing new can be bred.
        """
        train = self._judge(self.splits.train)
        dev = self._judge(self.splits.dev) if self.splits.dev else None
        test = self._judge(self.splits.test)
        original = train.scorer.score()
        self._check_original(original)
        rules = self._rules(train)
        search = Search(self.field.space, self.settings, self.seed, self._seeds(rules))
        archive = Archive(
            self.workspace.folder / "archive", search.key(self._fitness_key()), self.field.space
        )
        if len(archive):
            self.progress.note(f"the search goes on after {len(archive)} evaluations that are kept")
        idle = idle_note(self.workspace.ray or self.workspace.workers, self.settings.lag)
        if idle:
            self.progress.note(idle)
        with self._evaluations(train, self.splits.train) as submit:
            evolve(search, archive, submit, self.progress)
        found = self._choose(search, archive, dev)
        if not math.isfinite(found.best.fitness):
            raise StageError(
                f"none of {search.total_evals} models that were tried gives finite outputs",
                hint="evaluate the original; float16 may be too narrow for it (`model: {dtype: bfloat16}`)",
            )
        result, fitness = self._result(found, train, dev)
        contenders = [
            Contender(ORIGINAL, None, original.points),
            *self._ruled(rules, found, train),
            *self._searched(found, Contender(FINAL, result, fitness)),
        ]
        scores = self._scores(contenders, self._drawn(search, archive, train), test)
        skipped = self._skipped(train, test)
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
            "search": self._told_search(search, archive, found),
        }

    def _check_original(self, score: Score) -> None:
        """Warn of train items that say nothing: the original answers hardly any."""
        if score.accuracy is not None and score.accuracy < _HARDLY_ANY:
            self.progress.warn(
                f"the original answers {score.accuracy:.1%} of the train items rightly, which is little to go"
                " by: look at prompts (the model's own template?), at answers (also their first space),"
                " and, by exact_match, at new_tokens"
            )

    def _fitness_key(self) -> str:
        """Return the hash of all that decides a score."""
        fitness = self.settings.fitness.model_dump(mode="json", exclude={"data"})
        return digest([self.weights, self.splits.key, fitness, self.field.active, VERSION])

    def _judge(self, items: Sequence[Item]) -> Judge:
        """Return what scores individuals of the search, and choices that every layer has for itself."""
        return Judge(Scorer(self.model, items, self.settings.fitness), self.layers, self.candidates)

    def _rules(self, train: Judge) -> Rules | None:
        """Return what simpler rules keep, by the train items; None where all experts stay.

        What they keep is written down: a search that goes on has to begin as it did.
        """
        space, path = self.field.space, self.workspace.folder / "rules.json"
        if space.kept == space.experts:
            return None
        if path.is_file():
            return Rules.from_json(json.loads(path.read_text(encoding="utf-8")))
        rules = measure(
            self.model, train.scorer.prompts(), self.field.groups, space.kept,
            active=self.field.active, seed=self.seed, progress=self.progress,
            items=len(self.splits.train),
        )  # fmt: skip
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(rules.to_json()) + "\n", encoding="utf-8")
        return rules

    def _seeds(self, rules: Rules | None) -> dict[str, Individual]:
        if rules is None or not self.settings.seed_heuristics:
            return {}
        return {name: given_choice(self.field.space, kept, name) for name, kept in rules.shared.items()}

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

    def _choose(self, search: Search, archive: Archive, dev: Judge | None) -> Found:
        if dev is None:
            return choose(search, archive, progress=self.progress)
        with self._evaluations(dev, self.splits.dev) as submit:
            return choose(search, archive, submit, progress=self.progress)

    def _result(self, found: Found, train: Judge, dev: Judge | None) -> tuple[Individual, float]:
        """Return what ships, and its fitness: the best, or the best that is left where that is rounded."""
        result = shipped(found.best.individual, self.settings.export, self.field.space.pools)
        if result is found.best.individual:
            if self.settings.router == "free" and is_one_hot(result.router):
                self.progress.note(
                    "the best router has one row for every expert, so the model is a stock one"
                )
            return result, found.best.fitness
        fitness, pruned = train(result), found.pruned
        if pruned is None:
            return result, fitness
        rounded, chosen = (fitness, pruned.fitness) if dev is None else (dev(result), dev(pruned.individual))
        if chosen <= rounded:
            return result, fitness
        self.progress.note(
            f"the free router scores {found.best.fitness:.2f} on the train items, and {fitness:.2f}"
            f" rounded; experts that are only chosen score {pruned.fitness:.2f}, and ship"
        )
        return pruned.individual, pruned.fitness

    def _scores(
        self, contenders: Sequence[Contender], draws: Sequence[Contender], test: Judge
    ) -> list[dict[str, Any]]:
        """Return the rows of the table: random choices are one, behind the original."""
        rows = compared(test, test.scorer, contenders, self.progress)
        if draws:
            rows.insert(1, spread(compared(test, test.scorer, draws, self.progress)))
        return rows

    def _searched(self, found: Found, result: Contender) -> list[Contender]:
        """Return what the search came to, and before it what led there and is something else."""
        rows = [result]
        if result.individual is not found.best.individual:
            rows.insert(0, Contender(FREE, found.best.individual, found.best.fitness))
        if found.pruned is not None and found.pruned.index != found.best.index:
            rows.insert(0, Contender(PRUNED, found.pruned.individual, found.pruned.fitness))
        return rows

    def _drawn(self, search: Search, archive: Archive, train: Judge) -> list[Contender]:
        """Return random choices of every layer: the first ones of the search, if they are such, and more."""
        count = 0 if search.merges_only else self.settings.random_draws
        known = [
            Contender(RANDOM, record.individual, record.fitness)
            for record in archive.first(search.prune_evals)
            if record.origin["kind"] == "random" and search.space.groups == self.layers.groups
        ][:count]
        more = random_choices(self._by_layer(), count - len(known), self.seed)
        return [*known, *(Contender(RANDOM, one, train(one)) for one in more)]

    def _ruled(self, rules: Rules | None, found: Found, train: Judge) -> list[Contender]:
        """Return what the rules keep of every layer, as they were published: no layers share a choice."""
        choices = {} if rules is None else rules.by_layer
        known = {} if self.layers is not self.candidates else found.given
        rows = []
        for name, kept in choices.items():
            one = given_choice(self._by_layer(), kept, name)
            rows.append(Contender(name, one, known[name].fitness if name in known else train(one)))
        return rows

    def _by_layer(self) -> Space:
        return replace(self.field.space, groups=self.layers.groups)

    def _skipped(self, train: Judge, test: Judge) -> dict[str, Any] | None:
        """Return how the original does where tokens leave out a second expert that hardly counts."""
        medians = thresholds(self.model, train.scorer.prompts(), progress=self.progress)
        if medians is None:
            return None
        with skipping(self.model, medians) as skipped:
            score = test.scorer.score()
        return {"experts_per_token": round(skipped.experts_per_token, 4), **scored(score)}

    def _told_search(self, search: Search, archive: Archive, found: Found) -> dict[str, Any]:
        return {
            "evaluations": search.total_evals,
            "prune_evals": 0 if search.merges_only else search.prune_evals,
            "best": found.best.index,
            "history": archive.history(search.total_evals),
        }

    def _told_fitness(self) -> dict[str, Any]:
        fitness = self.settings.fitness
        return {
            "by": fitness.by,
            "task": fitness.task,
            "train": len(self.splits.train),
            "dev": len(self.splits.dev),
            "test": len(self.splits.test),
        }
