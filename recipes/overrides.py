"""`--set key.path=value` and its short forms, applied to a recipe before it is validated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tree import Location, Place, Tree, dotted, parse_scalar

_STEP = re.compile(r"\.?([A-Za-z_][A-Za-z0-9_-]*)|\.([0-9]+)|\[([0-9]+)\]")


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> None:
    """Apply `key.path=value` texts in order.

    Raises:
        RecipeError: with the option as its place.
    """
    for text in overrides:
        place = Place(f"--set {text}")
        key, separator, value = text.partition("=")
        if not separator:
            raise place.error("an override needs a value", "write --set key.path=value")
        location = tuple(_steps(key.strip(), place))
        _assign(tree, location, parse_scalar(value.strip()), place)


def apply_options(
    tree: Tree,
    *,
    model: str | None,
    output: str | Path | None,
    seed: int | None,
    device: str | None,
    push: str | None = None,
    verify_remote: bool | None = None,
) -> None:
    """Apply `--model`, `--output`, `--seed`, `--device`, `--push` and `--no-verify-remote`.

    Another model keeps the recipe's dtype; revision and subfolder belonged to the old one. Likewise another
    repository keeps what else the recipe says of the push, but not its branch: `--push org/name` means the
    default branch, in whichever form the recipe has its `push`.

    Raises:
        RecipeError: an option that means one export, and the recipe has several; nothing is pushed.
    """
    if model is not None:
        place = Place(f"--model {model}")
        old = tree.value.get("model")
        if isinstance(old, dict):
            for key in ("revision", "subfolder"):
                old.pop(key, None)
            _assign(tree, ("model", "id"), model, place)
        else:
            _assign(tree, ("model",), model, place)
    if output is not None:
        place = Place(f"--output {output}")
        _only_export(tree, place, "path=FOLDER")
        _assign(tree, ("export", "path"), str(output), place)
    if seed is not None:
        _assign(tree, ("seed",), seed, Place(f"--seed {seed}"))
    if device is not None:
        _assign(tree, ("device",), device, Place(f"--device {device}"))
    if push is not None:
        place = Place(f"--push {push}")
        _only_export(tree, place, "push=org/name")
        _set_push(tree, push, place)
    if verify_remote is not None:
        _set_verify_remote(tree, verify_remote)


def _set_push(tree: Tree, push: str, place: Place) -> None:
    repo, separator, revision = push.partition("@")
    _assign(tree, ("export", "push", "repo"), repo, place)  # makes a mapping of the short form
    _forget(tree, ("export", "push", "revision"))
    tree.value["export"]["push"].pop("revision", None)
    if separator:
        _assign(tree, ("export", "push", "revision"), revision, place)


def _only_export(tree: Tree, place: Place, example: str) -> None:
    """Refuse an option that names the one export of a recipe that has several."""
    exports = tree.value.get("export")
    if isinstance(exports, list):
        raise place.error(
            f"the recipe has a list of {len(exports)} exports", f"name one: --set export.0.{example}"
        )


def _set_verify_remote(tree: Tree, value: bool) -> None:
    place = Place("--verify-remote" if value else "--no-verify-remote")
    exports = tree.value.get("export")
    rows = exports if isinstance(exports, list) else [exports]
    pushed = [index for index, row in enumerate(rows) if isinstance(row, dict) and row.get("push")]
    if not pushed:
        raise place.error("the recipe pushes nothing", "add --push org/name, or leave the option out")
    for index in pushed:
        base: Location = ("export", index) if isinstance(exports, list) else ("export",)
        _assign(tree, (*base, "push", "verify_remote"), value, place)


def _steps(key: str, place: Place) -> Iterator[str | int]:
    position = 0
    while position < len(key):
        found = _STEP.match(key, position)
        if found is None or (position == 0 and key[0] == "."):
            raise place.error(f"{key!r} is not a path of keys", "write it as stages.0.vidit_q.weight_bits")
        yield found[1] if found[1] is not None else int(found[2] or found[3])
        position = found.end()
    if not key:
        raise place.error("the key before = is missing", "write --set key.path=value")


def _assign(tree: Tree, location: Location, value: Any, place: Place) -> None:
    """Put `value` at `location`; mappings that are absent, or empty in the file, come into being."""
    node: Any = tree.value
    for depth, step in enumerate(location):
        _check_step(node, location[:depth], step, place)
        if depth == len(location) - 1:
            break
        child: Any = node.get(step) if isinstance(node, dict) else node[step]
        if child is None:
            child = {}
            _note(tree, location[: depth + 1], place)
        elif isinstance(child, str) and location[:1] == ("model",) and depth == 0:
            child = {"id": child}  # the string form of a model, about to get a second key
        elif isinstance(child, str) and location[0] == "export" and step == "push":
            child = {"repo": child}  # likewise of a push
        if not isinstance(child, dict | list):
            name = dotted(location[: depth + 1])
            raise place.error(f"{name} is {child!r}, so it has no key {location[depth + 1]!r} to set")
        node[step] = child
        node = child
    _forget(tree, location)
    node[location[-1]] = value
    _note(tree, location, place)


def _note(tree: Tree, location: Location, place: Place) -> None:
    tree.values[location] = tree.keys[location] = place


def _check_step(node: Any, above: Location, step: str | int, place: Place) -> None:
    name = dotted(above) or "the recipe"
    if isinstance(node, list):
        if not isinstance(step, int):
            raise place.error(f"{name} is a list: {step!r} is not a position in it", f"write {name}[0]")
        if step >= len(node):
            raise place.error(
                f"there is no {name}[{step}]: the list has length {len(node)}", "positions count from 0"
            )
    elif isinstance(step, int):
        raise place.error(f"{name} is a mapping: [{step}] is not a key of it")
    elif len(above) == 2 and above[0] == "stages" and step not in node:
        method = next(iter(node), "empty")
        raise place.error(f"{name} is {method}, not {step}", f"write {name}.{method}")


def _forget(tree: Tree, location: Location) -> None:
    """Drop the places of what is being replaced."""
    for table in (tree.values, tree.keys, tree.expanded):
        for known in [known for known in table if known[: len(location)] == location]:
            del table[known]
