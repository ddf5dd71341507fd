"""Imports point one way through the folders and between files, and need neither Triton nor a GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"kfc_fx": ROOT / "kfc_fx", "kernels": ROOT / "kernels", "tools": ROOT / "tools"}
GEOMETRY, CPU_MATMUL = "kernels.geometry", "kernels.cpu_matmul"
DTYPES, WRAPPERS = "kernels.dtypes", "capture.wrappers"

MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "errors": set(),
    "artifacts": set(),
    "notebook": set(),
    "linalg": {"kernels"},
    "ops": {"kernels"},
    "capture": {"artifacts", "errors"},
    "plan": {"capture", "errors", "notebook", GEOMETRY},
    "statistics": {"capture", "errors", "ops", "plan", DTYPES, GEOMETRY},
    "codegen": {"linalg", "plan", CPU_MATMUL},
    "rewrite": {"capture", "plan", "statistics"},
    "engine": {"artifacts", "codegen", "errors", "linalg", "plan", "statistics"},
    "distributed": {"codegen", "engine", "errors", "plan", "statistics"},
    "compilation": {"capture", "errors", "plan", "rewrite", "statistics"},
    "install": {"capture", "compilation", "errors", "plan", "statistics"},
    "optim": {
        WRAPPERS,
        "codegen",
        "compilation",
        "distributed",
        "engine",
        "errors",
        "install",
        "plan",
        "statistics",
    },
}
"""What the files of a folder, or a file beside the folders, may import besides each other."""
EVERYTHING = set(MAY_IMPORT)
MAY_IMPORT["inspect"] = EVERYTHING
MAY_IMPORT["integrations"] = {"kfc_fx"}
MAY_IMPORT["tools"] = {*EVERYTHING, "inspect", "kfc_fx"}


def sources() -> dict[str, Path]:
    """Every file by the name that it is imported under."""
    found = {}
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[0] != "kfc_fx":
                parts.insert(0, "kfc_fx")
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imported(path: Path) -> Iterator[str]:
    """The project's modules that a file imports, those for type checkers alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "kfc_fx")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kfc_fx":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in SOURCES else str(node.module)


def part_of(module: str) -> str:
    """The folder of a module, or the module itself where it stands beside the folders."""
    return module.split(".")[1] if "." in module else module


def test_imports_point_one_way():
    wrong = []
    for module, path in SOURCES.items():
        own = part_of(module)
        if own == "kfc_fx":
            continue  # the public names
        allowed = {own, *MAY_IMPORT[own]}
        wrong += [
            f"{module} imports {name}"
            for name in imported(path)
            if part_of(name) not in allowed and name.removeprefix("kfc_fx.") not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_the_table_has_every_folder():
    parts = {part_of(module) for module in SOURCES} - {"kfc_fx"}
    assert parts == set(MAY_IMPORT)


def test_files_import_each_other_in_no_circle():
    graph = {module: {n for n in imported(path) if n != module} for module, path in SOURCES.items()}
    # A folder that shows a name of its own files is no file that these import.
    graph = {m: targets for m, targets in graph.items() if SOURCES[m].name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module in done or module not in graph:
            return
        for target in graph[module]:
            visit(target, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_every_folder_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module for module, path in SOURCES.items() if path.name == "__init__.py"}
    assert set(listed) == folders
    for module, path in SOURCES.items():
        assert (path.parent / "__init__.py").exists(), module


def test_the_optimizer_writes_into_nothing_but_itself():
    """What another folder has made is asked, by its methods, and never assigned to."""
    wrong = []
    for path in (ROOT / "kfc_fx" / "optim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                continue
            for target in targets:
                for part in ast.walk(target) if target is not None else ():
                    if not isinstance(part, ast.Attribute) or not isinstance(part.ctx, ast.Store):
                        continue
                    owner = ast.unparse(part.value)
                    if owner.split("[")[0] in FOREIGN or owner in FOREIGN:
                        wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(target)}")
    assert not wrong, "\n".join(wrong)


FOREIGN = {
    *("model", "compilation", "self._compilation", "collector", "self._collector"),
    *("engine", "self._engine", "binding._engine"),
}
"""What the optimizer calls objects of other folders that it was given."""


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import kfc_fx; print(kfc_fx.__version__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == version("kfc_fx")
