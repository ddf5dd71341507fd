"""Type checkers know every type of the installed package. pyright is asked where it is installed:
other than mypy it trusts no type that an attribute does not state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PYRIGHT = shutil.which("pyright", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(
    PYRIGHT is None, reason="pyright is not installed: pip install pyright"
)
COMMANDS = "kfc_fx.tools."
"""No part of the library: nothing of it is imported by a user."""


def answer(installed: Path, *arguments: str) -> dict[str, Any]:
    """What pyright says of the package in a folder, in this environment."""
    assert PYRIGHT is not None
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [PYRIGHT, "--outputjson", *arguments],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_type_of_the_library_is_unknown(distributions):
    arguments = ("--verifytypes", "kfc_fx", "--ignoreexternal")
    found = answer(distributions.installed, *arguments)["typeCompleteness"]
    assert found["pyTypedPath"].startswith(str(distributions.installed))
    own = [s for s in found["symbols"] if s["isExported"] and not s["name"].startswith(COMMANDS)]
    assert len(own) > 1000
    unknown = [
        f"{symbol['name']}: {symbol['diagnostics'][0]['message'] if symbol['diagnostics'] else ''}"
        for symbol in own
        if not symbol["isTypeKnown"]
    ]
    assert not unknown, "\n".join(unknown)


def test_a_users_program_is_typed(distributions, tmp_path):
    program = shutil.copy(Path(__file__).with_name("user_program.py"), tmp_path)
    found = answer(distributions.installed, str(program))
    assert found["summary"]["filesAnalyzed"] == 1
    complaints = [
        f"line {said['range']['start']['line'] + 1}: {said['message']}"
        for said in found["generalDiagnostics"]
    ]
    assert not complaints, "\n".join(complaints)
