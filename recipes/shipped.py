"""The recipes that come with the package: listed, and found by their bare name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import RecipeError
from .suggest import suggestion

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ShippedRecipe:
    """One of the recipes in this folder; its first two lines say what it does and needs."""

    name: str
    file: Path
    does: str
    needs: str


def shipped() -> list[ShippedRecipe]:
    """Return the shipped recipes by name."""
    found = []
    for file in sorted(FOLDER.glob("*.yaml")):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines()[:3] if line.startswith("# ")]
        header = [line.removeprefix("# ").strip() for line in lines if not line.startswith("# yaml-language")]
        found.append(ShippedRecipe(file.stem, file, *(header + ["", ""])[:2]))
    return found


def resolve(name: str) -> Path:
    """Return the file of a recipe: a path, or the bare name of a shipped one.

    Raises:
        RecipeError: no such file; the hint names the nearest shipped recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError("is a folder, not a recipe", file=name, hint="name a .yaml file in it")
    bare = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and bare.is_file():
        return bare
    names = [recipe.name for recipe in shipped()]
    raise RecipeError(
        "no such recipe file", file=name, hint=suggestion(path.stem, names) + "; see `compress recipes`"
    )
