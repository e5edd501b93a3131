"""`compress verify`: folders, repositories, and figures that are measured again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
from compress.cli._errors import classify
from compress.pipeline import evaluate, run, verify
from compress.progress import SilentProgress
from compress.reproduction import ReproductionError


@pytest.fixture(scope="module")
def made(tiny_cache, tmp_path_factory):
    """Return `made(format)` -> (folder of the original, exported folder); each format once."""
    place = tmp_path_factory.mktemp("made")
    base = place / "tiny"
    found = {}

    def build(format="compress"):
        if not base.exists():
            shutil.copytree(tiny_cache("DiTTransformer2DModel", 0, "bfloat16", ()), base)
            (base / "README.md").write_text("---\nlicense: mit\n---\n")
            (base / "LICENSE").write_text("MIT\n")
        if format not in found:
            recipe = {
                "model": str(base),
                "stages": [{"rtn": {"weight_bits": 8, "activation_bits": 8, "weight_symmetric": True}}],
                "calibration": {"samples": 1, "steps": 1},
                "evaluate": {"fidelity": {"samples": 2, "steps": 2}, "layers": False},
                "require": {"sqnr_db": ">= 5", "size_ratio": "<= 1.2", "max_abs_error": "<= 0"},
                "export": {"path": str(place / format), "format": format},
            }
            run(recipe, work_dir=place / "work")
            found[format] = place / format
        return base, found[format]

    return build


@pytest.fixture
def exported(made, tmp_path):
    """A copy of the exported folder, to be damaged."""
    shutil.copytree(made()[1], tmp_path / "out")
    return tmp_path / "out"


def change_report(folder, change):
    report = json.loads((folder / "report.json").read_text())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))


def raise_sqnr(report, by):
    report["evaluation"]["metrics"]["sqnr_db"] += by
    report["gates"][0]["measured"] += by


def test_a_sound_folder(call, exported):
    result = call("verify", "out")
    assert result.code == 0, result.err
    assert result.out.startswith("checks\n")
    for name in ("report", "files", "gates", "tensors"):
        assert f"  {name} " in result.out
    assert result.out.endswith("out: verified\n")
    assert "3 hold by the recorded figures" in result.out
    document = call("verify", "out", "--json").json
    assert document["verified"] is True
    assert document["path"] == "out"
    assert [check["name"] for check in document["checks"]] == [
        "report", "files", "gates", "tensors", "recipe",
    ]  # fmt: skip


def test_the_licence_went_with_the_weights(exported):
    assert (exported / "LICENSE").read_text() == "MIT\n"
    assert "license: mit" in (exported / "README.md").read_text()
    report = json.loads((exported / "report.json").read_text())
    assert "LICENSE" in [row["name"] for row in report["export"]["files"]]
    assert report["model"]["license"] == "mit"


def test_damage_is_a_refusal_with_the_table(call, exported):
    (exported / "LICENSE").write_text("mine\n")
    result = call("verify", "out")
    assert result.code == 6
    assert "FAILED" in result.out
    assert "error: out: files: 'LICENSE' has" in result.err
    document = call("verify", "out", "--json")
    assert document.code == 6
    error = document.json["error"]
    assert error["kind"] == "FolderError"
    assert [check["name"] for check in error["checks"] if not check["ok"]] == ["files"]


def test_what_a_reproduction_found_is_in_the_error():
    row = {"name": "config.json", "expected": "a", "measured": None, "equal": False}
    result = {"folder": "out", "reproduced": False, "files": [row], "differences": ["seed: 5 then, 6 now"]}
    error = classify(ReproductionError(result), started=True).to_json()["error"]
    assert (error["files"], error["differences"]) == ([row], ["seed: 5 then, 6 now"])
    assert "folder" not in error


def test_a_recorded_gate_that_failed(call, exported):
    change_report(exported, lambda report: report["recipe"]["require"].update(sqnr_db=">= 200"))
    change_report(exported, lambda report: report["gates"][0].update(expected=">= 200", passed=False))
    result = call("verify", "out")
    assert result.code == 6
    assert "required >= 200" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing"], 4, "nothing: no such folder"),
        (["a/b/c"], 4, "a/b/c: no such folder"),
        (["out", "--revision", "v1"], 2, "it has no revision"),
        (["org/name@v1", "--revision", "v2"], 2, "names a revision already"),
        (["out", "--device", "cpu"], 2, "--against BASE"),
        (["org/name"], 7, "org/name"),  # offline, and not in the cache
        (["out", "--against", "nothing"], 4, "nothing: no such folder"),
    ],
)
def test_what_cannot_be_verified(call, exported, arguments, code, words):
    result = call("verify", *arguments)
    assert result.code == code, result.err
    assert words in result.err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda report: report["model"]["hashes"].clear(), 6, "base: the report records no SHA-256"),
        (lambda report: report["model"].update(hashes=["x"]), 4, "holds no recipe that this version"),
        (lambda report: report["model"].pop("id"), 4, "holds no recipe that this version"),
        (lambda report: report["export"].update(format=None), 4, "holds no recipe that this version"),
        (lambda report: report["recipe"].update(stages=[{"later_method": {}}]), 4, "later_method"),
        (lambda report: report["recipe"].update(seed="x"), 4, "holds no recipe that this version"),
    ],
)
def test_a_report_that_says_too_little_to_measure(call, made, exported, change, code, words):
    change_report(exported, change)
    result = call("verify", "out", "--against", str(made()[0]))
    assert result.code == code, result.err
    assert words in result.err


def test_figures_are_measured_again(call, made, exported):
    result = call("verify", "out", "--against", str(made()[0]), "--json")
    assert result.code == 0, result.err
    document = result.json
    names = [check["name"] for check in document["checks"]]
    assert names == [
        "report", "files", "gates", "tensors", "recipe", "base", "outputs", "figures", "gates now",
    ]  # fmt: skip
    assert all(check["ok"] for check in document["checks"])
    recorded = json.loads((exported / "report.json").read_text())["evaluation"]["metrics"]
    assert {row["metric"]: row["recorded"] for row in document["metrics"]} == recorded
    # The same machine and versions: to the last digit.
    assert {row["metric"]: row["measured"] for row in document["metrics"]} == recorded
    assert document["checks"][7]["detail"] == f"{len(recorded)} measured again, all equal"
    assert [row["passed"] for row in document["gates"]] == [True] * 3


@pytest.mark.slow
def test_evaluate_reads_the_recipe_of_the_report(made, exported):
    (exported / "recipe.yaml").write_text("model: ${NOT_TO_BE_READ}\n")
    document = evaluate(exported)
    recorded = json.loads((exported / "report.json").read_text())
    assert document["evaluation"]["metrics"]["sqnr_db"] == recorded["evaluation"]["metrics"]["sqnr_db"]
    assert document["gates"] == recorded["gates"]


def test_the_commands_on_the_card_work(call, made, monkeypatch):
    base, folder = made()
    monkeypatch.chdir(folder.parent)  # where the names on the card are those of the folders
    card = (folder / "README.md").read_text()
    commands = [line.split()[1:] for line in card.splitlines() if line.startswith("    compress verify ")]
    assert commands == [["verify", folder.name, "--against", base.name], ["verify", folder.name]]
    for arguments in commands:
        result = call(*arguments)
        assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchao", "dequantized"])
def test_figures_of_other_formats(call, made, format):
    base, folder = made(format)
    result = call("verify", str(folder), "--against", str(base), "--json")
    assert result.code == 0, result.err
    recorded = json.loads((folder / "report.json").read_text())["evaluation"]["metrics"]
    assert {row["metric"]: row["measured"] for row in result.json["metrics"]} == recorded


@pytest.mark.slow
def test_figures_that_the_folder_does_not_have(call, made, exported):
    change_report(exported, lambda report: raise_sqnr(report, 3.0))
    assert call("verify", "out").code == 0  # by itself, the report is consistent
    result = call("verify", "out", "--against", str(made()[0]))
    assert result.code == 6
    assert "figures: sqnr_db is" in result.err
    assert "torch" in result.err
    rows = [line for line in result.out.splitlines() if line.startswith("  sqnr_db ")]
    assert rows[0].endswith("FAILED")


@pytest.mark.slow
def test_a_gate_that_does_not_hold_by_the_figures_of_now(call, made, exported):
    recorded = json.loads((exported / "report.json").read_text())["evaluation"]["metrics"]["sqnr_db"]

    def tighten(report):
        raise_sqnr(report, 0.3)  # within what may differ
        gate = f">= {recorded + 0.2:.6g}"
        report["recipe"]["require"]["sqnr_db"] = report["gates"][0]["expected"] = gate
        text = exported / "recipe.yaml"  # must say the same
        text.write_text(json.dumps(report["recipe"]))
        for row in report["export"]["files"]:
            if row["name"] == text.name:
                row |= {
                    "bytes": text.stat().st_size,
                    "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
                }

    change_report(exported, tighten)
    result = call("verify", "out", "--against", str(made()[0]))
    assert result.code == 6
    assert "gates now: sqnr_db is" in result.err
    assert "figures: " not in result.err


@pytest.mark.slow
def test_another_original(call, make_tiny, exported):
    other = make_tiny(seed=1, dtype="bfloat16", name="other")
    result = call("verify", "out", "--against", str(other))
    assert result.code == 6
    assert "base: " in result.err
    assert "other weights than the folder was made from" in result.err
    assert "  base " in result.out
    assert "  figures " not in result.out


@pytest.mark.slow
def test_weights_that_fit_their_report_but_not_its_figures(call, made, exported):
    """Somebody changes a weight and writes its hash into the report."""
    from safetensors.torch import load_file, save_file

    path = exported / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("attn1.to_q.scale"))
    tensors[name] = tensors[name] * 3
    save_file(tensors, path, metadata={"format": "pt"})

    def rehash(report):
        for row in report["export"]["files"]:
            if row["name"] == path.name:
                row |= {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }

    change_report(exported, rehash)
    assert call("verify", "out").code == 0
    result = call("verify", "out", "--against", str(made()[0]))
    assert result.code == 6
    assert "figures: " in result.err


def compress(environment, folder, *arguments):
    command = [sys.executable, "-m", "compress", *arguments]
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.slow
def test_a_repository(hub, made, tmp_path):
    base, folder = made()
    files = files_of(folder)
    first = hub.create("org/name", {**files, ".gitattributes": b"* text\n"})
    online = hub.environment(tmp_path / "home", hub.reader)
    done = compress(online, tmp_path, "verify", "org/name", "--against", str(base), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["repo"], document["commit"], document["path"]) == (
        "org/name",
        first,
        f"org/name@{first}",
    )
    assert [row["difference"] for row in document["metrics"]] == [0.0] * len(document["metrics"])
    # Everything is in the cache now: it can be verified without a network.
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    assert compress(offline, tmp_path, "verify", f"org/name@{first}").returncode == 0
    assert hub.reader not in done.stdout + done.stderr


def test_the_library_is_heard_through_the_progress_alone(at_hub, exported, monkeypatch, capfd):
    import huggingface_hub

    at_hub.create("org/name", files_of(exported))
    fetch = huggingface_hub.snapshot_download

    def chatty(*arguments, **options):
        logging.getLogger("huggingface_hub").warning("a word of its own")
        return fetch(*arguments, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", chatty)
    notes = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "note", notes.append, raising=False)
    assert verify("org/name", progress=progress)["verified"]
    assert "Hub: a word of its own" in notes
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_an_original_on_the_hub(hub, made, tmp_path):
    """The card inherits from the repository, and the recorded commit is what is measured against."""
    base = made()[0]
    card = b"---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\n---\n"
    commit = hub.create("org/base", {**files_of(base), "README.md": card})
    hub_environment = hub.environment(tmp_path / "home", hub.reader)
    recipe = {
        "model": "org/base",
        "stages": [{"rtn": {}}],
        "calibration": {"samples": 1, "steps": 1},
        "evaluate": {"fidelity": {"samples": 1, "steps": 1}, "layers": False},
        "export": {"path": "out"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = compress(hub_environment, tmp_path, "run", "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert (model["base_model"], model["revision"], model["license"]) == ("org/base", commit, "other")
    text = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "license: other", "license_name: terms", "license_link: LICENSE", "base_model: org/base",
        "base_model_relation: quantized", f"| source | `org/base` at `{commit}` |",
        "    compress verify out --against org/base",
    ):  # fmt: skip
        assert f"\n{line}\n" in f"\n{text}", line
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT\n"
    hub.commit("org/base", {"diffusion_pytorch_model.safetensors": b"others"})
    done = compress(hub_environment, tmp_path, "verify", "out", "--against", "org/base")
    assert done.returncode == 0, done.stderr
    done = compress(hub_environment, tmp_path, "verify", "out", "--against", "org/base@main")
    assert done.returncode == 4, done.stderr


@pytest.mark.slow
def test_a_repository_that_was_changed(hub, made, tmp_path):
    files = files_of(made()[1])
    first = hub.create("org/name", files)
    environment = hub.environment(tmp_path / "home")
    second = hub.commit("org/name", {"pytorch_model.bin": b"pickle"})
    done = compress(environment, tmp_path, "verify", "org/name")
    assert done.returncode == 6, done.stderr
    assert f"org/name@{second}: files: 'pytorch_model.bin' is not in the report" in done.stderr
    assert not list((tmp_path / "home").rglob("pytorch_model.bin")), "it was fetched"
    third = hub.commit("org/name", {"config.json": files["config.json"] + b"\n"})
    done = compress(environment, tmp_path, "verify", f"org/name@{third}", "--json")
    assert done.returncode == 6
    assert "'config.json' has" in json.loads(done.stdout)["error"]["message"]
    assert compress(environment, tmp_path, "verify", "org/name", "--revision", first).returncode == 0


@pytest.mark.slow
def test_repositories_that_hold_nothing_of_ours(hub, tmp_path):
    hub.create("org/empty", {"README.md": b"# nothing\n"})
    hub.create("org/odd", {"report.json": b'{"export": 3}'})
    environment = hub.environment(tmp_path / "home")
    for name, code, words in [
        ("org/empty", 4, "holds no report.json"),
        ("org/odd", 4, "no readable export.files"),
        ("org/absent", 7, "org/absent"),
        ("org/empty@no-such-branch", 7, "revision"),
    ]:
        done = compress(environment, tmp_path, "verify", name)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_nothing_heavy_is_imported_for_the_records_alone(exported):
    code = (
        "import sys\nfrom compress.pipeline import verify\n"
        f"assert verify({str(exported)!r})['verified']\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
