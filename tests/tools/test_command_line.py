"""Every command is reachable from ``kfc-fx``, and does its work."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kfc_fx.tools.bench import kernels as bench_kernels
from kfc_fx.tools.bench import shapes as bench_shapes
from kfc_fx.tools.cli import app


@pytest.mark.parametrize("command", [["train"], ["kernels"], ["bench", "kernels"]], ids=" ".join)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_bench_kernels_measures_and_writes_its_figures(tmp_path, monkeypatch):
    smallest = bench_shapes.quick_shapes("cpu")[-1:]
    monkeypatch.setattr(bench_kernels, "quick_shapes", lambda device: smallest)
    path = tmp_path / "kernels.json"
    arguments = ["bench", "kernels", "--quick", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (shape,) = json.loads(path.read_text())["shapes"]
    assert shape["label"] == smallest[0].label
    assert smallest[0].label in result.output


def test_bench_kernels_refuses_a_network_that_it_does_not_have():
    result = CliRunner().invoke(app, ["bench", "kernels", "--quick", "--network", "nonsense"])
    assert result.exit_code == 2
    assert "no network" in result.output


def test_bench_kernels_refuses_an_unknown_dtype():
    result = CliRunner().invoke(app, ["bench", "kernels", "--dtype", "int8"])
    assert result.exit_code == 2
    assert "dtype must be one of" in result.output
