"""Who may do what: tokens, the namespaces they write to, signatures of storage addresses."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Account:
    """The holder of one token.

    Attributes:
        name: user name, also the user's own namespace.
        organisations: name -> role in it, "read" or "write".
        role: what the token itself allows, "read" or "write".
    """

    name: str
    organisations: dict[str, str] = field(default_factory=dict)
    role: str = "write"

    def reads(self, namespace: str) -> bool:
        """Say whether private repositories of `namespace` are visible."""
        return namespace == self.name or namespace in self.organisations

    def writes(self, namespace: str) -> bool:
        """Say whether this token may create and change repositories of `namespace`."""
        owner = namespace == self.name or self.organisations.get(namespace) == "write"
        return owner and self.role == "write"

    def to_json(self) -> dict[str, object]:
        """Give what whoami-v2 tells."""
        organisations = [
            {"type": "org", "name": name, "fullname": name, "roleInOrg": role, "isEnterprise": False}
            for name, role in self.organisations.items()
        ]
        token = {"displayName": self.name, "role": self.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        return {
            "type": "user", "id": hashlib.sha1(self.name.encode()).hexdigest()[:24], "name": self.name,
            "fullname": self.name.title(), "isPro": False, "orgs": organisations,
            "auth": {"type": "access_token", "accessToken": token},
        }  # fmt: skip


class Signer:
    """Signs addresses of the storage, so that they need no token, for one method and a limited time."""

    def __init__(self, secret: str, lifetime_seconds: int = 3600) -> None:
        self._secret, self._lifetime = secret.encode(), lifetime_seconds

    def _signature(self, method: str, path: str, expires: str) -> str:
        message = f"{method} {path} {expires}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    def sign(self, method: str, path: str) -> str:
        """Return `path` with its expiry and signature in the query."""
        expires = str(int(time.time()) + self._lifetime)
        return f"{path}?X-Amz-Expires={expires}&X-Amz-Signature={self._signature(method, path, expires)}"

    def holds(self, method: str, path: str, query: dict[str, list[str]]) -> bool:
        """Say whether `query` carries a signature of ours for this request that is still good."""
        expires, signature = (query.get(name, [""])[0] for name in ("X-Amz-Expires", "X-Amz-Signature"))
        good = hmac.compare_digest(signature, self._signature(method, path, expires))
        return good and int(expires) >= time.time()
