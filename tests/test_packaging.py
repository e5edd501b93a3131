"""The wheel: every package and data file is in it, nothing else is, and it works where it lands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = ("tests", "benchmarks", ".ci")


@pytest.fixture(scope="module")
def wheel(tracked_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked_files:
        target = folder / "tree" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder / "dist",
        folder / "tree",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into an empty folder."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        target,
        wheel,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def _python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)


def _expected(tracked_files: list[Path], *suffixes: str, under: tuple[str, ...] = ()) -> set[str]:
    return {
        f"compress/{path.as_posix()}"
        for path in tracked_files
        if path.suffix in suffixes
        and path.parts[0] not in NOT_PACKAGED
        and (not under or path.parts[: len(under)] == under)
    }


def test_every_module_is_in_the_wheel(tracked_files, names):
    missing = sorted(_expected(tracked_files, ".py") - names)
    assert not missing, f"add their packages to [tool.setuptools] in pyproject.toml: {missing}"


def test_recipes_and_schema_are_in_the_wheel(tracked_files, names):
    recipes = _expected(tracked_files, ".yaml", ".json", ".txt", under=("recipes",))
    assert "compress/recipes/prompts.txt" in recipes
    assert "compress/recipes/dit_w4a8.yaml" in recipes
    assert "compress/recipes/schema.json" in recipes
    assert recipes <= names, sorted(recipes - names)


def test_built_in_models_are_in_the_wheel(tracked_files, names):
    suffixes = (".json", ".jsonl", ".safetensors", ".md", ".png")
    models = _expected(tracked_files, *suffixes, under=("models", "builtin"))
    assert "compress/models/builtin/dit/diffusion_pytorch_model.safetensors" in models
    assert "compress/models/builtin/moe/answers/test.jsonl" in models
    assert models <= names, sorted(models - names)


def test_the_wheel_claims_one_name(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"compress"}
    assert len(tops) == 2


def test_tests_and_benchmarks_stay_out_of_the_wheel(names):
    strays = [name for name in names if name.split("/")[1] in NOT_PACKAGED]
    assert not strays
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_the_installed_package_imports_without_torch(installed):
    program = (
        "import sys, compress; print(compress.__file__, compress.__version__); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    result = _python(installed, "-c", program)
    assert result.returncode == 0, result.stderr
    place, version = result.stdout.split()
    assert Path(place).is_relative_to(installed), "another installation answered"
    (info,) = installed.glob("compress-*.dist-info")
    assert info.name == f"compress-{version}.dist-info"


def test_the_installed_command_answers(installed):
    scripts = sorted(path.name for path in (installed / "bin").iterdir())
    assert scripts == ["compress"]
    result = _python(installed, str(installed / "bin" / "compress"), "--help")
    assert result.returncode == 0, result.stderr
    assert "run" in result.stdout and "plan" in result.stdout


def test_the_installed_package_finds_its_recipes(installed):
    result = _python(installed, str(installed / "bin" / "compress"), "recipes")
    assert result.returncode == 0, result.stderr
    assert "dit_w4a8" in result.stdout
    result = _python(installed, str(installed / "bin" / "compress"), "validate", "dit_w4a8")
    assert result.returncode == 0, result.stderr
