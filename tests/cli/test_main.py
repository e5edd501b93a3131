"""The commands that need no model; names that do not exist; speed of the answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compress.cli._errors import classify
from compress.recipes.schema import json_schema

COMMANDS = [
    "run",
    "plan",
    "validate",
    "inspect",
    "evaluate",
    "verify",
    "push",
    "recipes",
    "methods",
    "schema",
    "doctor",
]


def test_help_lists_every_command(call):
    result = call("--help")
    assert result.code == 0
    assert [
        line.split()[0] for line in result.out.split("Commands:")[1].splitlines() if line.startswith("  ")
    ][: len(COMMANDS)] == COMMANDS
    assert "..." not in result.out.split("Commands:")[1], "a description is cut off"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(call, command):
    result = call(command, "--help")
    assert result.code == 0 and "--debug" in result.out


def test_examples_keep_their_lines(call):
    assert "\n    compress run dit_w4a8\n" in call("run", "--help").out


def test_no_command_is_a_usage_error(call):
    result = call()
    assert result.code == 2 and "Commands:" in result.out


def test_version(call):
    import compress

    assert call("--version").out == f"compress {compress.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["valdate", "x"], "compress: no such command 'valdate'", "did you mean 'validate'?"),
        (["run", "--sed", "3"], "compress run: no such option '--sed'", "did you mean '--seed'?"),
        (["run", "dit_w4a8", "--worc-dir", "x"], "no such option '--worc-dir'", "'--work-dir'"),
        (["run"], "Missing argument 'RECIPE'", "compress run --help"),
        (["run", "dit_w4a8", "--seed", "x"], "'--seed': not a valid integer", "compress run --help"),
        (["run", "dit_w4a"], "dit_w4a: no such recipe file", "did you mean 'dit_w4a8'?"),
        (["plan", "a.yaml"], "a.yaml: no such recipe file", "compress recipes"),
        (["run", "dit_w4a8", "dit_w8a8", "--push", "a/b"], "--push: 2 recipes are given", "export.push"),
        (["run", "dit_w4a8", "dit_w8a8", "--output", "x"], "--output: 2 recipes are given", "export.path"),
        (["run", "x", "--seed", "1", "--reproduce", "f"], "go together with x, --seed", "of the folder"),
        (["methods", "vidtq"], "no such method 'vidtq'", "'vidit_q'"),
        (
            ["validate", "dit_w4a8", "--set", "stages.0.vidit_q.weight_bits=5"],
            "--set stages.0.vidit_q.weight_bits=5: ",
            "",
        ),
    ],
)
def test_what_does_not_exist(call, arguments, message, hint):
    result = call(*arguments)
    assert result.code == 2 and result.out == ""
    assert message in result.err and hint in result.err
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    as_json = call(*arguments, "--json")
    assert as_json.code == 2
    assert as_json.json["error"]["exit_code"] == 2 and message in as_json.json["error"]["message"]


def test_validate(call):
    result = call("validate", "dit_w4a8")
    assert result.code == 0 and "valid (builtin:dit: vidit_q)" in result.out
    assert result.err == "next: compress plan dit_w4a8\n"
    document = call("validate", "dit_w4a8", "--seed", "7", "--json").json
    assert document["valid"] and document["recipe"]["seed"] == 7
    quiet = call("validate", "dit_w4a8", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_the_next_command_carries_the_options_over(call):
    result = call("validate", "dit_w4a8", "--set", "require.ssim=>= 0.5", "--seed", "3", "--model", "a b")
    expected = "compress plan dit_w4a8 --set 'require.ssim=>= 0.5' --model 'a b' --seed 3"
    assert result.err == f"next: {expected}\n"


@pytest.mark.parametrize("arguments", [["methods"], ["validate", "absent.yaml", "--json"]])
def test_a_closed_pipe_is_no_defect(tmp_path, arguments):
    script = f"import sys; sys.argv[1:] = {arguments}\nfrom compress.cli.main import main\nmain()"
    writer = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    writer.stdout.close()
    error = writer.stderr.read()
    writer.wait(timeout=30)
    assert all(word not in error for word in ("defect", "Traceback", "network", "BrokenPipe"))
    assert writer.returncode == 1


def test_a_broken_pipe_is_no_network_error():
    assert classify(BrokenPipeError(32, "Broken pipe"), started=False).kind != "Network"
    assert classify(ConnectionResetError("reset"), started=False).kind == "Network"


def test_validate_tells_the_place(call):
    Path("x.yaml").write_text("model: m\nstages:\n  - rtn: {weight_bits: 5}\nexport: {path: o}\n")
    result = call("validate", "x.yaml", "--json")
    error = result.json["error"]
    assert (result.code, error["kind"]) == (2, "RecipeError")
    assert (error["file"], error["line"], error["column"]) == ("x.yaml", 3, 24)
    assert error["message"] == "x.yaml:3:24: stages[0].rtn.weight_bits: 5 is not one of 2, 3, 4, 6, 8"
    assert sorted(path.name for path in Path().iterdir()) == ["x.yaml"], "nothing may be written"


def test_recipes(call):
    names = [item["name"] for item in call("recipes", "--json").json["recipes"]]
    assert "dit_w4a8" in names
    shown = call("recipes").out
    assert all(name in shown for name in names)


def test_methods(call):
    documents = {item["method"]: item for item in call("methods", "--json").json["methods"]}
    settings = {item["name"]: item for item in documents["vidit_q"]["settings"]}
    assert (
        settings["weight_bits"]["values"] == "2 | 3 | 4 | 6 | 8" and settings["weight_bits"]["default"] == 8
    )
    assert settings["low_rank"]["values"] == "whole number >= 0 <= 256"
    assert documents["rtn"]["phase"] == "quantize" and "dit" in documents["rtn"]["families"]
    shown = call("methods", "smoothquant").out
    assert "2211.10438" in shown and "act_exponent" in shown and "vidit_q" not in shown


def test_keys_inside_a_mapping_are_described_below_it(call):
    document = call("methods", "eep", "--json").json["methods"][0]
    settings = {row["name"]: row for row in document["settings"]}
    assert settings["fitness.new_tokens"]["default"] == 32
    assert settings["fitness.by"]["values"] == "exact_match | tokens | choices | loss"
    names = list(settings)
    assert names[names.index("fitness") + 1] == "fitness.by"
    shown = call("methods", "eep").out
    assert "splits.dev" in shown and "{'by'" not in shown


def test_schema(call):
    assert call("schema").json == json_schema()


def test_doctor(call):
    result = call("doctor", "--json")
    checks = {item["name"]: item for item in result.json["checks"]}
    assert result.code == 0 and result.json["healthy"]
    assert checks["integer matrix product (cpu)"]["detail"] == "exact"
    assert checks["torch"]["status"] == "ok"


def test_doctor_without_a_needed_package(call, monkeypatch):
    from compress.cli import doctor

    monkeypatch.setattr(doctor, "_REQUIRED", ("a-package-that-is-not-there",))
    result = call("doctor")
    assert result.code == 1 and "not installed" in result.out


# Generous bounds: the machines that run the tests are shared. `python -X importtime` shows the rest.
@pytest.mark.parametrize(("arguments", "seconds"), [(["--help"], 0.5), (["validate", "dit_w4a8"], 1.0)])
def test_quick_answers(arguments, seconds, tmp_path):
    program = (
        "import sys, json\nfrom compress.cli.main import invoke\nfrom compress.cli._output import Output\n"
        f"code = invoke({arguments!r}, Output())\n"
        "print('\\n' + json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    best, last = 99.0, ""
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        best, last = min(best, time.monotonic() - start), done.stdout.splitlines()[-1]
    code, modules = json.loads(last)
    assert code == 0
    heavy = {"torch", "diffusers", "transformers", "numpy", "scipy", "huggingface_hub", "safetensors"}
    assert not heavy & set(modules)
    assert best <= 2 * seconds, f"{best:.2f} s"


@pytest.mark.parametrize("module", ["loader", "schema", "patterns", "gates", "shipped", "stages"])
def test_recipes_need_no_torch(module):
    heavy = "{'torch', 'diffusers', 'transformers'}"
    program = f"import sys, compress.recipes.{module}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
