"""Imports point one way through the folders, and need neither Triton nor a GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "errors": set(),
    "artifacts": set(),
    "plan": {"errors", "plan"},
    "capture": {"errors", "plan", "capture"},
    "ops": {"errors", "plan", "ops", "kernels"},
    "rewrite": {"errors", "artifacts", "plan", "capture", "ops", "rewrite"},
    "curvature": {"errors", "plan", "ops", "kernels", "curvature"},
    "codegen": {"errors", "artifacts", "plan", "kernels", "curvature", "codegen"},
    "compilation": {"errors", "plan", "capture", "rewrite", "curvature"},
    "compile": {"errors", "plan", "capture", "curvature", "compilation"},
    "optim_options": {"errors", "plan", "curvature", "codegen"},
    "binding": {"errors", "plan", "codegen", "compile", "gradients", "optim_options"},
    "gradients": {"errors"},
    "exact_fisher": {"errors", "curvature", "compile", "optim_options"},
    "optim": {
        "errors",
        "plan",
        "curvature",
        "codegen",
        "compile",
        "optim_options",
        "binding",
        "gradients",
        "exact_fisher",
    },
}
MAY_IMPORT["inspect"] = {*MAY_IMPORT, "kernels", "inspect"}  # and tools alone imports it


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("kfc_fx.")}
    return parts


def test_imports_point_one_way():
    for part, allowed in MAY_IMPORT.items():
        folder = ROOT / "kfc_fx" / part
        files = folder.glob("**/*.py") if folder.is_dir() else [folder.with_suffix(".py")]
        for path in files:
            assert imported_parts(path) <= allowed, path


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import kfc_fx; print(kfc_fx.__version__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "0.1.0"
