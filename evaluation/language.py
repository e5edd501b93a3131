"""Compare a compressed language model with its original, on text that was not calibrated on.

Both read the same sequences. The logits say how far the outputs are apart (SQNR), the distributions of
the next token how far the predictions are (KL divergence), and the text itself how good they are
(perplexity). Every sequence is read by itself, so a perplexity here is higher than one over long contexts
and is comparable within one report only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calibration.questions import Questions
from ..calibration.text import text_key
from ..calibration.tokens import sequences_of
from ..models.base import OpenModel
from ..progress import Progress, step, track
from ..recipes.decoding import PasskeySettings
from ..recipes.schema import CalibrationSettings, EvaluateSettings, FidelitySettings
from ..runtime.hashes import digest
from ..runtime.kv.attach import kv_scheme_of
from .answers import add_answers, ask
from .call_store import CallWriter
from .decoding import ONE_PASS, add_decoding
from .evaluator import Evaluation
from .layers import Powers
from .metrics import powers
from .passkey import find, passkeys
from .reference import CALLS, VERSION, Reference, recorded
from .size import linear_inventory
from .watched import compare_watched, record_watched, whole_call


@dataclass
class Likelihoods:
    """Running sums over scored tokens, in nats.

    Attributes:
        tokens: how many were scored.
        original, compressed: negative log-likelihood of the text.
        divergence: KL divergence of the compressed model's distribution from the original's.
    """

    tokens: int = 0
    original: float = 0.0
    compressed: float = 0.0
    divergence: float = 0.0

    def add(self, ids: Tensor, wanted: Tensor, given: Tensor, prefix: int) -> None:
        """Score one sequence.

        Args:
            ids: [length] int64.
            wanted: [length, vocabulary], the original's logits.
            given: the compressed model's.
            prefix: leading ids that are no text.
        """
        first = max(prefix, 1)
        before = F.log_softmax(wanted[first - 1 : -1].float(), dim=-1)
        after = F.log_softmax(given[first - 1 : -1].float(), dim=-1)
        target = ids[first:, None]
        self.tokens += len(target)
        self.original -= float(before.gather(1, target).double().sum())
        self.compressed -= float(after.gather(1, target).double().sum())
        self.divergence += float((before.exp() * (before - after)).double().sum())

    def metrics(self) -> dict[str, float]:
        """Return kl, perplexity_original, perplexity and perplexity_increase."""
        before, after = _perplexity(self.original, self.tokens), _perplexity(self.compressed, self.tokens)
        return {
            "kl": round(max(self.divergence, 0.0) / self.tokens, 6),
            "perplexity_original": round(before, 5),
            "perplexity": round(after, 5),
            "perplexity_increase": round(after / before - 1.0, 6),
        }


class LanguageEvaluator:
    """Measures by the recipe's settings; deterministic for a seed.

    Args:
        settings: what to measure; quality of images is refused for language models before.
        seed: of the run.
        calibration: the text, its length, and how much of it is calibrated on.
        questions: that are asked; None: none.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        seed: int,
        calibration: CalibrationSettings,
        questions: Questions | None = None,
    ) -> None:
        self._settings, self._seed, self._calibration = settings, seed, calibration
        self._questions = questions

    def reference(
        self, model: OpenModel, cache: Path | None, progress: Progress, *, fresh: bool = False
    ) -> Reference:
        """Record the original's logits.

        Args:
            model: before any stage.
            cache: folder that keeps recordings by content hash; None keeps nothing.
            progress: told about it.
            fresh: record anew also where a recording is kept, and replace that.

        Raises:
            SourceError: the text or the tokenizer cannot be read, or the text is too short.
        """
        settings = self._calibration.model_copy(update={"batch_size": 1})

        def record(folder: Path) -> dict[str, Any]:
            with step(progress, "record the original"):
                return self._record(model, folder, progress)

        # Of the calibration, how the text is cut and what is left for measuring; not how it is batched.
        key = text_key(model, settings, self._seed)
        measured = self._settings.model_dump(mode="json", exclude={"answers", "decoding"})
        asked: dict[str, Any] = {}
        if self._questions is not None:
            asked["questions"] = self._questions.key
        hidden = self._hidden
        if hidden is not None:
            asked["passkey"] = hidden.model_dump(mode="json")
        chosen = {"version": VERSION, "settings": measured, "text": key, **asked}
        return recorded(cache, digest(chosen), record, fresh=fresh)

    def compare(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model as it is now against the recording.

        Args:
            model: after the stages.
            reference: what `reference` returned for the original.
            progress: told about it.
        """
        result = Evaluation(details={"linears": linear_inventory(model)})
        if self._questions is not None:
            add_answers(model, self._questions, reference, result, progress)
        if self._settings.fidelity is None:
            return result
        with step(progress, "fidelity on the same text"):
            self._compare_logits(model, self._settings.fidelity, reference, result, progress)
        if kv_scheme_of(model.module) is not None:
            result.details["text"]["note"] = ONE_PASS
        if self._settings.decoding is not None:
            add_decoding(model, self._settings.decoding, reference, self._seed, result, progress)
        if self._settings.layers:
            with step(progress, "error per layer"):
                result.details["layers"] = compare_watched(model, reference)
        return result

    @property
    def _hidden(self) -> PasskeySettings | None:
        """How numbers are hidden in long texts; None: none are."""
        decoding = self._settings.decoding
        return None if decoding is None else decoding.passkey

    def _record(self, model: OpenModel, folder: Path, progress: Progress) -> dict[str, Any]:
        settings, hidden = self._settings.fidelity, self._hidden
        asked: dict[str, Any] = {}
        if self._questions is not None:
            asked["answers"] = ask(model, self._questions, progress)
        if hidden is not None:
            asked["passkey"] = find(model, passkeys(model, hidden, self._seed), progress)
        if settings is None:
            return {"prefix": 0, **asked}
        sequences = sequences_of(model, self._calibration, self._seed)
        ids = sequences.last(settings.samples, apart_from=self._calibration.samples)
        writer = CallWriter(folder / CALLS)
        calls = list(ids.split(settings.batch_size))
        for rows in track(progress, "read", calls, len(calls)):
            call = {"input_ids": rows, "use_cache": False}
            writer.add(call, _logits(model, call))
        if self._settings.layers:
            record_watched(model, folder)
        return {"prefix": sequences.prefix, **asked}

    def _compare_logits(
        self,
        model: OpenModel,
        settings: FidelitySettings,
        reference: Reference,
        result: Evaluation,
        progress: Progress,
    ) -> None:
        found, total = Likelihoods(), Powers()
        calls = reference.calls()
        for kwargs, wanted in track(progress, "read", calls, len(calls)):
            given = _logits(model, kwargs).cpu()
            for ids, before, after in zip(kwargs["input_ids"], wanted, given, strict=True):
                total.add(*powers(before, after))
                found.add(ids, before, after, int(reference.index["prefix"]))
        result.metrics["sqnr_db"] = round(total.sqnr_db, 4)
        result.metrics |= found.metrics()
        result.details["text"] = {
            "samples": settings.samples,
            "length": self._calibration.length,
            "tokens": found.tokens,
            "seed": self._seed,
        }


def _perplexity(nats: float, tokens: int) -> float:
    """Return the perplexity; infinite where it is beyond what a number can say."""
    mean = nats / tokens
    return math.exp(mean) if mean < math.log(1e300) else math.inf


@torch.no_grad()
def _logits(model: OpenModel, call: dict[str, Any]) -> Tensor:
    logits: Tensor = model.module(**whole_call(model, call), return_dict=False)[0]
    return logits
