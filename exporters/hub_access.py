"""May this push succeed? Asked before hours of work: token, endpoint, rights, what is in the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import HubError
from ..progress import SilentProgress
from ..recipes.export import PushSettings
from ..runtime.hub_errors import hub_error, status_of
from .hub_repository import RemoteRepository, refuse_tag, visibility

_ATTEMPTS = 3  # a Hub that cannot be reached now is told soon, before anything is computed
_WRITE = "repo.write"
_READ_ONLY_ROLES = ("read",)
_MEMBERS_WITHOUT_WRITE = ("read", "no_access")


def check_access(settings: PushSettings, *, new: bool = False) -> tuple[str, ...]:
    """Refuse a push that cannot succeed.

    Args:
        settings: of the push.
        new: what will be pushed is yet to be made, so that no tag can be on it already.

    Returns:
        What speaks against the push without standing in its way, for a strict run.

    Raises:
        HubError: there is no token, it is not accepted or may not write, the endpoint cannot be
            reached, the repository holds what compress did not write, or the tag is taken.
    """
    _require_token(settings.repo)
    repository = RemoteRepository(settings, SilentProgress(), attempts=_ATTEMPTS)
    account: dict[str, Any] = repository.ask("checking the token", repository.api.whoami)
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role in _READ_ONLY_ROLES:
        raise HubError(
            f"{settings.repo}: the token of {account.get('name')} has the role `{role}`, which cannot write",
            hint=f"make a token with write access to {settings.repo} and set {_source()}",
        )
    if not _exists(repository):
        _require_namespace(settings.repo, account)
        return ()
    private = repository.is_private()
    state = repository.state()
    if new and settings.tag is not None and settings.tag in state.tags:
        refuse_tag(settings.repo, settings.tag, state.tags[settings.tag])
    with tempfile.TemporaryDirectory(prefix="compress-push-") as scratch:
        repository.refuse_foreign(state, Path(scratch))
    return visibility(settings, private)


def _require_token(repo: str) -> None:
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise HubError(f"{repo}: HF_HUB_OFFLINE is set: nothing can be pushed", hint="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise HubError(
            f"{repo}: there is no access token",
            hint="set HF_TOKEN to a token with write access, or log in with `hf auth login`",
        )


def _source() -> str:
    """Name where the token comes from."""
    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else "it in HF_TOKEN, or by `hf auth login`"


def _exists(repository: RemoteRepository) -> bool:
    """Return whether the repository is there for this token.

    Raises:
        HubError: it is there, and the token may not do what the push does.
    """
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    settings = repository.settings
    write = not settings.create_pr or settings.tag is not None  # a pull request alone needs no such right

    def check() -> bool:
        try:
            repository.api.auth_check(repository.repo, write=write)
        except RepositoryNotFoundError as error:
            # Endpoints that do not know the question answer 404 as well; a description tells.
            if status_of(error) in (401, 404):
                return _described(repository)
            raise
        except HfHubHTTPError as error:
            if status_of(error) == 404:
                return _described(repository)
            if status_of(error) == 403:
                raise _forbidden(repository, error) from None
            raise
        return True

    exists: bool = repository.ask("checking the rights", check)
    return exists


def _described(repository: RemoteRepository) -> bool:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        repository.api.model_info(repository.repo)
    except RepositoryNotFoundError:
        return False
    return True


def _forbidden(repository: RemoteRepository, error: Exception) -> HubError:
    told = hub_error(error, f"{repository.repo}: writing to it")
    without = " without --tag" if repository.settings.tag else ""
    hint = f"get write access to {repository.repo} and set {_source()}, or use --create-pr{without}"
    return HubError(told.message, hint=hint)


def _require_namespace(repo: str, account: dict[str, Any]) -> None:
    """Refuse a new repository under a name that the account may not create repositories under.

    Raises:
        HubError: naming the right that is missing.
    """
    namespace = repo.partition("/")[0]
    organisations = {org.get("name"): org for org in account.get("orgs") or ()}
    if namespace != account.get("name"):
        if namespace not in organisations:
            raise HubError(
                f"{repo}: does not exist, or is not open to {account.get('name')}, who is no member of"
                f" {namespace} and so cannot create it (403)",
                hint=f"check the name, or use a token of a member of {namespace} with the right to write",
            )
        member = organisations[namespace].get("roleInOrg")
        if member in _MEMBERS_WITHOUT_WRITE:
            raise HubError(
                f"{repo}: does not exist, and {account.get('name')} has the role `{member}` in {namespace},"
                " which cannot create it (403)",
                hint=f"ask an administrator of {namespace} for the role `contributor` or `write`",
            )
    _require_scope(repo, namespace, account)


def _require_scope(repo: str, namespace: str, account: dict[str, Any]) -> None:
    """Hold a fine-grained token against the scopes that the Hub tells about it."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") != "fineGrained" or not isinstance(scopes, list):
        return
    allowed = any(
        (scope.get("entity") or {}).get("name") == namespace and _WRITE in (scope.get("permissions") or ())
        for scope in scopes
    )
    if not allowed:
        raise HubError(
            f"{repo}: does not exist, and the token has no permission `{_WRITE}` for {namespace} (403)",
            hint=f"give the token write access to the repositories of {namespace}, or create {repo} first",
        )
