"""A token appears in no byte that is printed or written, however a command ends.

Every command is a real process with a home, a temporary folder and a current directory of its own; all that
it printed and all files below them are searched, and everything that the Hub was given.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

pytestmark = pytest.mark.slow

RECIPE = """\
model: builtin:dit
calibration: {samples: 1, steps: 2, guidance_scale: 1.5}
stages: [rtn: {weight_bits: 8}]
evaluate: {fidelity: {samples: 1, steps: 2, guidance_scale: 1.5}}
export: {path: out/dit, push: org/dit}
"""


def _forms(token):
    """Return the token as it would look in a file, an address, a JSON text or a header."""
    forms = {token, quote(token, safe=""), json.dumps(token)[1:-1]}
    found = {form.encode() for form in forms}
    for user in ("", "user:", "x:"):  # as of a header that names a user and a password
        found.add(base64.b64encode(f"{user}{token}".encode()).rstrip(b"="))
    return found


class Place:
    """Where commands of one test run; what they leave is searched."""

    def __init__(self, root, hub):
        self.root, self.hub = root, hub
        self.job, self.home = root / "job", root / "home"
        for folder in (self.job, self.home, root / "tmp"):
            folder.mkdir()
        (self.job / "recipe.yaml").write_text(RECIPE)

    def environment(self, token=None, **changes):
        """Return the variables of a process that talks to the test's Hub."""
        variables = {
            **self.hub.environment(self.home / "huggingface", token),
            "HOME": str(self.home), "TMPDIR": str(self.root / "tmp"),
            "XDG_CACHE_HOME": str(self.home / "cache"), **changes,
        }  # fmt: skip
        return {name: value for name, value in variables.items() if value is not None}

    def run(self, variables, *arguments, program=("-m", "compress")):
        """Run a command; return its code and everything that it printed."""
        done = subprocess.run(
            [sys.executable, *program, *arguments], cwd=self.job, env=variables, capture_output=True,
            timeout=600,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def written(self, *, but=()):
        """Yield (place, bytes) for every file below the test's folder, names of files included."""
        for path in sorted(self.root.rglob("*")):
            yield str(path), str(path).encode()
            if path.is_file() and path not in but:
                yield str(path), path.read_bytes()

    def pushed(self):
        """Yield (place, bytes) for all that the Hub stores and all addresses that it was asked for."""
        leaked = [request for request in self.hub.requests() if request["token_name"] == "leaked"]
        assert not leaked, "the token was sent to where the large files lie"
        yield "requests", json.dumps(self.hub.requests()).encode()
        if not self.hub.exists("org/dit"):
            return
        for commit in self.hub.commits("org/dit"):
            yield "commit", json.dumps(commit).encode()
            for name in commit["files"]:
                yield name, self.hub.read("org/dit", name, commit["oid"])

    def find(self, token, printed, *, but=()):
        """Return where the token is found."""
        places = [("printed", printed), *self.written(but=but), *self.pushed()]
        assert len(places) > 3, "nothing was searched"
        return [name for name, data in places for form in _forms(token) if form in data]


@pytest.fixture
def place(tmp_path, hub):
    return Place(tmp_path, hub)


def test_the_search_finds_what_is_there(place):
    for form in sorted(_forms("a/secret+token")):
        (place.job / "leak").write_bytes(b"before" + form + b"after")
        assert place.find("a/secret+token", b"")
    (place.job / "leak").unlink()
    assert not place.find("a/secret+token", b"")


def test_success(place, hub):
    code, printed = place.run(place.environment(hub.writer), "run", "recipe.yaml", "--debug")
    assert code == 0, printed
    assert hub.commits("org/dit")
    assert place.find(hub.writer, printed) == []


# what goes wrong, as (method, path, what the server does), and the exit code
FAILURES = {
    "401 while the repository is made": ("POST", "/api/repos/create", {"status": 401, "times": 20}, 7),
    "403 at the commit": ("POST", "/commit/", {"status": 403, "times": 20}, 7),
    "500 at the commit": ("POST", "/commit/", {"status": 500, "times": 50}, 7),
    "500 at the upload": ("PUT", ".", {"status": 500, "times": 50}, 7),
    "connection cut at the upload": ("PUT", ".", {"cut_after": 1000, "times": 50}, 7),
    "500 at the first question": ("GET", "whoami", {"status": 500, "times": 50}, 7),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder to push, made once."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "recipe.yaml").write_text(RECIPE.replace(", push: org/dit", ""))
    command = [sys.executable, "-m", "compress", "run", "recipe.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "out" / "dit"


def test_a_stored_token_stays_where_it_was(place, hub, exported):
    stored = place.home / "huggingface" / "token"
    stored.parent.mkdir()
    stored.write_text(hub.writer)
    code, printed = place.run(place.environment(HF_TOKEN=None), "push", str(exported), "org/dit", "--json")
    assert code == 0, printed
    assert place.find(hub.writer, printed, but=[stored]) == []


@pytest.mark.parametrize(
    "arguments", [("--message", "{token}"), ("--tag", "{token}"), ("--revision", "{token}")]
)
def test_a_token_is_not_pushed_as_a_name(place, hub, exported, arguments):
    given = [argument.replace("{token}", hub.writer) for argument in arguments]
    command = ("push", str(exported), "org/dit", "--no-verify-remote", *given)
    code, printed = place.run(place.environment(hub.writer), *command)
    assert code == 2, printed
    assert place.find(hub.writer, printed) == []
    assert not hub.exists("org/dit")


@pytest.mark.parametrize("name", FAILURES)
def test_failing_pushes(place, hub, exported, name):
    method, path, fault, expected = FAILURES[name]
    hub.fail(method, path, **fault)
    # The library waits between its attempts; what is tested does not depend on how long.
    program = (
        "import time\n"
        "time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))\n"
        "from compress.cli.main import main\n"
        "main()\n"
    )
    code, printed = place.run(
        place.environment(hub.writer), "push", str(exported), "org/dit", "--debug", program=("-c", program)
    )
    assert code == expected, printed
    assert b"Traceback" in printed, "--debug shows where it happened"
    assert place.find(hub.writer, printed) == []


def test_a_wrong_token(place, hub):
    wrong = "hf_" + secrets.token_hex(20)
    code, printed = place.run(place.environment(wrong), "run", "recipe.yaml", "--debug")
    assert code == 7, printed
    assert place.find(wrong, printed) == []


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_a_password_in_the_endpoint(place, hub, debug):
    password = secrets.token_hex(16)
    endpoint = hub.endpoint.replace("://", f"://user:{password}@")
    variables = place.environment(hub.writer, HF_ENDPOINT=endpoint)
    code, printed = place.run(variables, "run", "recipe.yaml", *debug)
    assert code in (0, 7), printed
    assert place.find(password, printed) == []
    assert place.find(hub.writer, printed) == []


# where the token stands: the recipe, further arguments
RECIPES = {
    "value": ("model: {token}\n" + RECIPE.partition("\n")[2], ()),
    "key": (RECIPE + "{token}: 1\n", ()),
    "comment": (RECIPE + "# login with {token}\n", ()),
    "address": (RECIPE.replace("builtin:dit", "https://user:{token}@hub/model"), ()),
    "environment": (RECIPE + "device: ${HF_TOKEN}\n", ()),
    "environment in a name": (RECIPE.replace("out/dit", "out/${HF_TOKEN}"), ()),
    "set": (RECIPE, ("--set", "export.push.message={token}")),
    "set, its key": (RECIPE, ("--set", "{token}=1")),
    "push": (RECIPE, ("--push", "org/{token}")),
    "model": (RECIPE, ("--model", "{token}")),
    "output": (RECIPE, ("--output", "out/{token}")),
    "device": (RECIPE, ("--device", "{token}")),
    "option": (RECIPE, ("--{token}",)),
    "recipe": (RECIPE, ("{token}.yaml",)),
    "reproduce": (None, ("--reproduce", "{token}")),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("debug", [(), ("--debug",), ("--json",)])
def test_a_token_in_a_recipe_or_an_option(place, hub, name, debug):
    text, arguments = RECIPES[name]
    given = [argument.replace("{token}", hub.writer) for argument in arguments]
    recipe = place.job / "recipe.yaml"
    if text is not None:
        recipe.write_text(text.replace("{token}", hub.writer))
        given.insert(0, recipe.name)
    code, printed = place.run(place.environment(hub.writer), "run", *given, *debug)
    assert code in (2, 4), printed  # 4: a folder that is not there
    assert place.find(hub.writer, printed, but=[recipe]) == []
    assert hub.requests() == [] and not (place.job / "out").exists()


DEFECT = """
import logging, sys, threading, warnings
import compress.pipeline
from compress.cli.main import main
token = {token}
def run(loaded, *, progress, **options):
    progress.start(f"work with {{token}}", 3)
    progress.note(f"noted {{token}}")
    progress.warn(f"warned {{token}}")
    logging.getLogger("some.library").warning("logged %s", token)
    warnings.warn(f"warning with {{token}}")
    sys.stderr.write(f"written {{token}}\\n")
    print("printed", token)
    thread = threading.Thread(target=lambda: {{}}[token])
    thread.start()
    thread.join()
    try:
        raise ValueError(f"inner {{token}}")
    except ValueError as error:
        raise RuntimeError(f"outer {{token}}") from error
compress.pipeline.run = run
{ending}
"""


@pytest.mark.parametrize("token", ["", "of an unknown kind"])
@pytest.mark.parametrize("arguments", [(), ("--debug",), ("--json",), ("--quiet",)])
def test_a_defect_and_what_libraries_write(place, hub, token, arguments):
    """The token is in every exception and warning; each of them must have been there, without it."""
    token = f"{token} {secrets.token_hex(12)}".strip() if token else hub.writer
    program = DEFECT.format(token=repr(token), ending="main()")
    (place.job / ".compress").mkdir()
    script = place.root / "defect.py"
    script.write_text(program)
    code, printed = place.run(
        place.environment(token), "run", "recipe.yaml", *arguments, program=(str(script),)
    )
    assert code == 1, printed
    for word in (
        b"warned ***",
        b"logged ***",
        b"warning with ***",
        b"written ***",
        b"printed ***",
        b"outer ***",
    ):
        assert word in printed, word
    assert b"KeyError" in printed, "the thread's own traceback"
    (log,) = (place.job / ".compress" / "logs").iterdir()
    assert "inner ***" in log.read_text() and "outer ***" in log.read_text()
    assert place.find(token, printed, but=[script]) == []


def test_an_error_that_nobody_catches(place, hub):
    """After `main` has taken over the streams, also the interpreter's own last words pass it."""
    ending = (
        "from compress.cli._redaction import guard_streams\n"
        "guard_streams()\n"
        "raise SystemError('uncaught ' + token)\n"
    )
    script = place.root / "defect.py"
    script.write_text(DEFECT.format(token=repr(hub.writer), ending=ending))
    code, printed = place.run(place.environment(hub.writer), program=(str(script),))
    assert code == 1 and b"uncaught ***" in printed
    assert place.find(hub.writer, printed, but=[script]) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--json"),
        ("validate", "recipe.yaml", "--json"),
        ("plan", "recipe.yaml", "--json"),
        ("verify", "org/absent", "--debug"),
        ("inspect", "{token}", "--debug"),
        ("evaluate", "{token}", "--debug"),
        ("push", "{token}", "org/{token}", "--debug"),
        ("methods", "{token}"),
        ("{token}",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_commands(place, hub, arguments):
    given = [argument.replace("{token}", hub.writer) for argument in arguments]
    code, printed = place.run(place.environment(hub.writer), *given)
    assert code in (0, 2, 4, 7), printed
    assert printed and place.find(hub.writer, printed) == []


def test_files_for_the_pipeline_hold_no_token(place, hub):
    files = {name: str(place.root / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    (place.job / "recipe.yaml").write_text(RECIPE.replace(", push: org/dit", ""))
    variables = place.environment(hub.writer, **files)
    code, printed = place.run(variables, "run", "recipe.yaml", f"{hub.writer}.yaml")
    assert code == 2 and Path(files["GITHUB_STEP_SUMMARY"]).read_text().count("exit code 2") == 1
    assert place.find(hub.writer, printed) == []
