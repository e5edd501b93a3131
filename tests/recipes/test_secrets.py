"""Access tokens: blotted out of every text, and refused in recipes and options."""

from __future__ import annotations

from pathlib import Path

import pytest
from compress.errors import RecipeError
from compress.recipes.loader import load_recipe
from compress.recipes.secrets import holds_secret, redact, redacted, without_user_info

PLANTED = "hf_" + "PlAnTeD" * 5
BASE = "model: builtin:dit\nstages: [{rtn: {}}]\nexport: {path: out/x}\n"


@pytest.mark.parametrize(
    "text",
    [
        f"token {PLANTED}.",
        f"Authorization: Bearer {PLANTED}",
        f"https://user:{PLANTED}@host/x",
        f"https://{PLANTED}@host/x",
        f"https://host/x?a=1&X-Amz-Signature={'ab12' * 8}&b=2",
        "glpat-" + "a1B2" * 5,
        "ghp_" + "a1B2" * 9,
    ],
)
def test_tokens_are_blotted_out(text):
    clean = redact(text)
    assert "***" in clean
    for secret in (PLANTED, "ab12ab12", "a1B2a1B2"):
        assert secret not in clean
    assert redact(clean) == clean


def test_values_of_the_environment_are_known_whatever_they_look_like(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "correct horse/battery")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:pa%20ssword@host:1")
    (tmp_path / "token").write_text("stored-on-disk\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    text = "correct horse/battery correct%20horse%2Fbattery pa ssword pa%20ssword stored-on-disk"
    assert redact(text) == "*** *** *** *** ***"
    assert holds_secret("x stored-on-disk x")


@pytest.mark.parametrize("url", ["http://user:p@ss@wordlong12@host:3128", "user:p@ss@wordlong12@host:3128/"])
def test_a_password_with_an_at_sign_ends_at_the_last_one(monkeypatch, url):
    assert redact("to http://user:p@ss@wordlong12@host/a@b failed") == "to http://***@host/a@b failed"
    monkeypatch.setenv("https_proxy", url)
    assert redact("auth p@ss@wordlong12 and p%40ss%40wordlong12 refused") == "auth *** and *** refused"
    assert holds_secret("x p@ss@wordlong12 x")


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("HTTPS_PROXY", "http://compress:a-long-password@host"),
        ("HTTPS_PROXY", "http://compress@host"),
        ("HF_ENDPOINT", "https://compress@host"),
        ("HF_ENDPOINT", "https://host/compress@b"),
    ],
)
def test_the_name_of_a_user_is_no_secret(monkeypatch, variable, url):
    monkeypatch.setenv(variable, url)
    assert redact("compress run") == "compress run" and not holds_secret("compress run")


def test_a_token_alone_before_the_host_is_known(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://0a1b2c3d4e5f6a7b8c9d@host")
    assert redact("with 0a1b2c3d4e5f6a7b8c9d") == "with ***"


def test_only_texts_of_a_document_are_changed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "12345678")
    document = {"bytes": 12345678, "note": "12345678!", "x": [12345678.5, None]}
    assert redacted(document) == {"bytes": 12345678, "note": "***!", "x": [12345678.5, None]}


def test_a_user_without_a_home(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert redact(f"a {PLANTED}") == "a ***"
    (tmp_path / "token").write_text("stored-on-disk\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redact("a stored-on-disk") == "a ***"


def test_short_values_do_not_blot_out_words(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "test")
    assert redact("a test") == "a test" and not holds_secret("a test")


@pytest.mark.parametrize(
    "text", ["hf_hub", "me@example.org", "https://host/a@b", "a/b@v1", "sha256:" + "a" * 64]
)
def test_harmless_text_stays(text):
    assert redact(text) == text and not holds_secret(text)


@pytest.mark.parametrize("url", ["ssh://git@github.com/org/name", "https://me@host/x", "https://host?a:b@c"])
def test_a_user_without_a_password_is_not_refused(tmp_path, url):
    assert not holds_secret(url)
    (tmp_path / "r.yaml").write_text(f"# from {url}\n{BASE}")
    load_recipe(tmp_path / "r.yaml")


def test_user_info_is_cut_off():
    assert without_user_info("http://a:b@host:80/x?y#z") == "http://host:80/x?y#z"


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        (BASE + f"# my token: {PLANTED}\n", 4, 13),
        (BASE.replace("builtin:dit", f"https://me:{PLANTED}@host/org/name"), 1, 16),
        (BASE + f"{PLANTED}: 1\n", 4, 1),
    ],
)
def test_a_recipe_with_a_token_is_refused_without_showing_it(tmp_path, text, line, column):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="access token") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert (caught.value.line, caught.value.column) == (line, column)
    assert PLANTED not in str(caught.value) + str(caught.value.hint)


def test_a_token_from_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "no-special-form-at-all")
    (tmp_path / "r.yaml").write_text(BASE.replace("out/x", '"out/${HF_TOKEN}"'))
    with pytest.raises(RecipeError, match="export.path: holds what looks like an access token") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "no-special-form" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"overrides": [f"model={PLANTED}"]}, {"model": f"a/{PLANTED}"}, {"push": PLANTED}]
)
def test_a_token_in_an_option_is_refused(tmp_path, options):
    (tmp_path / "r.yaml").write_text(BASE)
    with pytest.raises(RecipeError, match="access token") as caught:
        load_recipe(tmp_path / "r.yaml", **options)
    assert PLANTED not in str(caught.value)


def test_words_are_no_header():
    assert redact("basic quantization, basically") == "basic quantization, basically"
    for header in ("Authorization: Basic dXNlcjpwYXNz", "'authorization': 'Basic dXNlcjpwYXNz'"):
        assert "dXNlcjpwYXNz" not in redact(header)
