"""What the source says about itself: its licence, its task, and the Hub model that it is. Torch-free.

A result inherits its source's licence, so the card of the source (the YAML block of README.md) is read
and its licence texts are found. Both are untrusted: the sizes are bounded, only plain texts are taken
over, no link leads out of the model's folder, and what cannot be read is a licence that is not known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

CARD_NAME = "README.md"
MAX_CARD_BYTES = 2**20
MAX_BLOCK_CHARACTERS = 2**16
MAX_TEXT_BYTES = 2**20
MAX_TEXTS = 8
# What may stand between < and > in a card: nothing in it ends the link or starts another one.
WEB_LINK = re.compile(r"https?://[^\s<>\"]+")
_MAX_VALUE = 300
_TEXT_TAG = "tag:yaml.org,2002:str"
_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_TEXT_NAME = re.compile(r"(licen[sc]e|notice)([-_.][\w.-]*)?", re.IGNORECASE)
_TEXT_SUFFIXES = ("", ".md", ".txt")
# What huggingface_hub calls its cache: models--ORG--NAME/snapshots/COMMIT. No id holds `--` itself.
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|\Z)", re.ASCII)


@dataclass(frozen=True)
class SourceCard:
    """What is inherited from the source.

    Attributes:
        license: the Hub's short name or names, None when the source does not say.
        license_name, license_link: what goes with `license: other`.
        pipeline_tag: the Hub's name of the task.
        base_model: id of the model on the Hub, None for a folder or a built-in model.
        texts: licence and notice files, in the order of their names.
    """

    license: str | tuple[str, ...] | None = None
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None
    base_model: str | None = None
    texts: tuple[Path, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return what the report says of it: `license` always, the rest where it is known."""
        license_ = list(self.license) if isinstance(self.license, tuple) else self.license
        rest = {
            "license_name": self.license_name,
            "license_link": self.license_link,
            "pipeline_tag": self.pipeline_tag,
            "base_model": self.base_model,
        }
        return {"license": license_, **{key: value for key, value in rest.items() if value is not None}}


def read_source_card(folders: Sequence[Path], repo: str | None, revision: str | None) -> SourceCard:
    """Read what the source says about itself; what cannot be read counts as not said.

    Args:
        folders: that may hold README.md and the licence texts, nearest to the weights first.
        repo: Hub id, None for a folder; that of a folder in the Hub's cache is found by its path.
        revision: commit of `repo`.
    """
    if repo is None and folders:
        repo, revision = snapshot_of(folders[0].absolute()) or (None, None)
    data = next(filter(None, (_front_matter(folder) for folder in folders)), {})
    texts = next(filter(None, (tuple(_texts(folder)) for folder in folders)), ())
    names = {path.name for path in texts}
    return SourceCard(
        license=_license(data.get("license")),
        license_name=_text(data.get("license_name")),
        license_link=_link(_text(data.get("license_link")), names, repo, revision),
        pipeline_tag=_text(data.get("pipeline_tag")),
        base_model=repo,
        texts=texts,
    )


def snapshot_of(folder: PurePath) -> tuple[str, str] | None:
    """Return (Hub id, commit) of a folder in the Hub library's cache, None for any other folder."""
    found = _SNAPSHOT.search(folder.as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def _front_matter(folder: Path) -> dict[str, Any] | None:
    text = _read(folder, folder / CARD_NAME, MAX_CARD_BYTES)
    found = _BLOCK.match(text.removeprefix("\ufeff")) if text else None
    if found is None or len(found[1]) > MAX_BLOCK_CHARACTERS:
        return None
    # Only nodes are read, and no value is built from them: that is where a tag, a merge key or a number
    # without digits does harm. The parser has errors of its own for some texts, so all count as not readable.
    try:
        root = YAML(typ="safe", pure=True).compose(found[1])
    except Exception:
        return None
    if not isinstance(root, MappingNode):
        return None
    entries = [(str(key.value), item) for key, item in root.value if isinstance(key, ScalarNode)]
    times = Counter(name for name, _ in entries)
    return {name: _plain(item) for name, item in entries if times[name] == 1}


def _plain(node: Node) -> Any:
    """Return a text, or a list of the first texts in a list; None for whatever else stands there."""
    if isinstance(node, SequenceNode):
        return [item.value for item in node.value if isinstance(item, ScalarNode) and item.tag == _TEXT_TAG]
    return node.value if isinstance(node, ScalarNode) and node.tag == _TEXT_TAG else None


def is_text_name(name: str) -> bool:
    """Return whether a name at the top of a repository is that of a licence or notice text."""
    return bool(_TEXT_NAME.fullmatch(name)) and PurePath(name).suffix.lower() in _TEXT_SUFFIXES


def _texts(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    names = [path for path in folder.iterdir() if is_text_name(path.name)]
    readable = (path for path in sorted(names) if _read(folder, path, MAX_TEXT_BYTES))
    for path, _ in zip(readable, range(MAX_TEXTS), strict=False):
        yield path


def _read(folder: Path, path: Path, limit: int) -> str | None:
    """Return a small text file, None where there is none or a link leads out of the model's folder."""
    try:
        real = path.resolve(strict=True)
        if not real.is_file() or not _inside(folder, real) or real.stat().st_size > limit:
            return None
        return real.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _inside(folder: Path, real: Path) -> bool:
    # A snapshot of the Hub's cache consists of links to models--ORG--NAME/blobs.
    homes = [folder.resolve()]
    match = _SNAPSHOT.search(folder.absolute().as_posix())
    if match:
        name = f"models--{match[1]}--{match[2]}"
        homes += [parent.resolve() / "blobs" for parent in folder.absolute().parents if parent.name == name]
    return any(real.is_relative_to(home) for home in homes)


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    value = value.strip()
    return value if 0 < len(value) <= _MAX_VALUE and value.isprintable() else None


def _license(value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, list):
        names = tuple(name for item in value[:MAX_TEXTS] if (name := _text(item)) is not None)
        return names or None
    return _text(value)


def _link(link: str | None, texts: set[str], repo: str | None, revision: str | None) -> str | None:
    """Return a link that holds where the result lies: to a copied text, or to the Web."""
    if link is None or WEB_LINK.fullmatch(link):
        return link
    name = link.removeprefix("./")
    if name in texts:
        return name
    if repo is None or name.startswith("/") or ".." in name.split("/") or ":" in name:
        return None
    return f"https://huggingface.co/{repo}/blob/{revision or 'main'}/{quote(name, safe='/%#?')}"
