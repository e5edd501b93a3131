"""A free router through the command line: planned, run, verified, evaluated; opened by code of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compress.cli._output import Output
from compress.cli.main import invoke
from compress.exporters.custom_code import NAMES
from compress.runtime.mapped_routing import KEY

from ..tiny_items import make_asked_moe

pytestmark = pytest.mark.slow

RECIPE = """
model: model
stages:
  - eep:
      keep_experts: 4
      init_random: 6
      prune_evals: 20
      total_evals: 60
      random_draws: 0
      groups: 1
      mut_sigma: 0.5
      mut_entry: 1.0
      norm_prob: 0.0
      router: free
      export: custom
      fitness: {by: tokens}
      splits: {train: 20, test: 20}
evaluate:
  fidelity: null
  answers: {}
export: {path: out}
"""
OPENED = """
import json, sys
from transformers import AutoModelForCausalLM
module, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert "compress" not in sys.modules and not any(info.values()), info
print(json.dumps([type(module).__name__, sum(value.numel() for value in module.parameters())]))
"""


def _json(*arguments: str) -> dict:
    out, err = io.StringIO(), io.StringIO()
    assert invoke([*arguments, "--json"], Output(out, err)) == 0, err.getvalue()
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("custom")
    make_asked_moe(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        planned = _json("plan", "recipe.yaml")
        _json("run", "recipe.yaml")
        (folder / "plan.json").write_text(json.dumps(planned))
    return folder


def test_it_is_verified_by_our_loader_and_reported_as_planned(folder: Path) -> None:
    report = json.loads((folder / "out" / "report.json").read_text())
    export, details = report["export"], report["stages"][0]["details"]
    assert details["router"] == "free" and export["verified"] and export["max_abs_error"] == 0.0
    assert set(NAMES) < {row["name"] for row in export["files"]}
    assert any("trust_remote_code=True" in way for way in export["loads_with"])
    planned = json.loads((folder / "plan.json").read_text())["stages"][0]["after"]
    after = report["stages"][0]["after"]
    assert {key: after[key] for key in ("parameters", "bytes", "macs")} == {
        key: planned[key] for key in ("parameters", "bytes", "macs")
    }
    card = (folder / "out" / "README.md").read_text()
    assert "which runs the code that lies beside the weights; read it first" in card
    assert "The code beside the weights was not run." in card


def test_the_commands_read_it_and_run_none_of_its_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert _json("verify", "out", "--against", "model")["verified"]
    copy = tmp_path / "copy"
    shutil.copytree(folder / "out", copy)
    for name in NAMES:
        (copy / name).write_text("raise SystemExit('the code was run')\n")
    found = _json("inspect", str(copy))
    report = json.loads((folder / "out" / "report.json").read_text())
    assert found["parameters"] == report["stages"][0]["after"]["parameters"]
    assert found["experts"]["kept"] == 4 and found["experts"]["of"] == 6
    measured = _json("evaluate", str(copy))
    recorded = report["evaluation"]["metrics"]["answers"]
    assert json.dumps(recorded) in json.dumps(measured)


def test_a_second_run_goes_on_with_the_finished_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    again = _json("run", "recipe.yaml", "--output", "again")
    assert again["stages"][0]["resumed"]
    for name in ("model.safetensors", "config.json", *NAMES):
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_transformers_opens_it_where_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", OPENED, str(folder / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out" / "report.json").read_text())
    parameters = report["stages"][0]["after"]["parameters_stored"]
    assert json.loads(done.stdout.splitlines()[-1]) == ["EepMixtralForCausalLM", parameters]
    assert json.loads((folder / "out" / "config.json").read_text())[KEY] == 6
