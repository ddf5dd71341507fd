from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
MAKES_OWN = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "EXTRAS")
OLD_PYTHON = "#!/bin/sh\nexit 1\n"
NEW_PYTHON = f"""#!/bin/sh
echo "$@" >> calls
case "$1" in
-c) exec {sys.executable} "$@" ;;
-m) mkdir -p .venv/bin; for name in python kfc-fx; do
    printf '#!/bin/sh\\necho %s "$@" >> calls\\n' $name > .venv/bin/$name
    chmod +x .venv/bin/$name; done ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name, text in (("old", OLD_PYTHON), ("new", NEW_PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    # this test may run within make: what that was told is not for the one here
    own = {name: value for name, value in os.environ.items() if name not in MAKES_OWN}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=own)


def test_the_set_up_is_done_once(folder: Path) -> None:
    first = make(folder, "demo", "PYTHON=./new")
    assert first.returncode == 0, first.stderr
    assert "==> setting up .venv" in first.stdout
    assert "==> classifying digits" in first.stdout
    assert "==> an autoencoder" in first.stdout
    calls = (folder / "calls").read_text()
    assert "-m venv .venv" in calls
    assert "python -m pip install" in calls
    assert "--editable .[dev]" in calls
    runs = calls[calls.index("kfc-fx train\n") :]
    assert runs.count("kfc-fx train") == 2
    assert "--model digits-autoencoder" in runs

    second = make(folder, "demo", "PYTHON=./new")
    assert "setting up" not in second.stdout
    assert (folder / "calls").read_text() == calls + runs


def test_an_old_python_is_refused_in_one_line(folder: Path) -> None:
    for python in ("./old", "./missing"):
        done = make(folder, "test", f"PYTHON={python}")
        assert done.returncode != 0
        assert f"{python} is not Python 3.11 or newer" in done.stderr.splitlines()[0]
        assert not (folder / ".venv").exists()
