"""Answers that a language model generates: greedily, with the stock code of its library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .answer_tokens import Padded, Texts


@dataclass(frozen=True)
class Stops:
    """Ids that end a text, and the one that fills up behind them.

    Attributes:
        ids: may be empty; then every text has all its tokens.
        filling: any id; no text is read behind an end.
    """

    ids: tuple[int, ...]
    filling: int


def stops_of(module: Any, texts: Texts) -> Stops:
    """Return what ends a text: what the config, the folder's defaults of generation or the tokenizer say."""
    import transformers

    said: list[Any] = [module.config.eos_token_id, texts.tokenizer.eos_token_id]
    folder: Path = texts.folder
    if (folder / "generation_config.json").is_file():
        said.append(transformers.GenerationConfig.from_pretrained(str(folder)).eos_token_id)
    found = sorted(set(_ids(said)))
    return Stops(tuple(found), found[0] if found else 0)


def generated(module: Any, texts: Texts, batch: Padded, stops: Stops, new_tokens: int) -> list[str] | None:
    """Return the text that follows every prompt of a batch.

    Args:
        module: with `generate`.
        texts: its tokenizer.
        batch: prompts, padded at the left.
        stops: what ends a text.
        new_tokens: at most; fewer where the model has no more positions behind a prompt.

    Returns:
        A text per row, or None where the model gives something else than numbers.
    """
    import transformers

    width = batch.ids.shape[1]
    # What fills up at the left takes no position, so a short prompt's text can be longer.
    room = [texts.positions - length for length in batch.mask.sum(dim=1).tolist()]
    watch = _Watch()
    settings = transformers.GenerationConfig(
        max_new_tokens=min(new_tokens, max(room)),
        min_new_tokens=0, do_sample=False, num_beams=1, num_return_sequences=1, use_cache=True,
        eos_token_id=list(stops.ids) or None, pad_token_id=stops.filling,
        return_dict_in_generate=False, output_scores=False, output_logits=False,
    )  # fmt: skip
    ids = module.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        generation_config=settings,
        logits_processor=transformers.LogitsProcessorList([watch]),
    )
    if watch.failed():
        return None
    rows = zip(ids[:, width:].tolist(), room, strict=True)
    return [texts.text_of(_until(row[:most], stops.ids)) for row, most in rows]


class _Watch:
    """Sees the logits of every step and changes none; the first choice among NaN is no choice."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # What is forbidden has minus infinity.
        self._seen.append((scores.isnan() | scores.isposinf()).any())
        return scores

    def failed(self) -> bool:
        return bool(torch.stack(self._seen).any()) if self._seen else False


def _until(row: list[int], stops: tuple[int, ...]) -> list[int]:
    end = next((at for at, id_ in enumerate(row) if id_ in stops), len(row))
    return row[:end]


def _ids(said: Iterable[Any]) -> list[int]:
    return [
        int(id_)
        for ids in said
        if ids is not None
        for id_ in (ids if isinstance(ids, list | tuple) else [ids])
    ]
