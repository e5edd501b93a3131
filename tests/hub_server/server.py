"""Two listeners in one process, as the Hub has two hosts: the site, and the storage of large files."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import re
import socket
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from . import cards, content, discussions, large_files, repositories  # each registers its addresses
from .accounts import Account, Signer
from .control import Control
from .faults import Fault, Faults, Record
from .messages import CHUNK_BYTES, Body, HttpError, Request, Response
from .routing import Site, answer
from .store import Store

PARTS = (cards, content, discussions, large_files, repositories)


class Cut(Exception):
    """The connection is to end here, without an answer."""


@dataclass
class Shared:
    """What all connections share."""

    site: Site
    faults: Faults
    control: Control
    accounts: dict[str, tuple[str, Account]]
    secret: str
    endpoint: str = ""
    storage: str = ""


class Handler(BaseHTTPRequestHandler):
    """One connection; HTTP/1.1, so it serves many requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    shared: Shared
    host: str

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: the record of requests is the log."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        body = Body(self.rfile, self.headers, lambda count: None)  # type: ignore[arg-type]
        if path.startswith("/_control/"):
            self._send(self._control(path.removeprefix("/_control/"), body), None)
            return
        record = self.shared.faults.note(Record(self.command, path, self.host, {}))
        if self.host == "hub":
            record.query = parse_qs(query)
        body = Body(self.rfile, self.headers, record.received)  # type: ignore[arg-type]
        fault = self.shared.faults.take(self.command, path)
        try:
            response = self._respond(path, parse_qs(query), body, record, fault)
            cut_after = fault.cut_after if fault and self.command == "GET" else None
            self._send(response, record, cut_after)
            record.end(response.status)
        except (Cut, ConnectionError):
            record.end(None)
            self._cut()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _respond(
        self, path: str, query: dict[str, list[str]], body: Body, record: Record, fault: Fault | None
    ) -> Response:
        """Do what is asked, or what was told to go wrong."""
        try:
            account = self._account(record)
            if fault:
                self._go_wrong(fault, path, body)
            request = Request(
                self.command,
                path,
                query,
                self.headers,
                body,
                account,
                self.shared.endpoint,
                self.shared.storage,
            )
            on_storage = path.startswith(("/uploads/", "/objects/"))
            if on_storage != (self.host == "storage"):
                raise HttpError(404, f"Sorry, we can't find {path} on this host")
            if on_storage:
                large_files.check_signature(self.shared.site, request)
            response = answer(self.shared.site, request)
        except HttpError as error:
            response = error.response()
        except (Cut, ConnectionError):
            raise
        except Exception:
            response = HttpError(500, traceback.format_exc()).response()
        for _ in body.chunks():
            continue  # What was not read would be taken for the next request.
        if fault and fault.hook == "lose answer":
            raise Cut
        return response

    def _account(self, record: Record) -> Account | None:
        """Find the holder of the token; a token that nobody has is an error, also for public files."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if self.host == "storage":
            record.token_name = "leaked"
            return None
        record.token_name = "unknown"
        token = header.removeprefix("Bearer ")
        for known, (name, account) in self.shared.accounts.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                record.token_name = name
                return account
        raise HttpError(401, "Invalid credentials in Authorization header")

    def _go_wrong(self, fault: Fault, path: str, body: Body) -> None:
        if fault.delay:
            time.sleep(fault.delay)
        if fault.hook == "commit":
            self._somebody_commits(path)
        if fault.cut_after is not None and self.command != "GET":
            arrived = 0
            for piece in body.chunks():
                arrived += len(piece)
                if arrived >= fault.cut_after:
                    break
            raise Cut
        if fault.status:
            raise fault.error()

    def _somebody_commits(self, path: str) -> None:
        """Commit a file to the branch that the request names, `main` where it names none."""
        if upload := self.shared.site.uploads.get(path.split("/")[2]):
            repo, revision = upload.repository.name, "main"
        else:
            match = re.match(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?/\w[\w-]*(?:/([^/]+))?", path)
            if match is None:
                raise HttpError(500, f"no repository in {path}: nobody can commit to it")
            named = "/api/" in path and match[2]
            repo, revision = match[1], unquote(match[2]) if named else "main"
        data = base64.b64encode(str(time.time_ns()).encode()).decode()
        arguments = {"repo": repo, "files": {"SOMEBODY.md": data}, "revision": revision, "author": "somebody"}
        self.shared.control.call("commit", arguments)

    def _control(self, command: str, body: Body) -> Response:
        data = body.read()
        if not hmac.compare_digest(self.headers.get("X-Control-Secret", ""), self.shared.secret):
            return HttpError(403, "the control secret does not fit").response()
        try:
            return Response.of(self.shared.control.call(command, json.loads(data or b"{}")))
        except HttpError as error:
            return error.response()
        except Exception:
            return HttpError(500, traceback.format_exc()).response()

    def _send(self, response: Response, record: Record | None, cut_after: int | None = None) -> None:
        self.send_response(response.status)
        for key, value in response.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(response.size))
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in _pieces(response):
            piece = piece if cut_after is None or not record else piece[: cut_after - record.sent_bytes]
            self.wfile.write(piece)
            if record:
                record.sent_bytes += len(piece)
                if record.sent_bytes == cut_after:
                    raise Cut

    def _cut(self) -> None:
        """End the connection: of an upload with a reset, so that the sender learns of it at once."""
        self.close_connection = True
        if self.command == "GET":
            return
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.close()


def _pieces(response: Response) -> Any:
    if response.file is None:
        yield response.content
        return
    with response.file.open("rb") as file:
        file.seek(response.start)
        left = response.length
        while left and (piece := file.read(min(left, CHUNK_BYTES))):
            left -= len(piece)
            yield piece


class Listener(ThreadingHTTPServer):
    """A listener whose connections end with it, and that does not mind a client that went away."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)


@dataclass
class Running:
    """A server that serves."""

    endpoint: str
    storage: str
    listeners: list[Listener]

    def stop(self) -> None:
        for listener in self.listeners:
            listener.shutdown()
            listener.server_close()


def serve(folder: Path, settings: dict[str, Any]) -> Running:
    """Start both listeners on free ports of the loopback interface.

    Args:
        folder: where bytes are kept; may be missing.
        settings: `secret` of the control commands, `accounts`: token name -> token, user,
            organisations, role.
    """
    faults = Faults()
    site = Site(Store(folder), Signer(settings["secret"]))
    accounts = {
        told["token"]: (name, Account(told["user"], told["organisations"], told["role"]))
        for name, told in settings["accounts"].items()
    }
    shared = Shared(site, faults, Control(site, faults), accounts, settings["secret"])
    listeners = []
    for host in ("hub", "storage"):
        handler = type("Handler", (Handler,), {"shared": shared, "host": host})
        listener = Listener(("127.0.0.1", 0), handler)
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        listeners.append(listener)
    shared.endpoint, shared.storage = (f"http://127.0.0.1:{one.server_address[1]}" for one in listeners)
    return Running(shared.endpoint, shared.storage, listeners)
