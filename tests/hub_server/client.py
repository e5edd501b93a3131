"""The test's side of the server: start it, tell it to fail, look at what it holds."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ENVIRONMENT_OF_THE_LIBRARIES = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")


class Hub:
    """A running server, from outside.

    Attributes:
        endpoint: its address.
        storage: the address of the large files, another port.
        writer: token that writes to the organisation `org` and to the user `wanda`.
        reader: token that reads what belongs to `org`, and writes nothing.
        stranger: token of a user, `sam`, who is no member of `org`.
    """

    def __init__(self, folder: Path) -> None:
        self._secret = secrets.token_hex(16)
        self.writer, self.reader, self.stranger = (f"hf_{secrets.token_urlsafe(24)}" for _ in range(3))
        settings = {"secret": self._secret, "accounts": self._accounts()}
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hub_server", str(folder)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        where = json.loads(self._process.stdout.readline())
        self.endpoint, self.storage = where["hub"], where["storage"]
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _accounts(self) -> dict[str, dict[str, Any]]:
        return {
            "writer": {
                "token": self.writer,
                "user": "wanda",
                "organisations": {"org": "write"},
                "role": "write",
            },
            "reader": {
                "token": self.reader,
                "user": "rita",
                "organisations": {"org": "read"},
                "role": "read",
            },
            "stranger": {"token": self.stranger, "user": "sam", "organisations": {}, "role": "write"},
        }

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, command: str, **arguments: Any) -> Any:
        request = urllib.request.Request(
            f"{self.endpoint}/_control/{command}",
            data=json.dumps(arguments).encode(), headers={"X-Control-Secret": self._secret}, method="POST",
        )  # fmt: skip
        try:
            with self._opener.open(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["error"]) from None

    def environment(self, home: Path, token: str | None = "") -> dict[str, str]:
        """Return the environment for a process that talks to this server.

        Args:
            home: where its caches go.
            token: None for no token; the writer's when not given.
        """
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(_ENVIRONMENT_OF_THE_LIBRARIES)
        }
        kept |= {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }  # fmt: skip
        if token is not None:
            kept["HF_TOKEN"] = token or self.writer
        return kept

    def reset(self) -> None:
        """Forget repositories, faults, requests and settings."""
        self._call("reset")

    def configure(self, **settings: int) -> None:
        """Set `chunk_bytes` (size of a part; larger files come in parts) or `page_entries`."""
        self._call("configure", **settings)

    def fail(
        self, method: str, path: str, *, times: int = 1, status: int | None = None,
        headers: Mapping[str, str] | None = None, cut_after: int | None = None, delay: float | None = None,
        hook: str | None = None,
    ) -> None:  # fmt: skip
        """Tell the server what to do wrong; faults that fit the same request are used in this order.

        Args:
            path: regular expression, searched in the path of a request (without its query).
            times: how many requests meet it.
            status: answer with this, after the whole body came in.
            headers: of that answer, such as Retry-After.
            cut_after: cut the connection after so many bytes of the body (of the answer, for GET).
            delay: seconds to wait before anything else.
            hook: "commit": somebody commits SOMEBODY.md to the branch before the request is answered;
                "lose answer": the request is carried out, then the connection is cut.
        """
        self._call(
            "fail", method=method, path=path, times=times, status=status, headers=dict(headers or {}),
            cut_after=cut_after, delay=delay, hook=hook,
        )  # fmt: skip

    def reset_faults(self) -> None:
        """Forget the faults still to come, and nothing else."""
        self._call("reset_faults")

    def faults_left(self) -> list[dict[str, Any]]:
        """Return the faults that no request has met yet."""
        return self._call("faults_left")

    def requests(self) -> list[dict[str, Any]]:
        """Return every request so far, in order; those still running have the status None.

        Each has method, path, query, host ("hub" or "storage"), status (None too when the connection
        was cut), received_bytes and sent_bytes (of bodies), token_name ("writer", ..., "unknown",
        None without one, "leaked" for a token sent to the storage), seconds.
        """
        return self._call("requests")

    def exists(self, repo: str) -> bool:
        return self._call("exists", repo=repo)

    def private(self, repo: str) -> bool:
        return self._call("private", repo=repo)

    def objects(self, repo: str) -> dict[str, int]:
        """Return the large files that were uploaded, committed or not: SHA-256 -> bytes."""
        return self._call("objects", repo=repo)

    def refs(self, repo: str) -> dict[str, dict[str, str]]:
        """Return `branches`, `tags` and `pull_requests`: name -> commit."""
        return self._call("refs", repo=repo)

    def commits(self, repo: str, revision: str = "main") -> list[dict[str, Any]]:
        """Return the history, newest first: oid, parent, title, description, author, files."""
        return self._call("commits", repo=repo, revision=revision)

    def broken(self) -> list[str]:
        """Return the files of all commits whose bytes are not there or have another SHA-256."""
        return self._call("broken")

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        return base64.b64decode(self._call("read", repo=repo, path=path, revision=revision))

    def create(
        self,
        repo: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        author: str = "somebody",
    ) -> str:
        """Make a repository behind the client's back; return its newest commit."""
        return self._call("create", repo=repo, files=_encoded(files or {}), private=private, author=author)

    def commit(
        self, repo: str, files: Mapping[str, bytes], revision: str = "main", *, author: str = "somebody"
    ) -> str:
        """Commit behind the client's back; return the commit."""
        return self._call("commit", repo=repo, files=_encoded(files), revision=revision, author=author)


def _encoded(files: Mapping[str, bytes]) -> dict[str, str]:
    return {path: base64.b64encode(data).decode() for path, data in files.items()}
