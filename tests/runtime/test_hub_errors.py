"""What errors of the Hub's library become: one type, what to do, no token."""

from __future__ import annotations

import errno

import httpx2
import pytest
from compress.errors import HubError
from compress.runtime.hub_errors import hub_error, status_of, translated
from huggingface_hub import errors

WHAT = "org/model: committing to main"
TOKEN = "hf_" + "s3" * 17


def answered(status, said=None, kind=errors.HfHubHTTPError):
    request = httpx2.Request("POST", f"https://user:{TOKEN}@hub.example/api?X-Amz-Signature=abcdef")
    response = httpx2.Response(status, request=request)
    return kind(f"{status} for url {request.url}", response=response, server_message=said)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (answered(401), "the token is not accepted (401)", "HF_TOKEN"),
        (answered(403, "no write permission"), "not permitted (403: no write permission)", "write access"),
        (answered(412), "the branch moved meanwhile (412)", "push again"),
        (answered(413), "too large for the Hub (413)", "max_shard_size"),
        (answered(418, "a teapot"), "the Hub refused (418: a teapot)", ""),
        (answered(429), "too many requests (429)", "later"),
        (answered(503), "the Hub failed (503)", "later"),
        (answered(404, kind=errors.RepositoryNotFoundError), "not found on the Hub, or not open", "HF_TOKEN"),
        (answered(404, kind=errors.RevisionNotFoundError), "no such revision", "model.revision"),
        (errors.LocalTokenNotFoundError("none"), "there is no access token", "HF_TOKEN"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be fetched", "HF_HUB_OFFLINE"),
        (errors.HFValidationError("bad"), "not a Hub id: bad", "org/name"),
        (ValueError("Invalid metadata in README.md.\n- tags"), "README.md. - tags", "nothing was committed"),
        (ConnectionError("404, domain: /xet-write-token/main"), "cannot be reached", "HF_HUB_DISABLE_XET=1"),
        (httpx2.ConnectError("refused"), "cannot be reached: ConnectError: refused", "HF_ENDPOINT"),
    ],
)
def test_every_error_says_what_to_do(error, message, hint):
    found = hub_error(error, WHAT)
    assert found.exit_code == 7
    assert found.message.startswith(f"{WHAT}: ")
    assert message in found.message
    assert hint in found.hint
    assert TOKEN not in found.message + found.hint


def test_the_cause_of_a_failed_upload_is_told():
    try:
        try:
            raise answered(500)
        except errors.HfHubHTTPError as cause:
            raise RuntimeError("Error while uploading 'a' to the Hub.") from cause
    except RuntimeError as error:
        assert "the Hub failed (500)" in hub_error(error, WHAT).message


def test_what_is_raised_does_not_carry_the_librarys_text():
    with pytest.raises(HubError) as caught, translated(WHAT):
        raise answered(500)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_errors_of_this_disk_and_of_ours_pass():
    for number in (errno.ENOSPC, errno.EFBIG):
        with pytest.raises(OSError, match="full") as caught, translated(WHAT):
            raise OSError(number, "full")
        assert caught.value.errno == number
    ours = HubError("ours")
    with pytest.raises(HubError) as caught, translated(WHAT):
        raise ours
    assert caught.value is ours


def test_status():
    assert status_of(answered(409)) == 409
    assert status_of(OSError()) is None
