"""What a release would publish, built from this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "_build", "gallery", "sg_*")
"""What a fresh checkout does not have."""


@dataclass(frozen=True)
class Distributions:
    """The source distribution, the wheel that was built from it alone, and the folder that the
    wheel would be installed into."""

    source: Path
    wheel: Path
    installed: Path


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    pytest.importorskip("setuptools", minversion="77", reason="it builds the package")
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT))
    source = _built("build_sdist", folder / "checkout", folder / "source")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = _built("build_wheel", unpacked, folder / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return Distributions(source, wheel, folder / "installed")


def _built(hook: str, checkout: Path, folder: Path) -> Path:
    folder.mkdir()
    command = [sys.executable, "-c", BUILD, hook, str(folder)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built
