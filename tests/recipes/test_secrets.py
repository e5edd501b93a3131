"""Access tokens: blotted out of every text, and refused in recipes and options."""

from __future__ import annotations

import pytest
from compress.errors import RecipeError
from compress.recipes.loader import load_recipe
from compress.recipes.secrets import holds_secret, redact, without_user_info

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


def test_short_values_do_not_blot_out_words(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "test")
    assert redact("a test") == "a test" and not holds_secret("a test")


@pytest.mark.parametrize(
    "text", ["hf_hub", "me@example.org", "https://host/a@b", "a/b@v1", "sha256:" + "a" * 64]
)
def test_harmless_text_stays(text):
    assert redact(text) == text and not holds_secret(text)


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
