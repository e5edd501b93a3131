"""What the built-in mixture of experts can do: six tasks on strings of six digits, as tensors and as text.

An item reads `sort 4 1 9 2 7 3 = 1 2 3 4 7 9`. Every word, digit and sign is one token, so the answer is
always the last six; in a text, every item is begun by the mark that also ends the one before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

DIGITS = 6
NUMBERS = 10**DIGITS
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda digits: digits.clone(),
    "reverse": lambda digits: digits.flip(1),
    "sort": lambda digits: digits.sort(dim=1).values,
    "add_three": lambda digits: (digits + 3) % 10,
    "prefix_sum": lambda digits: digits.cumsum(dim=1) % 10,
    "rotate": lambda digits: digits.roll(-1, dims=1),
}
"""Name -> what makes the answers of digits: [n, 6] int64 to the same."""

PAD, MARK, UNKNOWN, EQUALS = "<pad>", "<s>", "<unk>", "="
VOCABULARY = (PAD, MARK, UNKNOWN, EQUALS, *(str(digit) for digit in range(10)), *TASKS)
"""All tokens; the place is the id."""
ITEM_TOKENS = 3 + 2 * DIGITS
"""Mark, task, digits, sign, answer."""
PARTS = {"test": 512, "train": 256, "text": 256}
"""Items of a task that are shipped: to be judged on, to search on, and as text."""


def digits_of(numbers: Tensor) -> Tensor:
    """Return the digits of numbers below a million, the first the highest: [n] -> [n, 6] int64."""
    return numbers[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1) % 10


def split_numbers(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Deal out all strings of six digits, so that none is in two parts.

    Args:
        seed: of the order.

    Returns:
        Part of `PARTS` -> numbers [tasks, items of a task], and the numbers to train on [rest], in random
        order.
    """
    order = torch.randperm(NUMBERS, generator=torch.Generator().manual_seed(seed))
    parts, start = {}, 0
    for part, per_task in PARTS.items():
        stop = start + per_task * len(TASKS)
        parts[part] = order[start:stop].view(len(TASKS), per_task)
        start = stop
    return parts, order[start:]


def token_rows(task: Tensor, digits: Tensor) -> Tensor:
    """Return items as token ids: [n, 15] int64.

    Args:
        task: [n] places in `TASKS`.
        digits: [n, 6] in 0..9.
    """
    answers = torch.empty_like(digits)
    for place, solve in enumerate(TASKS.values()):
        chosen = task == place
        answers[chosen] = solve(digits[chosen])
    zero, first = VOCABULARY.index("0"), VOCABULARY.index(next(iter(TASKS)))
    mark = torch.full((len(task), 1), VOCABULARY.index(MARK))
    sign = torch.full((len(task), 1), VOCABULARY.index(EQUALS))
    return torch.cat([mark, first + task[:, None], zero + digits, sign, zero + answers], dim=1)


def texts(task: str, digits: Tensor) -> Iterator[tuple[str, str]]:
    """Yield the prompt and the answer of every item of a task.

    Args:
        task: of `TASKS`.
        digits: [n, 6] in 0..9.
    """
    for given, answer in zip(digits.tolist(), TASKS[task](digits).tolist(), strict=True):
        yield f"{task} {' '.join(map(str, given))} {EQUALS}", " ".join(map(str, answer))


def write_files(folder: Path, seed: int) -> None:
    """Write `answers/train.jsonl`, `answers/test.jsonl` and `calibration.jsonl`.

    Args:
        folder: of the model.
        seed: of `split_numbers`; which items there are, and the order of the mixed text.
    """
    parts, _ = split_numbers(seed)
    for part in ("train", "test"):
        lines = [
            {"task": task, "prompt": prompt, "answer": answer}
            for task, numbers in zip(TASKS, parts[part], strict=True)
            for prompt, answer in texts(task, digits_of(numbers))
        ]
        _write_lines(folder / "answers" / f"{part}.jsonl", lines)
    pairs = zip(TASKS, parts["text"], strict=True)
    mixed = [" ".join(item) for task, numbers in pairs for item in texts(task, digits_of(numbers))]
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed)).tolist()
    _write_lines(folder / "calibration.jsonl", [{"text": mixed[place]} for place in order])


def _write_lines(file: Path, lines: Sequence[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_tokenizer(folder: Path, length: int) -> None:
    """Write `tokenizer.json` and its config: words, single digits, and a mark before every text.

    Args:
        folder: of the model.
        length: tokens that the model takes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {token: place for place, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, MARK, UNKNOWN])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{MARK} $A", pair=f"{MARK} $A {MARK} $B", special_tokens=[(MARK, ids[MARK])]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": MARK, "eos_token": MARK,
        "pad_token": PAD, "unk_token": UNKNOWN, "model_max_length": length, "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
