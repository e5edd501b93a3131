"""`action.yml` does what it says, its scripts are safe, and `docs/ci.md` shows what exists."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from compress.cli.main import build
from ruamel.yaml import YAML

RECIPE = """\
model: {model}
calibration: {{samples: 1, steps: 2}}
stages: [rtn: {{weight_bits: 8}}]
evaluate: {{fidelity: {{samples: 1, steps: 2}}}}
require: {{size_ratio: "{gate}"}}
export: {{path: out/tiny}}
"""
# Each would leave a file named `touched`, were any part of it executed or expanded.
HOSTILE = [
    '"; touch touched; "',
    "$(touch touched)",
    "`touch touched`",
    "a b\ttouch touched",
    "x\n; touch touched",
    "'; touch touched #",
    "${PATH:+$(touch touched)}",
    "--help",
    "--debug=$(touch touched)",
    "*",
]


def _yaml(text):
    return YAML(typ="safe", pure=True).load(io.StringIO(text))


@pytest.fixture(scope="module")
def action(repository):
    return _yaml((repository / "action.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "ci.md").read_text(encoding="utf-8")


def _step(action, name):
    (found,) = [step for step in action["runs"]["steps"] if step["name"] == name]
    return found


def _evaluate(template, inputs):
    """Put inputs into an `env` value, as the service does before it starts the shell."""
    return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: inputs[found[1]], str(template))


@pytest.fixture
def perform(action, tmp_path):
    """Return `perform(step, **inputs)`: execute a step's script as a runner does, in an empty folder."""
    for name in ("home", "runner", "here"):
        (tmp_path / name).mkdir()

    def run(name, *, environment=None, **changed):
        step = _step(action, name)
        inputs = {key: str(value.get("default", "")) for key, value in action["inputs"].items()}
        inputs |= {key.replace("_", "-"): value for key, value in changed.items()}
        script = tmp_path / "script.sh"
        script.write_text(step["run"], encoding="utf-8")
        variables = {
            **{key: os.environ[key] for key in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")},
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(tmp_path / "home"),
            "RUNNER_TEMP": str(tmp_path / "runner"),
            **{f"GITHUB_{key}": str(tmp_path / key) for key in ("OUTPUT", "STEP_SUMMARY", "PATH")},
            **{key: _evaluate(value, inputs) for key, value in step["env"].items()},
            **(environment or {}),
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        return subprocess.run(
            command, cwd=tmp_path / "here", env=variables, capture_output=True, text=True, timeout=300
        )

    return run


def _outputs(tmp_path):
    lines = (tmp_path / "OUTPUT").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_every_input_is_told_and_used(action):
    text = json.dumps(action["runs"])
    for name, described in action["inputs"].items():
        assert described["description"]
        assert f"inputs.{name}" in text, f"nothing uses the input {name}"
    used = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert used <= set(action["inputs"])


def test_no_expression_stands_in_a_script(action):
    scripts = [step["run"] for step in action["runs"]["steps"] if "run" in step]
    assert len(scripts) == 3
    assert not [script for script in scripts if "${{" in script]


def test_no_token_is_an_input_and_the_installation_sees_none(action):
    assert not [name for name in action["inputs"] if "token" in name]
    assert _step(action, "Install compress")["env"]["HF_TOKEN"] == ""


def test_the_cache_is_saved_after_a_failure_under_the_key_that_is_restored(action):
    restore = _step(action, "Restore the work directory")
    save = _step(action, "Save the work directory")
    assert save["if"].startswith("always()") and save["with"]["key"] == restore["with"]["key"]
    assert restore["with"]["key"].startswith(restore["with"]["restore-keys"].strip())


@pytest.mark.slow
def test_a_run_in_the_action(action, perform, tiny_dit, tmp_path):
    (tmp_path / "here" / "my recipe.yaml").write_text(RECIPE.format(model=tiny_dit, gate="<= 1"))
    done = perform(
        "Run the recipes", recipes="my recipe.yaml\n", set="seed=3\n\nstages.0.rtn.weight_bits=6\n"
    )
    assert done.returncode == 0, done.stderr
    outputs = _outputs(tmp_path)
    given = set(action["outputs"])
    assert given == set(outputs), "what action.yml passes on is what the command gives"
    for name, described in action["outputs"].items():
        assert described["value"] == f"${{{{ steps.run.outputs.{name} }}}}"
    assert (outputs["exit_code"], outputs["verified"], outputs["gates_passed"]) == ("0", "true", "true")
    report = json.loads((tmp_path / "here" / outputs["report"]).read_text())
    assert report["recipe"]["seed"] == 3 and report["recipe"]["stages"] == [
        {"rtn": {**report["recipe"]["stages"][0]["rtn"], "weight_bits": 6}}
    ]
    assert float(outputs["size_ratio"]) == report["evaluation"]["metrics"]["size_ratio"]
    assert "## compress: my recipe" in (tmp_path / "STEP_SUMMARY").read_text()
    assert (tmp_path / "here" / ".compress" / "stages").is_dir()


@pytest.mark.slow
def test_a_failing_gate_in_the_action_keeps_its_code(perform, tiny_dit, tmp_path):
    (tmp_path / "here" / "x.yaml").write_text(RECIPE.format(model=tiny_dit, gate=">= 2"))
    done = perform("Run the recipes", recipes="x.yaml", work_dir="kept here")
    assert done.returncode == 6, done.stderr
    outputs = _outputs(tmp_path)
    assert outputs["exit_code"] == "6" and outputs["gates_passed"] == "false"
    assert outputs["path"] == "out/tiny.rejected"
    assert "was REJECTED" in (tmp_path / "STEP_SUMMARY").read_text()
    assert (tmp_path / "here" / "kept here" / "events.jsonl").is_file()


@pytest.mark.slow
def test_two_recipes_in_the_action(perform, tiny_dit, tmp_path):
    """The first is refused by its gate; the second is carried out all the same."""
    for name, gate in (("first", ">= 2"), ("second", "<= 1")):
        text = RECIPE.format(model=tiny_dit, gate=gate).replace("out/tiny", f"out/{name}")
        (tmp_path / "here" / f"{name}.yaml").write_text(text)
    done = perform("Run the recipes", recipes="first.yaml\nsecond.yaml")
    assert done.returncode == 6, done.stderr
    outputs = _outputs(tmp_path)
    assert (outputs["exit_code"], outputs["gates_passed"], outputs["verified"]) == ("6", "false", "true")
    first, second = json.loads(outputs["results"])
    assert (first["recipe"], first["path"], first["gates_passed"]) == (
        "first.yaml", "out/first.rejected", False,
    )  # fmt: skip
    assert (second["recipe"], second["path"], second["gates_passed"]) == ("second.yaml", "out/second", True)
    for row in (first, second):
        report = json.loads((tmp_path / "here" / row["report"]).read_text())
        assert report["evaluation"]["metrics"]["size_ratio"] == row["size_ratio"]
    summary = (tmp_path / "STEP_SUMMARY").read_text()
    assert "first was REJECTED" in summary and "| second.yaml | done | out/second |" in summary


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_input_is_text(perform, tmp_path, text):
    names = ("recipes", "set", "push", "model", "strict", "work_dir")
    done = perform("Run the recipes", **dict.fromkeys(names, text))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert "Usage:" not in done.stdout, "an input was taken for an option"
    assert list((tmp_path / "here").iterdir()) == []
    assert _outputs(tmp_path)["exit_code"] == "2"


@pytest.mark.parametrize("name", ["set", "push", "model", "work_dir"])
@pytest.mark.parametrize("text", ["--help", "-h", "--debug"])
def test_no_input_becomes_an_option(perform, name, text):
    done = perform("Run the recipes", recipes="absent.yaml", **{name: text})
    assert (done.returncode, done.stdout) == (2, "")
    assert "absent.yaml: no such recipe file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["strict", "cache"])
@pytest.mark.parametrize("text", ["", "True", "yes", "1", "on", " true", *HOSTILE])
def test_a_switch_is_true_or_false(perform, tmp_path, name, text):
    done = perform("Check the inputs", **{name: text})
    assert (done.returncode, done.stderr) == (2, "")
    (line,) = done.stdout.splitlines()  # a second one could be another workflow command
    assert line.startswith(f"::error title=compress::the input {name} is ") and '"true" or "false"' in line
    assert list((tmp_path / "here").iterdir()) == []


def test_the_switches_are_looked_at_first(action, perform):
    assert action["runs"]["steps"][0]["name"] == "Check the inputs"
    switches = {
        name for name, described in action["inputs"].items() if described.get("default") in ("true", "false")
    }
    assert switches == {"strict", "cache"}
    for text in ("true", "false"):
        done = perform("Check the inputs", **dict.fromkeys(switches, text))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_recipe_is_a_usage_error(perform, tmp_path):
    assert perform("Run the recipes", recipes="\n \n").returncode == 2
    assert _outputs(tmp_path)["exit_code"] == "2"


@pytest.mark.slow
def test_the_installation_in_the_action(perform, repository, tracked_files, tmp_path):
    """Install from a copy of the checkout; what it depends on is found without a network."""
    import shutil
    import sysconfig

    copy = tmp_path / "action copy"
    for path in tracked_files:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / path, copy / path)
    environment = {
        "GITHUB_ACTION_PATH": str(copy),
        "PYTHONPATH": sysconfig.get_paths()["purelib"],  # no .pth file is read there, so no other compress
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "false",  # that is: switched off
    }
    done = perform("Install compress", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path((tmp_path / "PATH").read_text().strip())
    assert [path.name for path in folder.iterdir()] == ["compress"], "python and pip stay the workflow's own"
    told = subprocess.run(
        [folder / "compress", "--version"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": environment["PYTHONPATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip()
    python = (folder / "compress").resolve().parent / "python"
    program = "import compress; print(compress.__file__)"
    found = subprocess.run(
        [python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(python.parent.parent)


def _blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_pipelines_in_the_page_are_yaml(page, action):
    recipe, github, gitlab = (_yaml(block) for block in _blocks(page, "yaml"))
    assert recipe["require"] and recipe["export"]["path"] == "out/dit-w8a8"
    (step,) = [step for step in github["jobs"]["checkpoint"]["steps"] if step.get("id") == "compress"]
    assert set(step["with"]) <= set(action["inputs"])
    used = set(re.findall(r"steps\.compress\.outputs\.(\w+)", json.dumps(github)))
    assert used and used <= set(action["outputs"])
    assert {gitlab[name]["stage"] for name in ("build", "publish")} == set(gitlab["stages"])


def test_the_recipe_in_the_page_can_be_planned(page, tmp_path):
    import compress

    (tmp_path / "release.yaml").write_text(_blocks(page, "yaml")[0], encoding="utf-8")
    plan = compress.plan(tmp_path / "release.yaml")  # refuses gates on size that are out of reach
    assert plan["recipe"]["require"]


def test_the_page_names_every_input_and_output(page, action):
    rows = re.findall(r"^\| (`.*?`) \|", page, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert named == set(action["inputs"]) | set(action["outputs"])


def test_the_page_names_the_exit_codes(page, repository):
    def codes(text):
        return set(re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE))

    assert codes(page) == codes((repository / "README.md").read_text(encoding="utf-8"))


def _command_lines(text):
    """Return the command lines of a page: of its blocks, and those in a sentence that have arguments."""
    lines = re.findall(r"^[ $-]*(compress [a-z].*)$", text, flags=re.MULTILINE)
    return [shlex.split(line.split(" > ")[0], comments=True) for line in lines] + [
        shlex.split(line) for line in re.findall(r"`(compress [a-z][^`]*)`", text)
    ]


@pytest.mark.parametrize("name", ["docs/ci.md", "README.md"])
def test_every_command_line_parses(repository, name):
    command = typer.main.get_command(build())
    lines = _command_lines((repository / name).read_text(encoding="utf-8"))
    assert len(lines) > 4
    for _, verb, *arguments in lines:
        assert verb in command.commands, f"{name}: there is no command {verb}"
        # A verb without its arguments, as a sentence names it, is no complete command line.
        incomplete = not arguments
        command.commands[verb].make_context(verb, arguments, resilient_parsing=incomplete)
