"""Wrong input, as a user meets it: exit code, place, hint, in under two seconds, nothing written.

Seconds are processor seconds of the whole process, so that a busy machine does not fail the test.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ..peaks import PEAK

WEIGHTS = "diffusion_pytorch_model.safetensors"
GOOD = """\
model: MODEL
seed: 0
calibration: {samples: 2, steps: 2, batch_size: 2}
stages:
  - vidit_q:
      weight_bits: 4
      keep: []
evaluate:
  fidelity: {samples: 2, steps: 2}
require: {sqnr_db: ">= 1"}
export: {path: out}
"""


@dataclass
class Ended:
    code: int
    text: str
    seconds: float


def compress(folder, *arguments, env=None, user=None):
    """Run the command line in `folder` and return how it ended."""
    error_path = folder.parent / f"{folder.name}.stderr"
    with error_path.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "compress", *arguments],
            cwd=folder, stdout=errors, stderr=errors, env={**os.environ, **(env or {})}, user=user,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = " ".join(error_path.read_text().split())
    return Ended(process.returncode, text, usage.ru_utime + usage.ru_stime)


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(folder, code, *expected, arguments=("run", "recipe.yaml"), seconds=2.0, env=None):
    """Assert that the command is refused with everything `expected` in its message, and wrote nothing."""
    before = listing(folder)
    ended = compress(folder, *arguments, env=env)
    assert ended.code == code, ended.text
    for part in expected:
        assert part in ended.text, f"{part!r} is not in: {ended.text}"
    assert "Traceback" not in ended.text
    assert listing(folder) == before, "something was written"
    assert ended.seconds < seconds, f"took {ended.seconds:.1f} processor seconds"
    return ended


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def model(folder):
    """Return a copy of the built-in DiT that a test may damage."""
    import compress

    source = Path(compress.__file__).parent / "models" / "builtin" / "dit"
    shutil.copytree(source, folder / "model")
    return folder / "model"


def recipe(folder, old="", new="", model="builtin:dit"):
    text = GOOD.replace("MODEL", model)
    assert old in text
    (folder / "recipe.yaml").write_text(text.replace(old, new, 1) if old else text)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 0", "sede: 0", ("recipe.yaml:2:1", "sede", "seed")),
        ("weight_bits: 4", "weight_bit: 4", ("recipe.yaml:6:7", "weight_bit", "weight_bits")),
        ("seed: 0", "seed: many", ("recipe.yaml:2:7", "seed")),
        ("samples: 2", "samples: [2]", ("recipe.yaml:3:15", "calibration.samples")),
        ("vidit_q", "vidit_k", ("recipe.yaml:5:5", "vidit_k", "vidit_q")),
        ("weight_bits: 4", "weight_bits: 5", ("recipe.yaml:6:20", "vidit_q.weight_bits", "2, 3, 4, 6, 8")),
        ("keep: []", "keep: ['blocks.*.no']", ("recipe.yaml:7:14", "blocks.*.no", "matches no linear layer")),
        ("seed: 0", "seed:\t0\n\tmore: 1", ("recipe.yaml:2:6", "TAB")),
        ("seed: 0", "seed: 0\nseed: 1", ("recipe.yaml:3:1", "seed")),
        ("path: out", "path: '${UNSET_VARIABLE}'", ("recipe.yaml:11:16", "UNSET_VARIABLE")),
        ("sqnr_db", "sqnr_bd", ("recipe.yaml:10:11", "sqnr_bd", "sqnr_db")),
    ],
    ids=[
        "unknown key", "unknown key of a stage", "wrong type", "list for a number", "misspelt method",
        "bits not offered", "pattern that matches no layer", "tab", "duplicate key", "unset variable",
        "unknown metric",
    ],
)  # fmt: skip
def test_wrong_recipe(folder, old, new, expected):
    recipe(folder, old, new)
    refused(folder, 2, *expected)


def test_empty_recipe(folder):
    (folder / "recipe.yaml").write_text("")
    refused(folder, 2, "recipe.yaml", "empty")


def test_misspelt_command_and_recipe_that_does_not_exist(folder):
    refused(folder, 2, "run", arguments=("rum", "recipe.yaml"))
    refused(folder, 2, "dit_w4a8", arguments=("run", "dit_w4a9"))


PLUGIN = """\
from typing import ClassVar
from compress.recipes.stages import StageSettings

class {name}:
    class settings(StageSettings):
        method: ClassVar[str] = "{method}"
        phase: ClassVar[str] = "{phase}"
        families: ClassVar[frozenset[str]] = frozenset({{"{family}"}})
"""


@pytest.fixture
def plugins(tmp_path):
    """Install two methods of another package: one that prunes, one that fits language models only."""
    site = tmp_path / "site"
    (site / "elsewhere-1.0.dist-info").mkdir(parents=True)
    (site / "elsewhere-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n"
    )
    (site / "elsewhere-1.0.dist-info" / "entry_points.txt").write_text(
        "[compress.compressors]\nelsewhere_prune = elsewhere:Prune\nelsewhere_text = elsewhere:Text\n"
    )
    (site / "elsewhere.py").write_text(
        PLUGIN.format(name="Prune", method="elsewhere_prune", phase="prune", family="dit")
        + PLUGIN.format(name="Text", method="elsewhere_text", phase="quantize", family="llm")
    )
    return {"PYTHONPATH": str(site)}


def test_stages_in_a_wrong_order(folder, plugins):
    recipe(folder, "evaluate:", "  - elsewhere_prune: {}\nevaluate:")
    refused(folder, 2, "recipe.yaml:8:5", "prune", "quantize", env=plugins)


def test_stage_on_a_wrong_family(folder, plugins):
    recipe(folder, "  - vidit_q:\n      weight_bits: 4\n      keep: []", "  - elsewhere_text: {}")
    refused(folder, 3, "recipe.yaml:5:5", "elsewhere_text", "dit", "llm", env=plugins)


def test_class_that_is_not_supported(folder, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_class_name": "MambaForCausalLM"}))
    recipe(folder, model="model")
    refused(folder, 4, "MambaForCausalLM", "DiTTransformer2DModel")


def test_prompts_that_are_not_there(folder):
    recipe(folder, "samples: 2, steps: 2, batch_size: 2", "samples: 2, prompts: nowhere.txt")
    refused(folder, 4, "nowhere.txt", "recipe.yaml")


def test_folder_without_config(folder, model):
    (model / "config.json").unlink()
    recipe(folder, model="model")
    refused(folder, 4, "model", "config.json")


def test_truncated_weights(folder, model):
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    recipe(folder, model="model")
    refused(folder, 4, WEIGHTS)


def _raw_header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write_raw(path, header, payload):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


NAMED = "transformer_blocks.3.ff.net.2.weight"


def test_shape_mismatch(folder, model):
    header, payload = _raw_header(model / WEIGHTS)
    rows, columns = header[NAMED]["shape"]
    header[NAMED]["shape"] = [columns, rows]
    _write_raw(model / WEIGHTS, header, payload)
    recipe(folder, model="model")
    refused(folder, 4, NAMED, str([columns, rows]), str([rows, columns]))


@pytest.mark.parametrize(("bits", "word"), [(0x7FC0, "NaN"), (0x7F80, "Inf")], ids=["NaN", "Inf"])
def test_weights_that_are_not_finite(folder, model, bits, word):
    header, payload = _raw_header(model / WEIGHTS)
    assert header[NAMED]["dtype"] == "BF16"
    begin, _ = header[NAMED]["data_offsets"]
    damaged = bytearray(payload)
    damaged[begin + 20 : begin + 22] = np.uint16(bits).tobytes()
    _write_raw(model / WEIGHTS, header, bytes(damaged))
    recipe(folder, model="model")
    refused(folder, 4, NAMED, word)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_pickles_are_refused(folder, model, suffix):
    (model / WEIGHTS).rename(model / f"diffusion_pytorch_model{suffix}")
    recipe(folder, model="model")
    refused(folder, 4, suffix, "pickle", "safetensors")


def test_output_exists(folder):
    recipe(folder)
    (folder / "out").mkdir()
    (folder / "out" / "report.json").write_text('{"export": {"files": []}}')
    refused(folder, 2, "out", "--overwrite")


def test_a_folder_that_we_did_not_write_is_never_replaced(folder):
    recipe(folder)
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")
    refused(folder, 2, "thesis.tex", "did not write", arguments=("run", "recipe.yaml", "--overwrite"))


def _mounted(path, options):
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs rights that this machine does not give")


def test_output_not_writable(folder):
    recipe(folder, "path: out", "path: sealed/out")
    sealed = folder / "sealed"
    if os.geteuid():
        sealed.mkdir(mode=0o500)
        refused(folder, 3, "sealed", "not writable")
        return
    _mounted(sealed, "ro")
    try:
        refused(folder, 3, "sealed", "not writable")
    finally:
        subprocess.run(["umount", str(sealed)], check=True)


@pytest.mark.slow
def test_disk_full_in_the_middle(folder):
    """The free space is enough for the plan and vanishes while the run is at work."""
    recipe(folder, "path: out", "path: small/out")
    small = folder / "small"
    _mounted(small, "size=8m")
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "compress", "run", "recipe.yaml"],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        while process.poll() is None and not list((folder / ".compress").glob("stages/*/stage.json")):
            time.sleep(0.02)
        filler = small / "filler"
        filler.write_bytes(b"x" * (os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - 65536))
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 5, text
        assert "space" in text
        assert "Traceback" not in text
        assert listing(small) == ["filler"], "something half-written was left"
        filler.unlink()
        again = compress(folder, "run", "recipe.yaml", "--json")
        assert again.code == 0, again.text
        assert json.loads((small / "out" / "report.json").read_text())["stages"][0]["resumed"] is True
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_interrupted_run_says_how_to_go_on(folder):
    recipe(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "compress", "run", "recipe.yaml"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell's background jobs ignore the signal, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    events = folder / ".compress" / "events.jsonl"
    while process.poll() is None and not (events.is_file() and '"stage"' in events.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "continues where this run stopped" in text
    assert "Traceback" not in text
    assert not (folder / "out").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    recipe(folder)
    ended = compress(folder, "run", "recipe.yaml")
    assert ended.code == 0, ended.text
    return folder / "out"


LAYER = "transformer_blocks.0.attn1.to_q"


def _edit(manifest, kind):
    scheme = manifest["quantization"][LAYER]
    if kind == "wrong size":
        scheme["shape"] = [scheme["shape"][0], scheme["shape"][1] * 2]
    elif kind == "path upwards":
        manifest["quantization"]["../../etc/passwd"] = manifest["quantization"].pop(LAYER)
    elif kind == "unknown version":
        manifest["version"] = 99
    else:
        scheme["shape"] = [2**40, 2**40]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("wrong size", (LAYER,)),
        ("path upwards", ("quantization", "../../etc/passwd")),
        ("unknown version", ("version 99",)),
        ("huge number", (LAYER,)),
    ],
)
@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_manifest_edited_by_hand(exported, folder, kind, expected, verb):
    shutil.copytree(exported, folder / "edited")
    path = folder / "edited" / "compress.json"
    manifest = json.loads(path.read_text())
    _edit(manifest, kind)
    path.write_text(json.dumps(manifest))
    ended = compress(folder, verb, "edited")
    assert ended.code in (4, 6), ended.text
    for part in expected:
        assert part in ended.text
    assert "Traceback" not in ended.text
    assert ended.seconds < 2.0


@pytest.mark.parametrize("kind", ["wrong size", "path upwards", "unknown version", "huge number"])
def test_an_edited_manifest_is_refused_before_any_allocation(exported, folder, kind):
    shutil.copytree(exported, folder / "edited")
    path = folder / "edited" / "compress.json"
    manifest = json.loads(path.read_text())
    _edit(manifest, kind)
    path.write_text(json.dumps(manifest))
    script = PEAK + textwrap.dedent(
        """
        import sys
        import compress, compress.runtime.load
        from compress.errors import SourceError
        before = peak()
        try:
            compress.load("edited")
        except SourceError as error:
            print(error)
        grown = peak() - before
        sys.exit(0 if grown < 4 * 2**20 else f"{grown} bytes were allocated")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compress.json" in done.stdout
