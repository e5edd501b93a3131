"""The recipe's `export`: where results go, in which form, and to which repositories of a Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from .secrets import holds_secret
from .sizes import bytes_of

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# What git and the Hub both take; refs/pr/N is a revision that can be read but not pushed to by name.
_REF = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
PACKAGES: Mapping[str, str] = {
    "sdnq": "sdnq",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes-nf4": "bitsandbytes",
    "bitsandbytes-int8": "bitsandbytes",
}
"""Format -> the package, as it is imported, without which the library of the model cannot load it."""
ROUNDING_FORMATS = frozenset({"bitsandbytes-nf4", "bitsandbytes-int8"})
"""Formats that round by themselves what no stage has rounded."""
REJECTED = ".rejected"
"""A result that was refused is kept under its name with this at the end."""
_DEFAULT_BRANCH = "main"  # of every repository that the Hub makes


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PushSettings(_Settings):
    """A repository on the Hub. A plain string is short for `{repo: ...}`; `org/name@branch` names both."""

    repo: str = Field(description="Repository as `org/name`; it is created where it does not exist.")
    private: bool = Field(True, description="Visibility of a repository that is created.")
    revision: str | None = Field(
        None, description="Branch; made where it does not exist. null: the default branch."
    )
    create_pr: bool = Field(False, description="Open a pull request instead of committing to the branch.")
    tag: str | None = Field(None, description="Tag that is put on the commit once it is verified.")
    message: str | None = Field(
        None, min_length=1, description="First line of the commit message; null: one that says what this is."
    )
    verify_remote: bool = Field(True, description="Download the pushed commit again and verify it.")
    overwrite: bool = Field(
        False, description="Push over files that compress did not write; they are removed from the revision."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"repo": value}
        if isinstance(value, Mapping) and isinstance(value.get("repo"), str) and not value.get("revision"):
            repo, separator, revision = value["repo"].partition("@")
            return {**value, "repo": repo, "revision": revision} if separator else value
        return value

    @field_validator("repo", "revision", "tag", "message")
    @classmethod
    def _holds_no_secret(cls, value: str | None) -> str | None:
        if value is not None and holds_secret(value):  # all of them can be read in the repository
            raise ValueError("holds what looks like an access token or a password")
        return value

    @field_validator("repo")
    @classmethod
    def _is_repo(cls, value: str) -> str:
        if _REPO.fullmatch(value) is None or ".." in value or "--" in value or value.endswith(".git"):
            raise ValueError(f"{value!r} is not a repository; write it as org/name")
        return value

    @field_validator("revision", "tag")
    @classmethod
    def _is_ref(cls, value: str | None) -> str | None:
        if value is not None and (
            _REF.fullmatch(value) is None or ".." in value or value.startswith("refs/") or value[-1] == "."
        ):
            raise ValueError(f"{value!r} is not the name of a branch or tag; write one such as v1.0")
        return value


class ExportSettings(_Settings):
    """Where a result goes, and in which form."""

    path: Path = Field(description="Output folder; it is whole or absent.")
    format: Literal[
        "compress",
        "torchao",
        "sdnq",
        "compressed-tensors",
        "bitsandbytes-nf4",
        "bitsandbytes-int8",
        "dequantized",
    ] = Field(
        "compress",
        description="compress: weights in their real bits; torchao, sdnq: load with stock diffusers and that "
        "library; compressed-tensors: packed integers of a language model, for transformers and that package;"
        " bitsandbytes-nf4, -int8: rounded by the format itself where no stage has, for transformers and"
        " bitsandbytes; dequantized: plain bfloat16.",
    )
    max_shard_size: Annotated[
        int,
        BeforeValidator(bytes_of),
        Field(ge=1_000_000),
        WithJsonSchema(
            {"anyOf": [{"type": "number", "minimum": 1_000_000}, {"type": "string", "examples": ["5GB"]}]}
        ),
    ] = Field(5_000_000_000, description="Largest weight file, in bytes or as `5GB`.")
    padded: bool = Field(
        False,
        description="Pad pruned layers with zeros to equal widths, so that the folder loads with the stock "
        "class alone; exact, at a cost in size.",
    )
    kv_cache: Literal["adapter", "checkpoint", "custom"] | None = Field(
        None,
        description="How a compressed key-value cache leaves. adapter: its factors alone, in one file, "
        "beside the name and the hashes of the original; checkpoint: inside the whole checkpoint, which "
        "stock classes load with an uncompressed cache; custom: a checkpoint with code of its own, which "
        "transformers runs where it is told to trust it. null: adapter where no other stage changed the "
        "weights, else checkpoint.",
    )
    overwrite: bool = Field(False, description="Replace an output folder that compress wrote before.")
    push: (
        Annotated[
            PushSettings,
            WithJsonSchema({"anyOf": [{"type": "string"}, PushSettings.model_json_schema()]}),
        ]
        | None
    ) = Field(None, description="Repository that the verified result is pushed to; null: none.")


def overlap(one: Path, two: Path) -> bool:
    """Tell whether one of two outputs, or the place where it is kept when refused, is in the other's way."""
    first, second = one.absolute().resolve(), two.absolute().resolve()
    aside = [path.with_name(path.name + REJECTED) for path in (first, second)]
    return (
        not {first, aside[0]}.isdisjoint({second, aside[1]})
        or first in second.parents
        or second in first.parents
    )


def clash(exports: Sequence[ExportSettings]) -> tuple[tuple[str | int, ...], str, str] | None:
    """Return (location below `export`, what is wrong, what to do) for two exports in each other's way."""
    for index, item in enumerate(exports):
        for other in exports[:index]:
            if overlap(item.path, other.path):
                message = (
                    f"{item.path} and {other.path} lie within each other, or one is where the other is"
                    " kept when it is refused"
                )
                return (index, "path"), message, "give every export a folder of its own"
            if item.push is None or other.push is None or item.push.repo.lower() != other.push.repo.lower():
                continue  # the Hub does not tell upper from lower case in the name of a repository
            push, repo = item.push, item.push.repo
            if push.tag is not None and push.tag == other.push.tag:
                message = f"{push.tag} is already the tag of another export to {repo}"
                return (index, "push", "tag"), message, "give every export a tag of its own"
            if push.create_pr or other.push.create_pr:
                continue
            if (push.revision or _DEFAULT_BRANCH) == (other.push.revision or _DEFAULT_BRANCH):
                message = f"{repo} is already the repository of another export"
                return (index, "push"), message, "push to another repository, or to another `revision`"
    return None


class Exports:
    """Marks a tuple of `ExportSettings` that a recipe writes as one mapping or as a list of them."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        one = ExportSettings.model_json_schema()
        return handler.generate_schema(
            Annotated[
                list[ExportSettings],
                Field(min_length=1),
                BeforeValidator(lambda value: [value] if isinstance(value, Mapping) else value),
                AfterValidator(tuple),
                PlainSerializer(lambda value: value[0] if len(value) == 1 else list(value)),
                WithJsonSchema({"anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}),
            ]
        )
