"""Questions with their answers, on which a language model is judged: read, checked, drawn. Torch-free.

A JSONL has an item a line: `prompt` with `answer`, or `prompt` with `choices` and, under `answer`, the place
of the right one, from 0. The text of an answer follows that of its prompt as it stands, so a space between
the two belongs to one of them. A text without answers is an item per piece, and is judged by its loss alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SourceError
from ..runtime.hashes import digest
from ..runtime.strict_json import parse_object
from .pieces import check_whole, pieces_of

if TYPE_CHECKING:
    from ..recipes.experts import EepSettings, FitnessSettings

OWN_ANSWERS = "answers"
"""Folder of a model that may come with items of its own: `train.jsonl`, and `test.jsonl` for the report."""
MAX_ANSWERS_BYTES = 64 * 2**20
"""A result keeps a copy of its items, so a larger file is refused."""
TEXT_PIECE = 512
"""Characters of a piece of a text."""

_JSON_LINES = ".jsonl"
_PATHS = ("train", "dev", "test")


@dataclass(frozen=True)
class Item:
    """A question and what answers it.

    Attributes:
        prompt: what the model is given; may be empty.
        answer: what is to follow; the right choice where there are several.
        choices: all of them, empty where there are none.
        right: place of the right one in `choices`.
        place: `file:line`, for messages.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    right: int | None = None
    place: str = ""

    @cached_property
    def sha256(self) -> str:
        """Of what it says, without its place."""
        return digest([self.prompt, self.answer, list(self.choices), self.right])


@dataclass(frozen=True)
class Splits:
    """Items that a search sees, that its best are scored on again (or none), and that are only reported.

    Attributes:
        key: content hash of all of them, 64 hexadecimal digits.
    """

    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    test: tuple[Item, ...]
    key: str


class _Pool(NamedTuple):
    """What splits with counts are drawn from."""

    path: Path
    names: tuple[str, ...]


def read_items(path: Path, by: str, task: str | None = None) -> list[Item]:
    """Read all items of a file, and check every line.

    Args:
        path: a JSONL, or for `loss` a text under another ending.
        by: what they are judged by, as `fitness.by`.
        task: only the lines whose `task` is this; None: all.

    Raises:
        SourceError: no such file, one that cannot be read, a line that is no item, or no item at all.
    """
    if path.suffix.lower() != _JSON_LINES:
        return _pieces(path, by, task)
    items: list[Item] = []
    tasks: set[str] = set()
    for number, line in enumerate(_read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        values = parse_object(line, f"{path}:{number}")
        item = _item(values, by, f"{path}:{number}")
        tasks.add(str(values.get("task", "none")))
        if task is None or values.get("task") == task:
            items.append(item)
    if items:
        return items
    if tasks:
        raise SourceError(
            f"{path}: no line has the task {task!r}", hint=f"tasks of its lines: {', '.join(sorted(tasks))}"
        )
    raise SourceError(f"{path}: holds no item", hint="write one JSON object a line, with prompt and answer")


def splits_of(settings: EepSettings, folder: Path, seed: int) -> Splits:
    """Return the items of every split; those that are counts are drawn, and no two of them share an item.

    The order of a draw depends on the seed and on what the items say, not on their order in the file. Equal
    lines are one item, and none is drawn that a split of its own file, or the report's, has.

    Args:
        settings: `fitness.data`, `fitness.by`, `fitness.task` and `splits`.
        folder: of the model, which may have items of its own.
        seed: of the draw; settings.seed goes before it.

    Raises:
        SourceError: a file as `read_items`, one file for two splits, counts that are too large, or nothing
            to draw from.
    """
    fitness, wanted = settings.fitness, settings.splits
    files = {name: split for name in _PATHS if isinstance(split := getattr(wanted, name), Path)}
    counts = _counts(settings)
    _check_apart(files, fitness.data)
    found = {name: tuple(read_items(path, fitness.by, fitness.task)) for name, path in files.items()}
    seed = seed if settings.seed is None else settings.seed
    for pool in _pools(fitness, counts, folder):
        given = [item.sha256 for items in found.values() for item in items]
        items = in_order(read_items(pool.path, fitness.by, fitness.task), seed, frozenset(given))
        _check_enough(pool, items, counts)
        found |= _dealt(items, {name: counts[name] for name in pool.names})
    train, dev, test = (found.get(name, ()) for name in _PATHS)
    refuse_seen("splits.dev", dev, {"splits.train": train})
    refuse_seen("splits.test", test, {"splits.train": train, "splits.dev": dev})
    key = digest([[item.sha256 for item in items] for items in (train, dev, test)])
    return Splits(train, dev, test, key)


def refuse_seen(name: str, items: Sequence[Item], seen: Mapping[str, Sequence[Item]]) -> None:
    """Refuse items to be measured on that something was chosen by.

    Args:
        name: of the items, for the message.
        items: to be measured on.
        seen: name -> items that something was chosen by.

    Raises:
        SourceError: one of the items is among them, with both places.
    """
    for other, known in seen.items():
        places = {item.sha256: item.place for item in known}
        common = [item for item in items if item.sha256 in places]
        if common:
            first, more = common[0], len(common) - 1
            raise SourceError(
                f"{first.place}: an item of {name} is one of {other}, too ({places[first.sha256]})"
                + (f", as are {more} more" if more else "")
                + "; what is reported would be what was chosen by",
                hint="take it out of one of them, or write counts under splits, drawn from fitness.data",
            )


def in_order(items: Sequence[Item], seed: int, given: frozenset[str] = frozenset()) -> list[Item]:
    """Return different items in an order that the seed decides, whatever their order was.

    Args:
        items: of a file.
        seed: of the order.
        given: hashes of items that are left out.
    """
    distinct = {sha256: item for item in reversed(items) if (sha256 := item.sha256) not in given}
    return [distinct[sha256] for sha256 in sorted(distinct, key=lambda sha256: digest([seed, sha256]))]


def own_files(settings: EepSettings, folder: Path) -> list[Path]:
    """Return the files of the model's own that splits are drawn from; they need not be there."""
    if settings.fitness.data is not None:
        return []
    return [pool.path for pool in _own_pools(_counts(settings), folder)]


def own_answers(folder: Path) -> tuple[Path, Path]:
    """Return where a model's own items are, to learn from and to report on; they need not be there."""
    return folder / OWN_ANSWERS / "train.jsonl", folder / OWN_ANSWERS / "test.jsonl"


def _counts(settings: EepSettings) -> dict[str, int]:
    """Return split -> how many items are drawn for it, of those that are drawn."""
    splits = settings.splits
    return {name: count for name in _PATHS if isinstance(count := getattr(splits, name), int)}


def _own_pools(counts: Mapping[str, int], folder: Path) -> list[_Pool]:
    """Return what is drawn from where the model brings items, the report's first."""
    train, test = own_answers(folder)
    others = tuple(name for name in counts if name != "test")
    pools = [_Pool(test, ("test",))] if "test" in counts else []
    return pools + ([_Pool(train, others)] if others else [])


def _pools(fitness: FitnessSettings, counts: Mapping[str, int], folder: Path) -> list[_Pool]:
    """Return what is drawn from, which has to be there."""
    if fitness.data is not None:
        return [_Pool(fitness.data, tuple(counts))] if counts else []
    pools = _own_pools(counts, folder)
    for pool in pools:
        if not pool.path.is_file():
            raise SourceError(
                f"{folder}: the model comes with no items of its own ({pool.path.relative_to(folder)})",
                hint="name a JSONL under fitness.data, with `prompt` and `answer`",
            )
    return pools


def _dealt(items: Sequence[Item], counts: Mapping[str, int]) -> dict[str, tuple[Item, ...]]:
    """Deal ordered items out, the report's from the front and those to learn from from the back.

    So searches of one recipe with other counts report on the same items, and learn from none of them.
    """
    found: dict[str, tuple[Item, ...]] = {}
    first = counts.get("test", 0)
    found["test"] = tuple(items[:first])
    found["dev"] = tuple(items[first : first + counts.get("dev", 0)])
    found["train"] = tuple(items[len(items) - counts.get("train", 0) :])
    return {name: found[name] for name in counts}


def _check_enough(pool: _Pool, items: Sequence[Item], counts: Mapping[str, int]) -> None:
    total = sum(counts[name] for name in pool.names)
    if total > len(items):
        asked = " + ".join(f"{counts[name]} for {name}" for name in pool.names)
        raise SourceError(
            f"{pool.path}: {len(items)} different items to draw from; splits ask for {asked}",
            hint="lower splits, or give more items",
        )


def _check_apart(files: Mapping[str, Path], data: Path | None) -> None:
    """Refuse a file that is named twice: what is reported would be what was learned."""
    seen: dict[Path, str] = {}
    places = {f"splits.{name}": path for name, path in files.items()}
    if data is not None:
        places["fitness.data"] = data
    for name, path in places.items():
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise SourceError(f"{path}: both {other} and {name} name it", hint="give each a file of its own")


def _item(values: Mapping[str, Any], by: str, place: str) -> Item:
    prompt = _text(values, "prompt", place)
    if "choices" not in values and by != "choices":
        answer = _text(values, "answer", place)
        _check_answer(answer, by, place)
        return Item(prompt, answer, place=place)
    choices, right = values.get("choices"), values.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise SourceError(f"{place}: no list of two or more texts under the key 'choices'")
    texts = tuple(_checked(choice, f"choices[{index}]", place) for index, choice in enumerate(choices))
    if len(set(texts)) < len(texts):
        raise SourceError(f"{place}: choices: the same text stands twice")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(texts):
        raise SourceError(
            f"{place}: answer: {right!r} is not the place of one of the {len(texts)} choices",
            hint="the first choice has place 0",
        )
    for text in texts:
        _check_answer(text, by, place)
    return Item(prompt, texts[right], texts, right, place)


def _check_answer(answer: str, by: str, place: str) -> None:
    # Of generated text, space at both ends does not count.
    if not (answer.strip() if by == "exact_match" else answer):
        raise SourceError(f"{place}: an answer is empty", hint="leave the line out")


def _text(values: Mapping[str, Any], key: str, place: str) -> str:
    if key not in values:
        raise SourceError(f"{place}: no key {key!r}", hint="an item has prompt and answer")
    return _checked(values[key], key, place)


def _checked(text: object, key: str, place: str) -> str:
    if not isinstance(text, str):
        raise SourceError(f"{place}: {key}: {str(text)[:40]!r} is no text")
    return check_whole(text, f"{place}: {key}")


def _pieces(path: Path, by: str, task: str | None) -> list[Item]:
    if by != "loss" or task is not None:
        what = "fitness.task has no effect with it" if by == "loss" else f"it has no answers for by: {by}"
        raise SourceError(f"{path}: is read as a text; {what}", hint="name a .jsonl with prompt and answer")
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: byte {error.start} is not UTF-8", hint="save it as UTF-8") from None
    items, line = [], 1
    for piece in pieces_of(text, TEXT_PIECE):
        if piece.strip():
            items.append(Item("", piece, place=f"{path}:{line}"))
        line += piece.count("\n")
    if not items:
        raise SourceError(f"{path}: holds no text")
    return items


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_ANSWERS_BYTES:
            raise SourceError(
                f"{path}: {size} bytes; a file of items has at most {MAX_ANSWERS_BYTES}",
                hint="take a part of it: a result keeps a copy",
            )
        return path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror or error}",
            hint="a relative path is looked up in the current directory, then beside the recipe",
        ) from None
