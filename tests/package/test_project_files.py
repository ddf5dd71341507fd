"""The files that GitHub reads: workflows, forms for issues, the citation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it comes with pre-commit")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def workflow(name: str) -> Any:
    return read(ROOT / ".github" / "workflows" / f"{name}.yml")


def commands(jobs: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_files_that_are_there_with_few_rights(path):
    found = read(path)
    assert found["permissions"] == {"contents": "read"}
    assert True in found, "YAML reads the key 'on' as a boolean"
    for name in re.findall(r"\b(?:tests|tools)/[\w/.]+", commands(found["jobs"])):
        assert (ROOT / name).exists(), name


def test_tests_run_by_every_python_and_torch_that_are_supported():
    matrix = workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert f"torch>={matrix['torch'][0]}" in PROJECT["dependencies"]
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert matrix["python"] == named


def test_a_nightly_torch_may_fail_and_nothing_else():
    may_fail = {n for n, job in workflow("tests")["jobs"].items() if job.get("continue-on-error")}
    assert may_fail == {"nightly"}


@pytest.mark.parametrize(("tag", "code"), [(f"v{PROJECT['version']}", 0), ("v9.9.9", 1)])
def test_a_release_needs_the_tag_of_its_version(tag, code):
    steps = workflow("release")["jobs"]["build"]["steps"]
    (step,) = (step for step in steps if step.get("name") == "the tag is the version")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GITHUB_REF_NAME": tag}
    command = ["bash", "-e", "-c", step["run"]]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert ("pyproject.toml says" in done.stderr) == bool(code)


def test_what_is_published_was_smoked():
    jobs = workflow("release")["jobs"]
    assert jobs["smoke"]["needs"] == "build"
    assert jobs["publish"]["needs"] == "smoke"
    assert "smoke.py" in commands({"smoke": jobs["smoke"]})
    uses = [step["uses"] for step in jobs["publish"]["steps"]]
    assert uses[-1].startswith("pypa/gh-action-pypi-publish@")
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_comes_with_the_doctors_report(path):
    (doctor,) = (field for field in read(path)["body"] if field["id"] == "doctor")
    assert "kfc-fx doctor" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]


def test_the_citation_is_of_this_project():
    found = read(ROOT / "CITATION.cff")
    assert found["title"].startswith(PROJECT["name"])
    assert found["version"] == PROJECT["version"]
    assert found["license"] == PROJECT["license"]
