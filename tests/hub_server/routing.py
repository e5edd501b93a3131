"""Which function answers which address, and what every answer needs: the store and who may see what."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

from .accounts import Account, Signer
from .messages import HttpError, Request, Response
from .store import Repository, Store, Upload

REPOSITORY = r"(?P<name>[^/]+/[^/]+)"
MODEL = "/api/models/" + REPOSITORY
REVISION = r"(?P<revision>[^/]+)"


@dataclass
class Settings:
    """What a test may set.

    Attributes:
        chunk_bytes: size of a part; larger files are uploaded in parts.
        page_entries: entries on one page of a file list.
    """

    chunk_bytes: int = 8 << 20
    page_entries: int = 1000

    def restore(self) -> None:
        """Go back to the defaults."""
        self.__init__()  # type: ignore[misc]


@dataclass
class Site:
    """What the answering functions share."""

    store: Store
    signer: Signer
    settings: Settings = field(default_factory=Settings)
    uploads: dict[str, Upload] = field(default_factory=dict)

    def repository(self, request: Request, name: str, *, write: bool = False) -> Repository:
        """Return a repository that the caller may see, and change when `write`.

        Raises:
            HttpError: 401 or 404 when it is not there or private to others (the Hub does not tell
                which), 401 or 403 when the caller may not write.
        """
        account, found = request.account, self.store.repositories.get(name)
        visible = found and (not found.private or (account and account.reads(found.namespace)))
        if found is None or not visible:
            if account is None:
                raise HttpError(401, "Invalid username or password.", code="RepoNotFound")
            raise HttpError(404, "Repository not found", code="RepoNotFound")
        if write:
            require_write(account, found.namespace)
        return found


def require_write(account: Account | None, namespace: str) -> None:
    """Refuse a caller who may not write to `namespace`."""
    if account is None:
        raise HttpError(401, "Invalid username or password.")
    if account.role != "write":
        raise HttpError(
            403, "Forbidden: this token has no write permission; use a token with the role `write`"
        )
    if not account.writes(namespace):
        raise HttpError(403, f"Forbidden: you do not have write access to the namespace {namespace}")


Answer = Callable[..., Response]
TABLE: list[tuple[str, re.Pattern[str], Answer]] = []


def route(method: str, pattern: str) -> Callable[[Answer], Answer]:
    """Register `answer(site, request, **groups)` for a method and a pattern of the whole path."""

    def register(answer: Answer) -> Answer:
        TABLE.append((method, re.compile(pattern), answer))
        return answer

    return register


def answer(site: Site, request: Request) -> Response:
    """Find and call the function for a request; the groups of the address come unquoted."""
    for method, pattern, function in TABLE:
        if method == request.method and (match := pattern.fullmatch(request.path)):
            return function(
                site, request, **{key: unquote(value or "") for key, value in match.groupdict().items()}
            )
    raise HttpError(404, f"Sorry, we can't find {request.method} {request.path}")
