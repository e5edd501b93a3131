"""What the names of classes mean to a model: the numbers of its outputs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError

_SHOWN = 3


@dataclass(frozen=True)
class ClassNumbers:
    """Which class a name is.

    Attributes:
        numbers: name -> class.
        note: how that was found out, where it could be wrong; empty otherwise.
    """

    numbers: Mapping[str, int]
    note: str = ""


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return what the classes of a classifier are called, in the order of its outputs.

    Args:
        config: of a classifier of transformers; without `id2label` it has `num_labels` classes, or two.
    """
    named = config.get("id2label")
    if isinstance(named, Mapping) and named:
        by_number = {int(number): str(name) for number, name in named.items()}
        return [by_number.get(number, f"LABEL_{number}") for number in range(max(by_number) + 1)]
    return [f"LABEL_{number}" for number in range(int(config.get("num_labels") or 2))]


def class_numbers(names: Sequence[str], config: Mapping[str, Any], place: Path) -> ClassNumbers:
    """Find the class of every name.

    Names are looked up in the config (`label2id`, `id2label`); else they may be numbers; else, where
    there are as many as the model has classes, they are taken in sorted order, as torchvision does.

    Args:
        names: distinct.
        config: of the model.
        place: where the names come from, for errors.

    Raises:
        SourceError: a name or a number is none of the model's, or their count is not.
    """
    known = class_names(config)
    numbers = {name: number for number, name in enumerate(known)}
    given = config.get("label2id")
    if isinstance(given, Mapping):
        numbers |= {str(name): int(number) for name, number in given.items()}
    unknown = sorted(name for name in names if name not in numbers)
    if not unknown:
        return ClassNumbers({name: numbers[name] for name in names})
    if all(_is_number(name) for name in names):
        return ClassNumbers({name: checked(int(name), len(known), place) for name in names})
    if len(unknown) < len(names):
        raise SourceError(
            f"{place}: {_shown(unknown)} {'is' if len(unknown) == 1 else 'are'} no class of the model",
            hint=f"its classes are {_shown(known)} (id2label in config.json)",
        )
    if len(names) != len(known):
        raise SourceError(
            f"{place}: {len(names)} classes ({_shown(unknown)}), the model has {len(known)}"
            f" ({_shown(known)}), and no name is the same",
            hint="name the classes as id2label in config.json does, or by their numbers",
        )
    note = (
        f"{place}: the classes ({_shown(unknown)}) are none of the model's names ({_shown(known)}); their"
        f" sorted order is taken for the model's"
    )
    return ClassNumbers({name: number for number, name in enumerate(sorted(names))}, note)


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


def _is_number(name: str) -> bool:
    return name.isascii() and name.removeprefix("-").isdigit()


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")
