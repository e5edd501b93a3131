"""Which calls are made again, after how long, and that nothing is done twice."""

from __future__ import annotations

import json
import time

import httpx2
import pytest
from compress.errors import HubError
from compress.exporters import hub_transfer
from compress.exporters.hub_access import _require_scope
from compress.exporters.hub_transfer import ATTEMPTS, attempt
from compress.progress import SilentProgress
from huggingface_hub.errors import HfHubHTTPError

WHAT = "org/model: doing"


class Notes(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def answered(status, **headers):
    request = httpx2.Request("POST", "https://hub.example/api")
    return HfHubHTTPError(str(status), response=httpx2.Response(status, request=request, headers=headers))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(hub_transfer, "_FIRST_WAIT_SECONDS", 0.001)


class Failing:
    """Raises each error in turn, then returns 7."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.mark.parametrize(
    "error",
    [
        *(answered(status) for status in (408, 429, 500, 502, 503, 504)),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("cut"),
        json.JSONDecodeError("no JSON", "<html>", 0),
    ],
)
def test_what_may_pass_is_tried_again(error):
    call, progress = Failing(error, error), Notes()
    assert attempt(WHAT, call, progress=progress) == 7
    assert call.calls == 3
    assert len(progress.notes) == 2
    assert progress.notes[0].startswith(f"{WHAT}: ")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_what_will_not_pass_is_not_tried_again(status):
    call = Failing(answered(status))
    with pytest.raises(HubError):
        attempt(WHAT, call, progress=SilentProgress(), done=lambda: pytest.fail("had no effect"))
    assert call.calls == 1


def test_patience_ends():
    call = Failing(*[answered(500)] * 20)
    with pytest.raises(HubError, match="org/model: doing: the Hub failed"):
        attempt(WHAT, call, progress=SilentProgress())
    assert call.calls == ATTEMPTS


def test_the_hub_is_waited_for_as_long_as_it_asks():
    started = time.monotonic()
    assert attempt(WHAT, Failing(answered(429, **{"Retry-After": "1"})), progress=SilentProgress()) == 7
    assert time.monotonic() - started >= 1
    headers = {"ratelimit": '"api";r=0;t=1', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}
    started = time.monotonic()
    assert attempt(WHAT, Failing(answered(429, **headers)), progress=SilentProgress()) == 7
    assert time.monotonic() - started >= 1


def test_a_wait_of_an_hour_is_not_waited():
    call = Failing(answered(429, **{"Retry-After": "3600"}))
    with pytest.raises(HubError, match="too many requests"):
        attempt(WHAT, call, progress=SilentProgress())
    assert call.calls == 1


@pytest.mark.parametrize("error", [answered(500), answered(409), answered(412), httpx2.ReadError("cut")])
def test_a_call_that_had_its_effect_is_not_made_again(error):
    call = Failing(error)
    assert attempt(WHAT, call, progress=SilentProgress(), done=lambda: 9) == 9
    assert call.calls == 1


def account(*scopes, role="fineGrained"):
    return {"name": "wanda", "auth": {"accessToken": {"role": role, "fineGrained": {"scoped": list(scopes)}}}}


def scope(name, *permissions):
    return {"entity": {"type": "org", "name": name}, "permissions": list(permissions)}


def test_the_scopes_of_a_fine_grained_token():
    _require_scope("org/model", "org", account(scope("org", "repo.content.read", "repo.write")))
    _require_scope("org/model", "org", account(role="write"))
    _require_scope("org/model", "org", {"auth": {"accessToken": {"role": "fineGrained"}}})  # nothing is told
    for found in (
        account(),
        account(scope("org", "repo.content.read")),
        account(scope("other", "repo.write")),
    ):
        with pytest.raises(HubError, match=r"no permission `repo\.write` for org"):
            _require_scope("org/model", "org", found)
