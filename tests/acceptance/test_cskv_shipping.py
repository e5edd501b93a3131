"""A compressed cache on its way to a user: adapter, checkpoint, code of its own; by command line and Hub."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compress
import pytest
import torch
from compress.cli._output import Output
from compress.cli.main import invoke
from compress.exporters.inspection import inspect
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

STORIES = Path(compress.__file__).parent / "models" / "builtin" / "stories"
RECIPE = """\
model: {model}
calibration: {{samples: 8, length: 128{text}}}
stages:
  - cskv: {{removed: {{k: 0.75, v: 0.5}}, window: 8, bits: 4, key_group: 16}}
evaluate: {{fidelity: {{samples: 2}}, decoding: null}}
export:{exports}
"""
EXPORTS = """
  - {path: out/adapter}
  - {path: out/checkpoint, kv_cache: checkpoint}
  - {path: out/custom, kv_cache: custom}
"""
IDS = torch.arange(3, 43).reshape(2, 20)
# Of a user who has transformers and not this package.
STOCK = """
import sys
sys.modules["compress"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
folder, ids, target, trust = sys.argv[1:]
ids = load_file(ids)["ids"]
module, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=trust == "trust", output_loading_info=True
)
unexpected = sorted(info.pop("unexpected_keys"))
assert not any(info.values()), info
with torch.no_grad():
    logits = module(ids).logits
text = module.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)
save_file({"logits": logits, "text": text}, target, {"unexpected": " ".join(unexpected)})
"""
LOAD = """
import sys
import compress
from safetensors.torch import load_file, save_file
name, ids, target, *base = sys.argv[1:]
module = compress.load(name, **({"base": base[0]} if base else {}))
text = module.generate(load_file(ids)["ids"], max_new_tokens=40, min_new_tokens=40, do_sample=False)
save_file({"text": text}, target)
"""


def _json(*arguments: str) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    assert invoke([*arguments, "--json"], Output(out, err)) == 0, err.getvalue()
    return json.loads(out.getvalue())


def _text(module: Any, **options: Any) -> torch.Tensor:
    return module.generate(IDS, max_new_tokens=40, min_new_tokens=40, do_sample=False, **options)


def _start(place: Path, program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start a process of its own in `place`."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules"), **variables}
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipping")
    (folder / "recipe.yaml").write_text(RECIPE.format(model="builtin:stories", text="", exports=EXPORTS))
    save_file({"ids": IDS}, folder / "ids")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        planned = _json("plan", "recipe.yaml")
        (folder / "plan.json").write_text(json.dumps(planned))
        _json("run", "recipe.yaml")
    return folder


def _report(folder: Path, form: str) -> dict[str, Any]:
    return json.loads((folder / "out" / form / "report.json").read_text())


def test_every_form_is_verified_and_as_large_as_planned(folder: Path) -> None:
    planned = json.loads((folder / "plan.json").read_text())["export"]
    assert [row["kv_cache"] for row in planned] == ["adapter", "checkpoint", "custom"]
    for row, form in zip(planned, ("adapter", "checkpoint", "custom"), strict=True):
        report = _report(folder, form)
        export, metrics = report["export"], report["evaluation"]["metrics"]
        assert export["verified"] and export["max_abs_error"] == 0.0
        assert (export["kv_cache"], export["bytes"]) == (form, row["bytes"])
        factors = report["stages"][0]["details"]["kv_cache"]["factor_bytes"]
        assert metrics["bytes"] == report["model"]["bytes"] + factors
        assert metrics["size_ratio"] == metrics["bytes"] / report["model"]["bytes"]
    weights = folder / "out" / "adapter" / "cskv.safetensors"
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(weights).values())
    assert stored == _report(folder, "adapter")["stages"][0]["details"]["kv_cache"]["factor_bytes"]
    names = {path.name for path in (folder / "out" / "adapter").iterdir()}
    assert {"cskv.json", "cskv.safetensors", "README.md", "report.json", "recipe.yaml", "LICENSE"} <= names
    assert not {"config.json", "model.safetensors", "compress.json"} & names
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "adapter", local_files_only=True)
    stock = AutoTokenizer.from_pretrained(STORIES, local_files_only=True)
    assert tokenizer("Once upon a time").input_ids == stock("Once upon a time").input_ids


def test_all_forms_write_the_same_text_and_it_is_not_the_plain_one(folder: Path) -> None:
    adapter = compress.load(folder / "out" / "adapter")
    expected = _text(adapter)
    for form in ("checkpoint", "custom"):
        assert torch.equal(_text(compress.load(folder / "out" / form)), expected), form
    original = compress.load(STORIES)
    assert not torch.equal(expected, _text(original))
    from transformers import DynamicCache

    assert torch.equal(_text(adapter, past_key_values=DynamicCache()), _text(original))


@pytest.mark.parametrize("form", ["checkpoint", "custom"])
def test_transformers_alone_opens_it(folder: Path, tmp_path: Path, form: str) -> None:
    arguments = (str(folder / "out" / form), str(folder / "ids"), str(tmp_path / "found"))
    done = _start(tmp_path, STOCK, *arguments, "trust" if form == "custom" else "")
    assert done.returncode == 0, done.stderr
    original = compress.load(STORIES)
    factors = set(load_file(folder / "out" / "adapter" / "cskv.safetensors"))
    with safe_open(tmp_path / "found", "pt") as file:
        with torch.no_grad():
            assert torch.equal(file.get_tensor("logits"), original(IDS).logits)
        unexpected = set(file.metadata()["unexpected"].split())
        text = file.get_tensor("text")
    if form == "checkpoint":
        assert unexpected == factors and torch.equal(text, _text(original))
    else:
        assert not unexpected and torch.equal(text, _text(compress.load(folder / "out" / "adapter")))
        done = _start(tmp_path, STOCK, *arguments, "")
        assert done.returncode != 0 and "trust_remote_code" in done.stderr


@pytest.mark.parametrize("form", ["adapter", "custom"])
def test_the_commands_take_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(folder)
    checked = _json("verify", f"out/{form}", "--against", "builtin:stories")
    assert checked["verified"] and all(row["agrees"] for row in checked["metrics"])
    again = _json("run", "--reproduce", f"out/{form}")
    assert again["reproduced"] and {row["name"] for row in again["files"]} >= {"README.md"}
    found = _json("inspect", f"out/{form}")
    assert [row["method"] for row in found["history"]] == ["cskv"]
    assert found["kv_cache"]["bits"] == 4 and found["kv_cache"]["window"] == 8
    assert json.dumps(_report(folder, form)["evaluation"]["metrics"]["kl"]) in json.dumps(
        _json("evaluate", f"out/{form}")
    )


def _corrupted(folder: Path, place: Path) -> Path:
    copy = shutil.copytree(folder / "out" / "adapter", place / "copy")
    data = bytearray((copy / "cskv.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "cskv.safetensors").write_bytes(data)
    return copy


def test_a_changed_or_truncated_adapter_does_not_verify(folder: Path, tmp_path: Path) -> None:
    copy = _corrupted(folder, tmp_path)
    out, err = io.StringIO(), io.StringIO()
    assert invoke(["verify", str(copy)], Output(out, err)) == 6
    assert "cskv.safetensors" in err.getvalue() and "SHA-256" in err.getvalue()
    path = copy / "cskv.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert invoke(["verify", str(copy)], Output(out, err)) == 6
    assert "truncated" in err.getvalue()


def test_an_adapter_goes_through_the_hub(folder: Path, at_hub: Any, tmp_path: Path) -> None:
    """Original and adapter are repositories; whoever names the adapter gets both, each in one commit."""
    hub, variables = at_hub, at_hub.environment(tmp_path / "home")
    api = HfApi(endpoint=hub.endpoint, token=hub.writer)
    api.create_repo("org/stories")
    base = api.upload_folder(
        repo_id="org/stories", folder_path=STORIES, ignore_patterns=["calibration.jsonl"]
    )
    (tmp_path / "job").mkdir()
    exports = " {path: out, push: {repo: org/stories-cskv}}"
    text = f", text: {STORIES / 'calibration.jsonl'}"
    recipe = RECIPE.format(model="org/stories", text=text, exports=exports)
    (tmp_path / "job" / "recipe.yaml").write_text(recipe)
    command = [sys.executable, "-m", "compress", "run", "recipe.yaml", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path / "job", env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    push = json.loads(done.stdout)["export"]["push"]
    assert push["verified"] and not push["notes"]
    document = json.loads(hub.read("org/stories-cskv", "cskv.json"))
    assert (document["base"]["id"], document["base"]["revision"]) == ("org/stories", base.oid)
    card = hub.read("org/stories-cskv", "README.md").decode()
    for line in ("base_model: org/stories", "base_model_relation: adapter", "library_name: compress"):
        assert line in card.split("---")[1].splitlines()
    assert 'compress.load("org/stories-cskv")' in card
    # The original goes on; the adapter stays with the commit that it was made for.
    (tmp_path / "config.json").write_text("{}")
    api.upload_file(
        path_or_fileobj=tmp_path / "config.json", path_in_repo="config.json", repo_id="org/stories"
    )
    reader = hub.environment(tmp_path / "another home", hub.reader)
    target = tmp_path / "text"
    done = _start(tmp_path, LOAD, "org/stories-cskv", str(folder / "ids"), str(target), **reader)
    assert done.returncode == 0, done.stderr
    assert torch.equal(
        load_file(target)["text"], _text(compress.load(tmp_path / "job" / "out", base=STORIES))
    )
    named = compress.load("org/stories-cskv", base=f"org/stories@{base.oid}")
    assert torch.equal(load_file(target)["text"], _text(named))
    assert inspect("org/stories-cskv")["base"]["revision"] == base.oid
    for verb in (["verify"], ["verify", "--against", f"org/stories@{base.oid}"]):
        command = [sys.executable, "-m", "compress", verb[0], "org/stories-cskv", *verb[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=reader, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
