"""YAML text to plain values that remember where they stood; `${ENV}` and `${ENV:-default}` expand.

Only mappings, lists and the scalars of YAML 1.2's core schema are read: no tags, no merge keys, no
duplicate keys. Nesting and the number of nodes are bounded, so an alias bomb ends as an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from ..errors import RecipeError

Location = tuple[str | int, ...]

_MAX_DEPTH = 32
_MAX_NODES = 10_000
_MAX_CHARACTERS = 2**20
_CORE = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_CORE + name for name in ("str", "int", "float", "bool", "null"))
_VARIABLE = re.compile(r"\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")


@dataclass(frozen=True)
class Place:
    """Where a value came from: a file, or the option that overrode it; 1-based."""

    file: str | None = None
    line: int | None = None
    column: int | None = None

    def error(self, message: str, hint: str | None = None) -> RecipeError:
        """Return an error at this place."""
        return RecipeError(message, file=self.file, line=self.line, column=self.column, hint=hint)

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


@dataclass
class Tree:
    """A recipe before validation.

    Attributes:
        value: plain dicts, lists and scalars.
        values, keys: location -> place of the value, and of its key in a mapping.
        expanded: location -> what YAML reads from a text that came from the environment.
        default: place of what has none.
    """

    value: Any
    values: dict[Location, Place] = field(default_factory=dict)
    keys: dict[Location, Place] = field(default_factory=dict)
    expanded: dict[Location, Any] = field(default_factory=dict)
    default: Place = field(default_factory=Place)

    def place(self, location: Location, *, of_key: bool = False) -> Place:
        """Return the place of `location`, or of its nearest parent that has one.

        A mapping or list is found at its key, a scalar where its value is written.
        """
        for length in range(len(location), -1, -1):
            prefix = location[:length]
            first, second = (self.keys, self.values) if of_key else (self.values, self.keys)
            found = first.get(prefix) or second.get(prefix)
            if found is not None:
                return found
        return self.default


def dotted(location: Location) -> str:
    """Write a location as in messages: `stages[0].vidit_q.weight_bits`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read(text: str, file: str | None, *, expand: bool = True) -> Tree:
    """Read a recipe's text.

    Args:
        text: YAML.
        file: what errors call it.
        expand: put the environment's values in the place of `${NAME}`.

    Raises:
        RecipeError: with file, line and column of what cannot be read.
    """
    default = Place(file)
    if len(text) > _MAX_CHARACTERS:
        raise default.error(
            f"a recipe has at most {_MAX_CHARACTERS:,} characters, this file has {len(text):,}"
        )
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except (YAMLError, RecursionError) as error:
        _refuse_syntax(error, text, file)
    if root is None:
        raise Place(file, 1, 1).error("the recipe is empty", "start from a shipped one: `compress recipes`")
    builder = _Builder(yaml, file, expand=expand)
    value = builder.build(root, ())
    if not isinstance(value, dict):
        raise builder.mark(root).error("a recipe is a mapping of keys such as model, stages and export")
    builder.tree.value = value
    return builder.tree


def parse_scalar(text: str) -> Any:
    """Read an option's value as YAML does; what YAML cannot read is text."""
    if text.lstrip()[:1] in (">", "|"):  # a comparison, not a block scalar
        return text
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        return None if root is None else _Builder(yaml, None).build(root, ())
    except (YAMLError, RecursionError):
        return text


def _refuse_syntax(error: Exception, text: str, file: str | None) -> NoReturn:
    """Turn a parser's complaint into one sentence at its place."""
    lines = text.split("\n")
    if isinstance(error, ReaderError):
        before = text[: error.position]
        place = Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise place.error(f"the character U+{ord(text[error.position]):04X} is not allowed in YAML") from None
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        raise Place(file, 1, 1).error("the YAML is nested too deeply to be read") from None
    mark = error.problem_mark
    for number, line in enumerate(lines[: mark.line + 1], start=1):
        tab = line.find("\t", 0, len(line) - len(line.lstrip()))
        if tab >= 0:
            raise Place(file, number, tab + 1).error(
                "a TAB in the indentation", "YAML is indented with spaces"
            ) from None
    place = Place(file, mark.line + 1, mark.column + 1)
    here = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    if here.startswith("\t"):
        raise place.error("a TAB where YAML allows only spaces", "replace it by a space") from None
    problem = str(error.problem or "cannot be read")
    context = f" {error.context}" if error.context else ""
    raise place.error(
        f"not valid YAML{context}: {problem}", _syntax_hint(lines[mark.line : mark.line + 1])
    ) from None


def _syntax_hint(lines: list[str]) -> str | None:
    line = lines[0] if lines else ""
    if re.search(r":\s*[<>]=?\s*[0-9.]", line):
        return "put comparisons in quotes: '>= 12'"
    if "${" in line:
        return "put ${NAME} in quotes inside { } and [ ]"
    return None


class _Builder:
    """Builds plain values from YAML nodes and notes where each stood."""

    def __init__(self, yaml: YAML, file: str | None, *, expand: bool = True) -> None:
        self.tree = Tree(None, default=Place(file))
        self._yaml, self._file, self._nodes, self._expands = yaml, file, 0, expand

    def mark(self, node: Node) -> Place:
        """Return where a node starts."""
        return Place(self._file, node.start_mark.line + 1, node.start_mark.column + 1)

    def build(self, node: Node, location: Location) -> Any:
        """Return the plain value of `node`."""
        self._nodes += 1
        if len(location) > _MAX_DEPTH or self._nodes > _MAX_NODES:
            raise self.mark(node).error("the recipe is nested too deeply or repeats itself too often")
        # A mapping or list is found at its key: where it begins may be lines further down.
        self.tree.values[location] = self.tree.keys.get(location) or self.mark(node)
        if isinstance(node, MappingNode) and node.tag == _CORE + "map":
            return {key: self.build(item, (*location, key)) for key, item in self._entries(node, location)}
        if isinstance(node, SequenceNode) and node.tag == _CORE + "seq":
            return [self.build(item, (*location, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, ScalarNode) or (
            node.tag not in _PLAIN_TAGS and node.tag != _CORE + "timestamp"
        ):
            raise self.mark(node).error(
                f"the tag {node.tag} is not allowed", "recipes hold plain values only"
            )
        if node.value or node.style:  # a value that is left out would stand on some later line
            self.tree.values[location] = self.mark(node)
        return self._scalar(node, location)

    def _entries(self, node: MappingNode, location: Location) -> Iterator[tuple[str, Node]]:
        seen: dict[str, Place] = {}
        for key_node, item in node.value:
            place = self.mark(key_node)
            if not isinstance(key_node, ScalarNode):
                raise place.error("a key is plain text")
            key = str(key_node.value)
            path = dotted((*location, key))
            if key_node.tag == _CORE + "merge":
                raise place.error(f"{path}: merge keys are not read", "write the keys out")
            if key in seen:
                raise place.error(
                    f"{path}: duplicate key; the first one is at line {seen[key].line}", "keep one of them"
                )
            seen[key] = self.tree.keys[(*location, key)] = place
            yield key, item

    def _scalar(self, node: ScalarNode, location: Location) -> Any:
        if node.tag == _CORE + "timestamp":
            return node.value
        if node.tag != _CORE + "str" or "${" not in node.value or not self._expands:
            return self._yaml.constructor.construct_object(node)
        text = _VARIABLE.sub(partial(self._expand, self.mark(node), location), node.value)
        tag = str(self._yaml.resolver.resolve(ScalarNode, text, (True, False)))
        if tag in _PLAIN_TAGS:
            self.tree.expanded[location] = self._yaml.constructor.construct_object(ScalarNode(tag, text))
        return text

    def _expand(self, place: Place, location: Location, found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        where = dotted(location) + ": " if location else ""
        if name is None:
            raise place.error(
                f"{where}not an environment variable: {found.string!r}", "write ${NAME} or ${NAME:-default}"
            )
        value = os.environ.get(name)
        if value is None and default is None:
            raise place.error(
                f"{where}the environment variable {name} is not set",
                f"export {name}=..., or give a default: ${{{name}:-value}}",
            )
        return default if not value and default is not None else value or ""
