"""Imports only point down, and what serves a model does not load what trains it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lspade_train

ROOT = Path(lspade_train.__file__).parent

# Top-level folders and modules, bottom up: each may import those listed before it, and a folder its
# own modules.
ORDER = [
    *("errors", "recipe", "requirements"),
    *("io", "models", "tasks", "probes", "cache", "training", "policies", "runtime"),
    *("evaluation", "profiling", "inspection", "reporting", "artifacts", "integrations", "cli"),
]

TRAINING_ONLY = {"lightning", "datasets", "wandb", "matplotlib", "plotly"}
SERVING = [
    "runtime",
    "probes.heads",
    "probes.spade",
    "policies.policy",
    "tasks",
    "artifacts.folder",
    "probes.lenses",
]
# Modules that check a command line before anything slow is imported.
CHECKING = ["cli.parsing", "cli.options", "io.fetch", "io.layout", "tasks", "probes.lenses"]


def files_of(name: str) -> list[Path]:
    """The files of a module or of a package."""
    return [p for p in [ROOT / f"{name}.py", *sorted((ROOT / name).rglob("*.py"))] if p.exists()]


def imports(path: Path, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of a file's imports; with `lazy` those inside functions too."""
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)


def internal(path: Path, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """Line and module of each import from this package."""
    for line, name in imports(path, lazy=lazy):
        parts = name.split(".")
        if parts[0] == "lspade_train" and len(parts) > 1 and parts[1] in ORDER:
            yield line, parts[1]


def test_every_module_is_listed_in_the_order():
    present = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert present - {"__init__", "__main__", "__pycache__"} <= set(ORDER)


@pytest.mark.parametrize("name", [name for name in ORDER if files_of(name)])
def test_imports_only_point_down(name):
    for path in files_of(name):
        for line, target in internal(path, lazy=True):
            above = ORDER.index(target) > ORDER.index(name)
            assert not above, f"{path.relative_to(ROOT)}:{line} imports {target}"


def module_file(name: str) -> Path | None:
    """The file of a dotted module name in this package, or None."""
    base = ROOT.parent / name.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def loads(path: Path) -> Iterator[str]:
    """The package's modules that importing `path` imports, including parent packages."""
    for _, name in imports(path, lazy=False):
        parts = name.split(".")
        if parts[0] == "lspade_train":
            names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
            yield from (found for found in names if module_file(found))


def reached(names: list[str], forbidden: set[str]) -> set[str]:
    """Modules loaded with the given ones, asserting that none imports a forbidden package."""
    waiting, seen = [f"lspade_train.{name}" for name in names], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = module_file(name)
        for line, found in imports(path, lazy=False):
            top = found.split(".")[0]
            assert top not in forbidden, f"{path.relative_to(ROOT)}:{line} imports {top}"
        waiting += loads(path)
    return seen


def test_modules_of_the_runtime_import_no_training_code_at_top_level():
    seen = reached(SERVING, TRAINING_ONLY)
    assert {"lspade_train.models.adapter", "lspade_train.io.storage"} <= seen


def test_a_wrong_argument_is_rejected_before_torch_is_imported():
    seen = reached(CHECKING, {"torch", "transformers", *TRAINING_ONLY})
    assert {"lspade_train.tasks.rows", "lspade_train.io.storage"} <= seen


def loaded_after(statement: str) -> set[str]:
    """Top-level modules loaded in a new process after `statement`."""
    code = f"{statement}\nimport sys; print(*{{n.split('.')[0] for n in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_serving_process_loads_no_training_libraries():
    trains = {"HiddenStateDataModule", "LSpadeModule"}
    public = ", ".join(name for name in lspade_train.__all__ if name not in trains)
    statement = f"from lspade_train import {public}\nimport lspade_train.tasks"
    assert not loaded_after(statement) & TRAINING_ONLY


def test_importing_the_package_and_showing_help_or_results_stays_light():
    statement = "import lspade_train\nfrom lspade_train.cli import main\nmain(['--help'])"
    statement += "\nimport lspade_train.probes.lenses, lspade_train.reporting.plots"
    heavy = {"torch", "transformers", "numpy", "jsonargparse", *TRAINING_ONLY}
    assert not loaded_after(statement) & heavy
