"""A fresh process gives the outputs of the model in memory, whatever the format; damage is found."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from compress.exporters import fresh_process
from compress.exporters.formats import as_shipped, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.verify import FolderError, verify_folder
from compress.progress import SilentProgress


@pytest.fixture
def exported(make_tiny, open_quantized, schemes, tmp_path):
    def build(name, format, dtype="bfloat16"):
        model = open_quantized(make_tiny(dtype=dtype), schemes[name])
        out = tmp_path / "out"
        out.mkdir()
        write(model, out, format)
        return model, out

    return build


def add_report(folder):
    files = [
        {
            "name": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    report = {
        "recipe": {"require": {"size_ratio": "<= 0.4", "sqnr_db": ">= 12"}},
        "evaluation": {"metrics": {"sqnr_db": 21.5, "size_ratio": 0.25, "bytes": 4}},
        "gates": [
            {"metric": "size_ratio", "expected": "<= 0.4", "measured": 0.25, "passed": True},
            {"metric": "sqnr_db", "expected": ">= 12", "measured": 21.5, "passed": True},
        ],
        "export": {"files": files},
    }
    (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("mixed", "compress"),
        pytest.param("none", "compress", marks=pytest.mark.slow),
        pytest.param("torchao", "torchao", marks=pytest.mark.slow),
        pytest.param("mixed", "dequantized", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_gives_equal_bits(exported, name, format):
    model, out = exported(name, format)
    verification = verify_export(model, out, seed=3, progress=SilentProgress())
    assert verification.verified
    assert verification.executed
    assert verification.failure is None
    assert verification.max_abs_error == 0.0
    assert len(verification.ways) == 2 == len(verification.loads_with)
    if format in ("torchao", "dequantized"):
        assert verification.runtime_sqnr_db > 20
        assert f"{verification.runtime_sqnr_db:.1f} dB from those of our integer" in verification.notes[0]
    else:
        assert verification.runtime_sqnr_db is None
        assert verification.notes == ()


def test_the_shipped_model_is_not_made_twice(exported, monkeypatch, outputs_of):
    model, out = exported("w4a8", "dequantized")
    shipped = as_shipped(model, "dequantized")
    monkeypatch.setattr(fresh_process, "as_shipped", lambda model, format: pytest.fail("made again"))
    answer = fresh_process.Answer(dict.fromkeys(["stock", "compress"], outputs_of(shipped.module)), {}, [])
    monkeypatch.setattr(fresh_process, "ask_fresh_process", lambda request, inputs: answer)
    verification = verify_export(model, out, seed=0, progress=SilentProgress(), shipped=shipped)
    assert verification.verified


@pytest.mark.slow
def test_a_changed_weight_is_found(exported):
    model, out = exported("w4a8", "compress")
    layer = model.module.get_submodule("transformer_blocks.0.attn1.to_q")
    layer.scale *= 2
    layer._forget()
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert verification.executed
    assert verification.max_abs_error > 0
    assert set(verification.ways) == {"registered", "compress"}
    for way in verification.ways:
        assert f"loaded the '{way}' way in a fresh process, the outputs differ" in verification.failure
    assert verification.notes == (verification.failure,)


def test_a_way_that_does_not_load_is_found(exported, monkeypatch, tmp_path):
    model, out = exported("w4a8", "compress")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "diffusers.py").write_text(f"raise RuntimeError('no such file: {out}/absent')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert not verification.executed
    assert verification.max_abs_error is None
    assert verification.ways == {"registered": None, "compress": None}
    for way in verification.ways:
        assert f"does not load the '{way}' way in a fresh process" in verification.failure
    assert "RuntimeError: no such file: absent" in verification.failure


def test_a_changed_config_is_found(exported):
    model, out = exported("w4a8", "compress")
    config = json.loads((out / "config.json").read_text())
    config["norm_type"] = "nonsense"
    (out / "config.json").write_text(json.dumps(config))
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert not verification.executed
    assert verification.max_abs_error is None
    assert "nonsense" in verification.failure


def test_one_way_that_fails_does_not_hide_the_other(exported, monkeypatch):
    model, out = exported("w4a8", "compress")
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    expected = fresh_process._run(model.module, inputs, None, model.family.compared)
    answer = fresh_process.Answer({"compress": expected}, {"registered": "OSError: no"}, [])
    monkeypatch.setattr(fresh_process, "ask_fresh_process", lambda request, inputs: answer)
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert verification.ways == {"registered": None, "compress": 0.0}
    assert verification.max_abs_error is None
    assert verification.failure == "does not load the 'registered' way in a fresh process: OSError: no"


def test_a_damaged_folder_is_a_result(exported):
    model, out = exported("w4a8", "compress")
    truncate(out)
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert verification.max_abs_error is None
    assert "does not open" in verification.failure
    assert "diffusion_pytorch_model.safetensors" in verification.failure
    assert str(out) not in verification.failure


def test_a_process_that_dies_is_a_result(exported, monkeypatch):
    model, out = exported("w4a8", "compress")
    monkeypatch.setattr(fresh_process, "_WORKER", out / "absent.py")
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert verification.max_abs_error is None
    assert "the process ended with 2" in verification.failure


def test_the_process_gets_no_token_but_the_cache(exported, monkeypatch, tmp_path):
    model, out = exported("w4a8", "compress")
    worker = tmp_path / "worker.py"
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GH_TOKEN", "HF_HOME", "HF_HUB_OFFLINE")
    worker.write_text(f"import os; raise SystemExit(' '.join(n for n in {names} if n in os.environ))")
    monkeypatch.setattr(fresh_process, "_WORKER", worker)
    for name in names:
        monkeypatch.setenv(name, "x")
    failure = verify_export(model, out, seed=0, progress=SilentProgress()).failure
    assert "the process ended with 1: HF_HOME HF_HUB_OFFLINE" in failure


@pytest.mark.parametrize("damage", ["shape", "nan"])
def test_outputs_without_a_finite_difference_are_a_failure(exported, monkeypatch, damage):
    model, out = exported("w4a8", "compress")

    def answer(request, inputs):
        output = torch.zeros(1) if damage == "shape" else torch.full((2, 8, 8, 8), float("nan"))
        return fresh_process.Answer(dict.fromkeys(request["ways"], output), {}, [])

    monkeypatch.setattr(fresh_process, "ask_fresh_process", answer)
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert verification.max_abs_error is None
    assert "not finite" in verification.failure


def test_records_of_a_sound_folder(exported):
    _, out = exported("mixed", "compress")
    add_report(out)
    result = verify_folder(out)
    assert result["verified"]
    assert [check["name"] for check in result["checks"]] == ["report", "files", "gates", "tensors", "recipe"]
    assert all(check["ok"] for check in result["checks"])


def flip_a_byte(out):
    path = out / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(out):
    path = out / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def add_files(out):
    (out / "more").mkdir()
    (out / "more/pytorch_model.bin").write_bytes(b"x")
    (out / "zero").symlink_to(out / "more")


def leave_the_folder(out):
    report = json.loads((out / "report.json").read_text())
    report["export"]["files"][0]["name"] = "../x"
    (out / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("damage", "failed", "words"),
    [
        (flip_a_byte, ["files"], "another SHA-256"),
        (truncate, ["files", "tensors"], "bytes, the report says"),
        (lambda out: (out / "compress.json").unlink(), ["files"], "'compress.json' is missing"),
        (leave_the_folder, ["files"], "not a file of this folder"),
        (
            add_files,
            ["files"],
            r"'more/pytorch_model\.bin' is not in the report, nor are 1 more",
        ),
        (
            lambda out: (out / "report.json").write_text("{"),
            ["report", "files", "gates", "recipe"],
            "no readable export.files",
        ),
        (
            lambda out: (out / "report.json").unlink(),
            ["report", "files", "gates", "recipe"],
            "report.json is missing",
        ),
    ],
)
def test_damage_to_a_folder_is_named(exported, damage, failed, words):
    _, out = exported("w4a8", "compress")
    add_report(out)
    damage(out)
    with pytest.raises(FolderError, match=words) as caught:
        verify_folder(out)
    assert caught.value.exit_code == 6
    assert [check["name"] for check in caught.value.result["checks"] if not check["ok"]] == failed


def change_report(out, change):
    report = json.loads((out / "report.json").read_text())
    change(report)
    (out / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda report: report["gates"].pop(), "not those of its recipe and its metrics"),
        (lambda report: report["gates"][0].update(measured=0.2), "not those of its recipe"),
        (lambda report: report["recipe"]["require"].update(fid="<= 3"), "not those of its recipe"),
        (lambda report: report["evaluation"]["metrics"].update(sqnr_db=9.0), "not those of its recipe"),
        (lambda report: report.pop("gates"), "no readable gates"),
        (lambda report: report.pop("recipe"), "no readable gates"),
        (lambda report: report["recipe"].update(require=["x"]), "no readable gates"),
        (lambda report: report["recipe"]["require"].update(fid=3), "no readable gates"),
        (lambda report: report["recipe"]["require"].update(fid="about 3"), "no readable gates"),
        (lambda report: report["evaluation"]["metrics"].update(sqnr_db="9"), "no readable gates"),
        (lambda report: report["evaluation"].update(metrics=3), "no readable gates"),
    ],
)
def test_gates_are_judged_by_the_recorded_figures(exported, change, words):
    _, out = exported("w4a8", "compress")
    add_report(out)
    change_report(out, change)
    with pytest.raises(FolderError, match=words) as caught:
        verify_folder(out)
    assert [check["name"] for check in caught.value.result["checks"] if not check["ok"]] == ["gates"]


@pytest.mark.parametrize(("value", "words"), [(9.0, "sqnr_db is 9.0, required >= 12"), (None, "is None")])
def test_a_recorded_gate_that_failed_is_a_failure(exported, value, words):
    _, out = exported("w4a8", "compress")
    add_report(out)

    def fail(report):
        report["gates"][1] |= {"measured": value, "passed": False}
        if value is None:
            del report["evaluation"]["metrics"]["sqnr_db"]
        else:
            report["evaluation"]["metrics"]["sqnr_db"] = value

    change_report(out, fail)
    with pytest.raises(FolderError, match=words):
        verify_folder(out)


def test_a_recipe_without_gates_is_sound(exported):
    _, out = exported("w4a8", "compress")
    add_report(out)
    change_report(out, lambda report: (report["recipe"]["require"].clear(), report["gates"].clear()))
    assert verify_folder(out)["checks"][2]["detail"] == "the recipe requires nothing"


def test_files_that_were_not_fetched_must_be_listed_too(exported):
    _, out = exported("w4a8", "compress")
    add_report(out)
    known = ["config.json", ".gitattributes", "report.json"]
    assert verify_folder(out, name="org/name", elsewhere=known)["path"] == "org/name"
    with pytest.raises(FolderError, match=r"org/name: files: 'pytorch_model\.bin' is not in the report"):
        verify_folder(out, name="org/name", elsewhere=[*known, "pytorch_model.bin"])


def test_importing_verify_does_not_import_torch():
    code = "import sys, compress.exporters.verify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outputs_do_not_depend_on_the_global_seed(exported, outputs_of):
    import compress

    _, out = exported("mixed", "compress")
    torch.manual_seed(1)
    first = outputs_of(compress.load(out))
    torch.manual_seed(2)
    assert torch.equal(outputs_of(compress.load(out)), first)
