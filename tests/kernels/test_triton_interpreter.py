"""Runs the Triton kernels' tests in Triton's interpreter.

In a process of their own: Triton decides when a kernel is defined whether it is compiled or
interpreted, and everything else in the suite must see it compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

OLD_INTERPRETER = Version(triton.__version__) < Version("3.7")
if OLD_INTERPRETER and Version(numpy.__version__) >= Version("2.4"):
    pytest.skip(
        f"the interpreter of Triton {triton.__version__} makes scalars of arrays of one element, "
        f"which NumPy {numpy.__version__} refuses",
        allow_module_level=True,
    )

HERE = Path(__file__).parent
SUITES = sorted(
    path
    for path in HERE.glob("test_triton_*.py")
    if path.stem not in ("test_triton_interpreter", "test_triton_offline")
)


@pytest.mark.parametrize("part", [0, 1])
def test_kernels_in_the_interpreter(part: int) -> None:
    """Half of the suites in one process: it takes longer to start than most of them to run."""
    suites = SUITES[part::2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *map(str, suites)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for suite in suites:
        assert suite.name in done.stdout
    assert " passed" in done.stdout, done.stdout
    assert " skipped" not in done.stdout, done.stdout
