"""Reading a recipe: YAML or a Python value, overrides, validation; every error has its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError
from .answer_files import answer_files, with_answer_files
from .data import PATH_KEYS, DataSettings
from .messages import to_error
from .overrides import apply_options, apply_overrides
from .schema import Recipe
from .secrets import holds_secret, redact, secret_position
from .shipped import resolve
from .tree import Location, Tree, dotted, read


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where its parts stood.

    Attributes:
        recipe: the validated values.
        text: YAML that gives this recipe again: the file's own text, or, where options or the
            environment changed something, the resolved recipe under a comment that says what.
        file: where it was read from, None for a Python value.
    """

    recipe: Recipe
    text: str
    file: Path | None
    _tree: Tree = field(repr=False, compare=False)

    def error(self, location: Location, message: str, hint: str | None = None) -> RecipeError:
        """Return an error at the key `location`, such as `("stages", 0, "vidit_q", "keep", 1)`."""
        place = self._tree.place(location)
        return place.error(f"{dotted(location)}: {message}" if location else message, hint)


def load_recipe(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    push: str | None = None,
    verify_remote: bool | None = None,
) -> LoadedRecipe:
    """Read, override and validate a recipe.

    Args:
        source: a file, the bare name of a shipped recipe, or the recipe as a mapping.
        overrides: `key.path=value` texts, as of `--set`; later ones win.
        model: replaces the model's id.
        output: replaces `export.path`.
        seed: replaces `seed`.
        device: replaces `device`.
        push: replaces `export.push`'s repository, as `org/name` or `org/name@branch`.
        verify_remote: replaces `verify_remote` of every push.

    Raises:
        RecipeError: with file, line, column and dotted key of what is wrong.
    """
    file: Path | None = None
    text: str | None = None
    if isinstance(source, Mapping):
        tree = Tree(json.loads(json.dumps(dict(source), default=str)))
    else:
        file = resolve(str(source))
        text = _read_text(file)
        _refuse_secret_text(text, file)
        tree = read(text, str(file))
    from_environment = sorted(dotted(location) for location in tree.expanded)
    given = {"model": model, "output": output, "device": device, "push": push}
    _refuse_secret_options([*overrides, *(f"{name}={value}" for name, value in given.items())])
    apply_overrides(tree, overrides)
    apply_options(
        tree, model=model, output=output, seed=seed, device=device, push=push, verify_remote=verify_remote
    )
    _refuse_secret_values(tree)
    recipe = _find_beside(_validate(tree), file)

    options = {"--model": model, "--output": output, "--seed": seed, "--device": device, "--push": push}
    changes = [f"--set {item}" for item in overrides]
    changes += [f"{name} {value}" for name, value in options.items() if value is not None]
    changes += [] if verify_remote is None else [f"--{'' if verify_remote else 'no-'}verify-remote"]
    changes += [f"environment: {name}" for name in from_environment]
    if text is None or changes:
        text = _resolved_text(recipe, file, changes)
    return LoadedRecipe(recipe, text, file, tree)


_SECRET = "holds what looks like an access token or a password"
_SECRET_HINT = "the recipe is copied into the result; set HF_TOKEN, or log in with `hf auth login`"


def _refuse_secret_text(text: str, file: Path) -> None:
    position = secret_position(text)
    if position is not None:
        line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
        raise RecipeError(f"this line {_SECRET}", file=file, line=line, column=column, hint=_SECRET_HINT)


def _refuse_secret_options(options: Sequence[str]) -> None:
    for option in options:
        if holds_secret(option):
            raise RecipeError(
                f"the value of {redact(option.partition('=')[0])!r} {_SECRET}", hint=_SECRET_HINT
            )


def _refuse_secret_values(tree: Tree) -> None:
    """Refuse tokens that came from the environment or from a Python value."""
    waiting: list[tuple[Location, Any]] = [((), tree.value)]
    while waiting:
        location, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*location, key), key) for key in value if isinstance(key, str)]
            waiting += [((*location, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [((*location, index), item) for index, item in enumerate(value)]
        elif isinstance(value, str) and holds_secret(value):
            where = redact(dotted(location))
            raise tree.place(location).error(f"{where}: {_SECRET}", _SECRET_HINT)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError("not UTF-8 text", file=file, line=line, column=1, hint="save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", file=file) from None


def _validate(tree: Tree) -> Recipe:
    """Validate strictly, without silent conversions; text from the environment may be a number."""
    try:
        return _parse(tree.value)
    except ValidationError as error:
        first = error
    retyped = {tuple(row["loc"])[: len(at)] for row in first.errors() for at in tree.expanded}
    for location in [location for location in tree.expanded if location in retyped]:
        _replace(tree.value, location, tree.expanded[location])
    try:
        return _parse(tree.value)
    except ValidationError as error:
        raise to_error(error, tree) from None


def _find_beside(recipe: Recipe, file: Path | None) -> Recipe:
    """Let data that is not where the recipe says be found beside the recipe: of calibration, and answers.

    By its path from there or by its base name alone: an exported folder has copies of files. Of images
    it has none, so those are found by their path alone.
    """
    if file is not None:
        recipe = _answers_beside(recipe, file.parent)
    moved: dict[str, Any] = {}
    for name in ("prompts", "embeddings", "text", "images"):
        path: Path | None = getattr(recipe.calibration, name)
        if file is None or path is None or path.exists():
            continue
        places = [file.parent / path, file.parent / path.name]
        if name == "images":
            beside = [place for place in places[:1] if place.exists()]
        else:
            beside = [place for place in places if place.is_file()]
        if beside:
            moved[name] = beside[0]
    data = recipe.calibration.data
    if file is not None and data is not None:
        moved |= _data_beside(data, file.parent)
    if not moved:
        return recipe
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=moved)})


def _answers_beside(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with files of answers in a folder in place of those that are not there."""
    moved = {}
    for key, path in answer_files(recipe).items():
        places = [place for place in (folder / path, folder / path.name) if place.is_file()]
        if places and not path.exists():
            moved[key] = places[0]
    return with_answer_files(recipe, moved)


def _data_beside(data: DataSettings, folder: Path) -> dict[str, DataSettings]:
    """Return `data` with a path from a folder in place of one that leads nowhere, where that is so."""
    given = {name: path for name in PATH_KEYS if (path := getattr(data, name)) is not None}
    found = {
        name: folder / path for name, path in given.items() if not path.exists() and (folder / path).exists()
    }
    return {"data": data.model_copy(update=found)} if found else {}


def _parse(value: Any) -> Recipe:
    # Strict on JSON: a list may be a tuple, text may be a path, but true is no 1 and "3" is no 3.
    return Recipe.model_validate_json(json.dumps(value, default=str), strict=True)


def _replace(value: Any, location: Location, new: Any) -> None:
    for part in location[:-1]:
        value = value[part]
    value[location[-1]] = new


def _resolved_text(recipe: Recipe, file: Path | None, changes: Sequence[str]) -> str:
    """Write a recipe as YAML: one line per key, one per stage, values in JSON, which is YAML."""
    lines = [f"# Resolved from {file.name if file else 'a Python value'}."]
    lines += [f"#   {_printable(change)}" for change in changes]
    for key, value in recipe.model_dump(mode="json").items():
        if key == "stages" and value:
            lines += ["stages:", *(f"  - {_json(stage)}" for stage in value)]
        else:
            lines.append(f"{key}: {_json(value)}")
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return _printable(json.dumps(value, ensure_ascii=False))


def _printable(text: str) -> str:
    """Escape what YAML may not hold or would take for a line break."""
    return "".join(
        char
        if char.isprintable()
        else f"\\u{ord(char):04x}"
        if ord(char) < 0x10000
        else f"\\U{ord(char):08x}"
        for char in text
    )
