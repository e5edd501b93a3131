"""The rules of the house, read from the source: who may import whom, how long things may be.

Nothing is imported here but the standard library (and, once, the package in a fresh process), so a
broken module shows up as the rule it breaks.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room may import from its own level and from those below it.
LEVELS = {
    "errors": 0,
    "progress": 0,
    "version": 0,
    "recipes": 0,
    "runtime": 1,
    "models": 2,
    "calibration": 3,
    "compressors": 4,
    "evaluation": 4,
    "exporters": 4,
    "cli": 6,
    "__main__": 6,  # python -m compress
}
LEVEL_OF_A_RUN = 5  # pipeline.py and the modules beside it that carry out a run
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_FILE_BYTES = 250_000


def _name(path: Path) -> str:
    """Dotted module name inside the package: `runtime.linear`; the package itself is ''."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class House:
    """The source, parsed once.

    Attributes:
        tracked: every file, relative to the root.
        trees: path -> syntax tree of every Python file, tests and benchmarks included.
        modules: name inside the package -> path, for the files that the wheel carries.
    """

    tracked: list[Path]
    trees: dict[Path, ast.Module]
    modules: dict[str, Path]

    def imports(self, name: str, *, lazy: bool) -> set[tuple[str, int]]:
        """Our modules that `name` imports, with the line; `lazy` adds imports inside functions."""
        path = self.modules[name]
        return {
            (target, node.lineno)
            for node in _walk(self.trees[path], into_functions=lazy)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for target in self._targets(path, node)
            if target and target != name
        }

    def _targets(self, path: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        """Modules of ours that an import statement loads, as names inside the package."""
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "compress"]
            yield from (name.partition(".")[2] for name in names)
            return
        base = node.module.split(".") if node.module else []
        if node.level:
            package = path.parent.parts
            base = [*package[: len(package) - node.level + 1], *base]
        elif base[:1] == ["compress"]:
            base = base[1:]
        else:
            return
        for alias in node.names:
            full = ".".join([*base, alias.name])
            yield full if full in self.modules else ".".join(base)


@pytest.fixture(scope="module")
def house(tracked_files: list[Path]) -> House:
    code = [path for path in tracked_files if path.suffix == ".py"]
    return House(
        tracked=tracked_files,
        trees={path: ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path)) for path in code},
        modules={_name(path): path for path in code if path.parts[0] not in ("tests", "benchmarks")},
    )


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """Yield nodes below `node`, leaving out what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            continue
        yield child
        if into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, into_functions=into_functions)


def _level(name: str) -> int:
    return LEVELS.get(name.split(".")[0], LEVEL_OF_A_RUN)


def _fail_with(problems: list[str], rule: str) -> None:
    if problems:
        pytest.fail(rule + "\n  " + "\n  ".join(problems), pytrace=False)


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import compress.cli.main\n"
        "from ..calibration import base\n"
        "from compress.models import open as reopened\n"
        "def later():\n    from .. import pipeline\n"
        "if TYPE_CHECKING:\n    from ..exporters import card\n"
    )
    path = Path("runtime/linear.py")
    names = ["cli.main", "calibration.base", "models.open", "pipeline", "exporters.card"]
    modules = {"runtime.linear": path, **{name: Path(name) for name in names}}
    house = House(tracked=[], trees={path: ast.parse(source)}, modules=modules)
    eager = {("cli.main", 1), ("calibration.base", 2), ("models.open", 3)}
    assert house.imports("runtime.linear", lazy=False) == eager
    assert house.imports("runtime.linear", lazy=True) == {*eager, ("pipeline", 5)}


def test_lower_rooms_never_import_upper_ones(house):
    problems = [
        f"{path}:{line}: {name.split('.')[0]} (level {_level(name)}) imports "
        f"{target} (level {_level(target)})"
        for name, path in house.modules.items()
        if name  # the package's own __init__ is its public face and loads everything lazily
        for target, line in sorted(house.imports(name, lazy=True))
        if _level(target) > _level(name)
    ]
    _fail_with(
        problems,
        "Direction: cli -> pipeline -> {exporters, evaluation, compressors} -> calibration -> models -> "
        "runtime -> {recipes, errors, progress}. Move what both need into the lower room.",
    )


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of `graph`, or an empty list."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for target in sorted(graph.get(name, ())):
                if found := visit(target, [*trail, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def test_no_circle_between_modules(house):
    graph = {
        name: {target for target, _ in house.imports(name, lazy=False)}
        for name, path in house.modules.items()
        if name
    }
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    circle = _circle(graph)
    _fail_with([" -> ".join(circle)] if circle else [], "Modules import each other in a circle:")


def test_no_circle_between_rooms(house):
    graph: dict[str, set[str]] = {}
    for name in house.modules:
        room = name.split(".")[0]
        if room in LEVELS:
            rooms = {target.split(".")[0] for target, _ in house.imports(name, lazy=True)}
            graph.setdefault(room, set()).update(rooms & LEVELS.keys() - {room})
    circle = _circle(graph)
    _fail_with([" -> ".join(circle)] if circle else [], "Rooms import each other in a circle:")


def _methods(house: House) -> set[str]:
    """Names of the methods: what `recipes/stages.py` gives as `method: ClassVar[str] = "..."`."""
    return {
        node.value.value
        for node in ast.walk(house.trees[Path("recipes/stages.py")])
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "method"
        and isinstance(node.value, ast.Constant)
    }


def test_no_method_imports_another_method(house):
    methods = {
        name
        for name in house.modules
        if name.startswith("compressors.") and name.split(".")[-1] in _methods(house)
    }
    problems = [
        f"{house.modules[name]}:{line}: imports the method {target}"
        for name in sorted(methods)
        for target, line in sorted(house.imports(name, lazy=True))
        if target in methods
    ]
    _fail_with(problems, "What two methods share becomes a named module below them.")


def test_recipes_and_command_modules_do_not_import_torch(house):
    heavy = {"torch", "diffusers", "transformers", "torchao", "optimum"}
    problems = []
    for name, path in house.modules.items():
        if name.split(".")[0] not in ("recipes", "cli", "errors", "progress", ""):
            continue
        for node in _walk(house.trees[path], into_functions=False):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            problems += [
                f"{path}:{node.lineno}: import {found}" for found in names if found.split(".")[0] in heavy
            ]
    _fail_with(problems, "Torch-free at module level: recipes/, cli/, errors.py, progress.py, __init__.py.")


def test_importing_recipes_and_commands_loads_no_torch(house):
    names = sorted(
        name for name in house.modules if name.split(".")[0] in ("recipes", "cli", "errors", "progress")
    )
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module('compress.' + name)\n"
        "    assert 'torch' not in sys.modules, f'compress.{name} loads torch'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_and_functions_are_short(house):
    problems = []
    for path, tree in house.trees.items():
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            problems.append(f"{path}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    problems.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    _fail_with(problems, f"A file has at most {MAX_FILE_LINES} lines, a function {MAX_FUNCTION_LINES}.")


def _bad_statements(path: Path, tree: ast.Module) -> Iterator[str]:
    is_script = path.name.startswith("train_")  # run by hand; its output is its log
    for node in ast.walk(tree):
        if (
            not is_script
            and isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ):
            yield f"{path}:{node.lineno}: print(...)"
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{path}:{node.lineno}: bare except"
            elif all(isinstance(line, ast.Pass) for line in node.body):
                yield f"{path}:{node.lineno}: except ...: pass"


def test_no_print_and_no_swallowed_error_in_the_package(house):
    problems = [
        problem for path in house.modules.values() for problem in _bad_statements(path, house.trees[path])
    ]
    _fail_with(problems, "Library code reports through Progress, and handles an error or lets it pass on.")


def test_every_package_is_listed_for_the_wheel(house):
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(["compress", *path.parent.parts]) for path in house.modules.values()}
    assert set(settings["packages"]) == found


def test_no_machine_path_and_no_registry_host_in_any_file(house):
    # Put together here, so that this file does not name them either.
    traces = [
        "/" + "work/", "/" + "root/", "/" + "tmp/tr", "/home/" + "runner",
        "pypi" + ".org", "download.pytorch" + ".org", "pythonhosted" + ".org",
    ]  # fmt: skip
    problems = []
    for path in house.tracked:
        if path.suffix in (".png", ".safetensors", ".gz", ".npz", ".tar"):
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            problems += [f"{path}:{number}: {trace}" for trace in traces if trace in line]
    _fail_with(problems, "A checkout works anywhere: no path of one machine, no host of a registry.")


def test_only_the_built_in_models_are_large(house):
    problems = [
        f"{path}: {(ROOT / path).stat().st_size} bytes"
        for path in house.tracked
        if (ROOT / path).stat().st_size > MAX_FILE_BYTES and path.parts[:2] != ("models", "builtin")
    ]
    _fail_with(problems, f"A tracked file has at most {MAX_FILE_BYTES} bytes, but for the built-in models.")


def test_no_pickle_is_tracked(house):
    pickles = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
    _fail_with(
        [str(path) for path in house.tracked if path.suffix in pickles],
        "Weights are safetensors, nothing else.",
    )
