"""``kfc-fx doctor``: its report, and that it finds an op that is wrong."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kfc_fx.tools.cli import app
from kfc_fx.tools.doctor import checks as doctor_checks
from kfc_fx.tools.doctor import command as doctor

OPS = {
    "row_gram",
    "patch_gram auto",
    "patch_gram structured",
    "patch_gram im2col",
    "separable_gram",
}


def test_every_op_is_checked_and_right():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    cpu = [check for check in report["checks"] if check["device"] == "cpu"]
    assert {check["op"] for check in cpu} == OPS
    assert all(check["passed"] and check["error"] < check["allowed"] for check in report["checks"])
    assert report["packages"]["torch"]


def test_the_report_names_versions_devices_and_a_verdict():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for text in ("torch", "cpu", "every op agrees with its reference"):
        assert text in result.stdout
    assert "\x1b[" not in result.stdout


@pytest.mark.parametrize("faster", [True, False])
def test_the_report_names_what_multiplies_matrices(monkeypatch, faster):
    monkeypatch.setattr(doctor, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(doctor, "has_fast_bfloat16", lambda device: not faster)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    products = json.loads(result.stdout)["devices"][0]["products"]
    assert products == ("oneDNN" if faster else "BLAS, polar factors in bfloat16")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("row_gram", lambda found: found * 1.001),
        ("patch_gram", lambda found: found + 1),
        ("separable_gram", lambda found: (found[0], found[1].flip(1))),
        ("row_gram", lambda found: found * float("nan")),
    ],
)
def test_a_wrong_op_is_found(monkeypatch, name, wrong):
    own = getattr(doctor_checks, name)
    monkeypatch.setattr(doctor_checks, name, lambda *a, **k: wrong(own(*a, **k)))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "Do not train with these" in result.stdout


def test_what_is_missing_comes_with_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    result = CliRunner().invoke(app, ["doctor"])
    assert "triton is not installed: " in result.stdout
    assert "pip install 'kfc_fx[demo]'" in result.stdout
