"""What travels: a request with its body, a response, an error that becomes a response."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs

from .accounts import Account

CHUNK_BYTES = 1 << 17


class HttpError(Exception):
    """An answer other than success, in the form that the Hub gives it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body
        self.headers = dict(headers or {})

    def response(self) -> Response:
        headers = {**self.headers, "X-Error-Message": self.message.replace("\n", " ")}
        if self.code:
            headers["X-Error-Code"] = self.code
        return Response.of({"error": self.message, **self.body}, status=self.status, headers=headers)


@dataclass
class Response:
    """Status, headers and a body: bytes, or `length` bytes of a file from `start`."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    file: Path | None = None
    start: int = 0
    length: int = 0

    @classmethod
    def of(cls, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        """Make a JSON response."""
        kind = {"Content-Type": "application/json; charset=utf-8"}
        return cls(status, {**kind, **(headers or {})}, json.dumps(value).encode())

    @property
    def size(self) -> int:
        return self.length if self.file else len(self.content)


class Body:
    """The bytes of a request: of known length or chunked; counts them, and may be cut short."""

    def __init__(self, stream: BinaryIO, headers: HTTPMessage, count: Callable[[int], None]) -> None:
        self._stream, self._count = stream, count
        self._chunked = "chunked" in (headers.get("Transfer-Encoding") or "").lower()
        self._left = 0 if self._chunked else int(headers.get("Content-Length") or 0)
        self._done = not self._chunked and not self._left

    def chunks(self) -> Iterator[bytes]:
        """Yield what comes, in pieces.

        Raises:
            ConnectionError: when the sender goes away before the end.
        """
        while not self._done:
            if self._left == 0:
                self._next_chunk()
                continue
            piece = self._stream.read1(min(self._left, CHUNK_BYTES))  # type: ignore[attr-defined]
            if not piece:
                raise ConnectionError("the sender went away")
            self._left -= len(piece)
            self._done = not self._left and not self._chunked
            if self._chunked and not self._left:
                self._stream.readline()
            self._count(len(piece))
            yield piece

    def _next_chunk(self) -> None:
        line = self._stream.readline()
        if not line:
            raise ConnectionError("the sender went away")
        self._left = int(line.split(b";")[0], 16)
        if self._left == 0:
            self._stream.readline()
            self._done = True

    def read(self) -> bytes:
        return b"".join(self.chunks())


@dataclass
class Request:
    """One request, its account already known."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: HTTPMessage
    body: Body
    account: Account | None
    endpoint: str
    storage: str

    def flag(self, name: str) -> bool:
        """Say whether a parameter of the query is switched on."""
        return self.query.get(name, ["0"])[-1].lower() in ("1", "true")

    def json(self) -> Any:
        """Read the body as JSON; an object is expected."""
        try:
            value = json.loads(self.body.read() or b"{}")
        except ValueError as error:
            raise HttpError(400, f"not JSON: {error}") from error
        if not isinstance(value, dict):
            raise HttpError(400, "expected an object")
        return value

    def form(self) -> dict[str, list[str]]:
        """Read the body as a form."""
        return parse_qs(self.body.read().decode(), keep_blank_values=True)
