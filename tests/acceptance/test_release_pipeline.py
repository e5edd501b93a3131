"""A release as a pipeline makes it: a clone, a wheel, a clean environment, a recipe with gates, a push.

The Hub is the loopback server of `tests/hub_server`, a real process that the real client talks to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPE = """\
model: builtin:dit
calibration: {samples: 2, steps: 2, guidance_scale: 1.5}
stages:
  - rtn: {weight_bits: 8, activation_bits: 8}
evaluate:
  fidelity: {samples: 2, steps: 2, guidance_scale: 1.5}
require:
  sqnr_db: ">= 20"
  size_ratio: "<= 0.75"
export: {path: out/dit-w8a8}
"""

# Loads a model by name and writes what it computes; `name` is a Hub id or a folder.
LOADER = """\
import sys
import compress, torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
name, target = sys.argv[1:]
def outputs(model):
    generator = torch.Generator().manual_seed(7)
    size, channels = model.config.sample_size, model.config.in_channels
    latents = torch.randn((2, channels, size, size), generator=generator).to(model.dtype)
    with torch.no_grad():
        return model(latents, timestep=torch.tensor([3, 500]), class_labels=torch.tensor([0, 5])).sample
stock, ours = outputs(DiTTransformer2DModel.from_pretrained(name)), outputs(compress.load(name))
save_file({"stock": stock.contiguous(), "ours": ours.contiguous()}, target)
print(compress.__file__)
"""


@dataclass(frozen=True)
class Machine:
    """A clean environment in which nothing but the wheel is ours."""

    root: Path
    environment: Path

    def run(self, folder, variables, *command, timeout=600):
        """Start a command of the environment in `folder`, and return how it ended."""
        program, *arguments = command
        variables = {name: value for name, value in variables.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.environment / "bin" / program, *arguments],
            cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip


def _checked(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def machine(repository, tracked_files, tmp_path_factory):
    """Clone, build the wheel, and install it into a new environment, all without a network."""
    root = tmp_path_factory.mktemp("release")
    clone, dist, environment = root / "clone", root / "dist", root / "environment"
    head = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=repository, capture_output=True)
    if head.returncode == 0:
        _checked("git", "clone", "--quiet", "--depth", "1", repository.as_uri(), str(clone))
    else:  # an archive of the source, or a checkout that git does not trust
        for path in tracked_files:
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / path, clone / path)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(clone))
    _checked(*build)
    (wheel,) = dist.iterdir()
    _checked(sys.executable, "-m", "venv", "--without-pip", str(environment))
    (site,) = (environment / "lib").glob("python*/site-packages")
    # The dependencies of the development environment; .pth files in there are not read a second time,
    # so its editable installation stays unseen.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = (sys.executable, "-m", "pip", "--python", str(environment), "install", "--quiet")
    _checked(*pip, "--no-index", "--no-deps", "--force-reinstall", str(wheel))
    return Machine(root, environment)


@pytest.fixture
def job(machine, tmp_path):
    """Return the folder of one job: nothing but a recipe in it."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "release.yaml").write_text(RECIPE)
    return folder


def _outputs(machine, variables, folder, name, target):
    from safetensors.torch import load_file

    done = machine.run(folder, variables, "python", "-c", LOADER, name, str(target))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(machine.environment)
    return load_file(target)


def test_a_release_is_built_pushed_and_loads_from_the_hub(machine, job, hub, tmp_path):
    variables = hub.environment(tmp_path / "home")
    place = machine.run(job, variables, "python", "-c", "import compress; print(compress.__file__)")
    assert Path(place.stdout.strip()).is_relative_to(machine.environment), place.stderr

    done = machine.run(
        job, variables, "compress", "run", "release.yaml", "--push", "org/dit", "--strict", "--json",
        "--set", "export.push.tag=v1.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    push, folder = report["export"]["push"], job / "out" / "dit-w8a8"
    assert push["repo"] == "org/dit" and push["verified"] is True and push["private"] is True
    assert all(gate["passed"] for gate in report["gates"])
    assert hub.private("org/dit") and hub.refs("org/dit")["tags"] == {"v1.0": push["commit"]}

    there = hub.commits("org/dit")[0]
    assert there["oid"] == push["commit"]
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in written.items():  # the card and the report among them
        data = path.read_bytes()
        assert there["files"][name]["sha256"] == hashlib.sha256(data).hexdigest(), name
        assert hub.read("org/dit", name) == data, name
    assert set(there["files"]) - set(written) <= {".gitattributes"}

    # Another process, another cache, a token that only reads, and no folder of that name at hand.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    reader = hub.environment(tmp_path / "another home", hub.reader)
    local = _outputs(machine, reader, elsewhere, str(folder), tmp_path / "local.safetensors")
    remote = _outputs(machine, reader, elsewhere, "org/dit", tmp_path / "remote.safetensors")
    assert local["stock"].abs().max() > 0
    for way in ("stock", "ours"):
        assert remote[way].equal(local["stock"]), way

    (hint,) = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    following = hint.removeprefix("next: ").split()
    again = machine.run(elsewhere, reader, *following)
    assert again.returncode == 0, again.stderr


def test_a_failing_gate_ends_with_6_and_nothing_is_pushed(machine, job, hub, tmp_path):
    variables = hub.environment(tmp_path / "home")
    done = machine.run(
        job, variables, "compress", "run", "release.yaml", "--push", "org/never", "--json",
        "--set", "require.sqnr_db=>= 200",
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "VerifyError" and "required >= 200" in error["message"]
    kept = job / "out" / "dit-w8a8.rejected"
    assert [path.name for path in (job / "out").iterdir()] == [kept.name]
    report = json.loads((kept / "report.json").read_text())
    assert [gate["passed"] for gate in report["gates"] if gate["metric"] == "sqnr_db"] == [False]
    for row in report["export"]["files"]:
        assert hashlib.sha256((kept / row["name"]).read_bytes()).hexdigest() == row["sha256"]

    assert hub.requests(), "the right to push is asked for before any work"
    assert not hub.exists("org/never")
    assert {request["method"] for request in hub.requests()} <= {"GET", "HEAD"}

    # The folder that was kept aside cannot be pushed by hand either.
    by_hand = machine.run(job, variables, "compress", "push", str(kept), "org/never")
    assert by_hand.returncode == 6, by_hand.stderr
    assert not hub.exists("org/never")


def test_a_token_without_the_right_to_write_ends_before_any_work(machine, job, hub, tmp_path):
    variables = hub.environment(tmp_path / "home", hub.reader)
    done = machine.run(job, variables, "compress", "run", "release.yaml", "--push", "org/dit", "--json")
    assert done.returncode == 7, done.stderr
    assert "cannot write" in json.loads(done.stdout)["error"]["message"]
    assert not (job / "out").exists() and not (job / ".compress").exists()
    assert not hub.exists("org/dit")
