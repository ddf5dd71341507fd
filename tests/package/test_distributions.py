"""The wheel and the source distribution are whole."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import kfc_fx

ROOT = Path(__file__).parents[2]
FOLDERS = {"kfc_fx": "kfc_fx", "kernels": "kfc_fx/kernels", "tools": "kfc_fx/tools"}
"""Where the source folders are installed."""


def files_of(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    built = ("_build", "gallery", "sg_execution_times.rst")  # of the site
    return {str(p) for p in found if p.suffix != ".pyc" and p.parts[0] not in built}


def test_the_wheel_has_every_file_of_the_package(distributions):
    with zipfile.ZipFile(distributions.wheel) as archive:
        inside = set(archive.namelist())
    expected = {f"{at}/{file}" for name, at in FOLDERS.items() for file in files_of(ROOT / name)}
    assert expected == {file for file in inside if not file.startswith("kfc_fx-")}


def test_the_source_distribution_has_what_a_reader_and_a_packager_need(distributions):
    with tarfile.open(distributions.source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile"]
    for folder in ("docs", "examples", "tests"):
        wanted += [f"{folder}/{file}" for file in files_of(ROOT / folder)]
    assert set(wanted) <= inside
    assert not [name for name in inside if name.startswith((".", "benchmarks"))]


def test_the_version_is_said_once_and_the_same_everywhere(distributions):
    name = f"kfc_fx-{kfc_fx.__version__}"
    assert distributions.source.name == f"{name}.tar.gz"
    assert distributions.wheel.name == f"{name}-py3-none-any.whl"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {kfc_fx.__version__}\n" in citation


def test_what_is_installed_works(distributions, tmp_path):
    smoke = Path(__file__).with_name("smoke.py")
    environment = {**os.environ, "PYTHONPATH": str(distributions.installed)}
    command = [sys.executable, "-P", str(smoke)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"of {distributions.installed}" in done.stdout
    assert "all works" in done.stdout
