"""What the names of classes mean to a model: the numbers of its outputs. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError

_SHOWN = 3
_LONGEST_NUMBER = 18
_CONFIG = "config.json"
_NUMBER_HINT = f"name the classes as id2label in {_CONFIG} does, or by their numbers"


@dataclass(frozen=True)
class ClassNumbers:
    """Which class a name is.

    Attributes:
        numbers: name -> class; no two names are one class.
        note: how that was found out, where it could be wrong; empty otherwise.
    """

    numbers: Mapping[str, int]
    note: str = ""


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return what the classes of a classifier are called, in the order of its outputs.

    Args:
        config: of a classifier of transformers; without `id2label` it has `num_labels` classes, or two.

    Raises:
        SourceError: `id2label` does not number the outputs from 0 on.
    """
    named = config.get("id2label")
    if not (isinstance(named, Mapping) and named):
        return [f"LABEL_{number}" for number in range(int(config.get("num_labels") or 2))]
    by_number = {_number(key, "id2label", key): str(name) for key, name in named.items()}
    if sorted(by_number) != list(range(len(named))):
        raise SourceError(
            f"{_CONFIG}: id2label has the keys {_shown(sorted(map(str, named)))}; the outputs of its"
            f" {len(named)} classes are 0 to {len(named) - 1}",
            hint="correct id2label",
        )
    return [by_number[number] for number in range(len(named))]


def class_numbers(names: Sequence[str], config: Mapping[str, Any], place: Path) -> ClassNumbers:
    """Find the class of every name.

    Names are looked up in the config (`label2id`, `id2label`); else they may be numbers; else names that
    differ in case, in punctuation or by a synonym after a comma; else, where there are as many as the model
    has classes, they are taken in sorted order, as torchvision does.

    Args:
        names: distinct.
        config: of the model.
        place: where the names come from, for errors.

    Raises:
        SourceError: a name or a number is none of the model's, or could be two; two names are one class; or
            their count is not the model's.
    """
    known = class_names(config)
    meanings = _meanings(known, config)
    exact = {name: meanings[name] for name in names if name in meanings}
    for name, classes in exact.items():
        _check_one(name, classes, known, place)
    if all(_is_number(name) for name in names):
        found = _by_number(names, exact, known, place)
    elif len(exact) == len(names):
        found = ClassNumbers({name: min(exact[name]) for name in names})
    else:
        found = _loosely(names, exact, known, place)
    _check_distinct(found.numbers, known, place)
    return found


def checked(number: int, classes: int, place: Path) -> int:
    """Return a label that the model has.

    Raises:
        SourceError: it has no such class.
    """
    if not 0 <= number < classes:
        raise SourceError(
            f"{place}: the label {number} is out of range; the model has {classes} classes",
            hint=f"labels are 0 to {classes - 1}",
        )
    return number


def _meanings(known: Sequence[str], config: Mapping[str, Any]) -> dict[str, set[int]]:
    """Return name -> all classes that the config gives it."""
    found: dict[str, set[int]] = {}
    for number, name in enumerate(known):
        found.setdefault(name, set()).add(number)
    given = config.get("label2id")
    for name, value in given.items() if isinstance(given, Mapping) else ():
        found.setdefault(str(name), set()).add(_number(value, "label2id", name))
    return found


def _check_one(name: str, classes: set[int], known: Sequence[str], place: Path) -> None:
    """Refuse a name of two classes, or of one that the model has not."""
    if len(classes) > 1:
        numbers = " and ".join(map(str, sorted(classes)))
        raise SourceError(
            f"{place}: {name!r} is the name of the classes {numbers} in {_CONFIG}",
            hint="name all classes by their numbers, or correct id2label and label2id",
        )
    if not 0 <= min(classes) < len(known):
        raise SourceError(
            f"{place}: {name!r} is class {min(classes)} by label2id in {_CONFIG}; the model has {len(known)}"
            f" classes ({_shown(known)})",
            hint="correct label2id",
        )


def _by_number(
    names: Sequence[str], exact: Mapping[str, set[int]], known: Sequence[str], place: Path
) -> ClassNumbers:
    """Take names that are all numbers: as such, or as names where they can be nothing else."""
    numbers = {name: int(name) for name in names}
    named = {name: min(classes) for name, classes in exact.items()}
    others = [name for name, number in named.items() if number != numbers[name]]
    if not others:
        return ClassNumbers({name: checked(number, len(known), place) for name, number in numbers.items()})
    if len(named) == len(names) and not all(0 <= number < len(known) for number in numbers.values()):
        return ClassNumbers(named)
    name = others[0]
    raise SourceError(
        f"{place}: {name!r} is the name of class {named[name]} in {_CONFIG}, and may be the number of another"
        f" (classes: {_shown(known)})",
        hint="give a safetensors file, whose labels are numbers, or make id2label and the numbers agree",
    )


def _loosely(
    names: Sequence[str], exact: Mapping[str, set[int]], known: Sequence[str], place: Path
) -> ClassNumbers:
    """Take names that differ from the model's a little, or all of them by their order."""
    forms: dict[str, set[int]] = {}
    for number, name in enumerate(known):
        for form in _forms(name):
            forms.setdefault(form, set()).add(number)
    near: dict[str, int] = {}
    for name in names:
        classes = set() if name in exact else set().union(*(forms.get(form, ()) for form in _forms(name)))
        if len(classes) > 1:
            shown = _shown([known[number] for number in sorted(classes)])
            raise SourceError(f"{place}: {name!r} may be any of the classes {shown}", hint=_NUMBER_HINT)
        if classes:
            near[name] = min(classes)
    unknown = sorted(name for name in names if name not in exact and name not in near)
    if not unknown:
        shown = ", ".join(f"{name!r} as {known[number]!r}" for name, number in list(near.items())[:_SHOWN])
        more = ", ..." if len(near) > _SHOWN else ""
        numbers = {name: near[name] if name in near else min(exact[name]) for name in names}
        return ClassNumbers(numbers, f"{place}: classes are taken by similar names: {shown}{more}")
    if len(unknown) < len(names):
        raise SourceError(
            f"{place}: {_shown(unknown)} {'is' if len(unknown) == 1 else 'are'} no class of the model",
            hint=f"its classes are {_shown(known)} (id2label in {_CONFIG})",
        )
    return _by_order(names, known, place)


def _by_order(names: Sequence[str], known: Sequence[str], place: Path) -> ClassNumbers:
    shown = _shown(sorted(names))
    if len(names) != len(known):
        raise SourceError(
            f"{place}: {len(names)} classes ({shown}), the model has {len(known)}"
            f" ({_shown(known)}), and no name is the same",
            hint=_NUMBER_HINT,
        )
    note = (
        f"{place}: the classes ({shown}) are none of the model's names ({_shown(known)}); their"
        f" sorted order is taken for the model's"
    )
    return ClassNumbers({name: number for number, name in enumerate(sorted(names))}, note)


def _check_distinct(numbers: Mapping[str, int], known: Sequence[str], place: Path) -> None:
    first: dict[int, str] = {}
    for name, number in numbers.items():
        other = first.setdefault(number, name)
        if other != name:
            raise SourceError(
                f"{place}: {other!r} and {name!r} are both class {number} ({known[number]!r})",
                hint="put images of one class under one name",
            )


def _forms(name: str) -> set[str]:
    """Return what a name may be compared by: it, and its synonyms, in lower case and without punctuation."""
    forms = (" ".join(re.split(r"[\W_]+", part.casefold())).strip() for part in (name, *name.split(",")))
    return {form for form in forms if form}


def _number(value: Any, table: str, key: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise SourceError(f"{_CONFIG}: {table} has no whole number at {str(key)[:40]!r}") from None


def _is_number(name: str) -> bool:
    digits = name.removeprefix("-")
    return name.isascii() and digits.isdigit() and len(digits) <= _LONGEST_NUMBER


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")
