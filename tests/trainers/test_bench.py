"""``kfc-fx bench trainers``, on one epoch of one package."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from kfc_fx.tools.cli import app
from tests.trainers.needed import needed


def test_a_row_has_both_optimizers(tmp_path):
    needed("accelerate")
    path = tmp_path / "trainers.json"
    done = CliRunner().invoke(
        app, ["bench", "trainers", "accelerate", "--epochs=1", f"--json={path}"]
    )
    assert done.exit_code == 0, done.output
    (row,) = json.loads(path.read_text())["rows"]
    assert 0 < row["kfc_loss"] < row["adamw_loss"] < 2.4
    assert 0 < row["adamw_median"] < row["adamw_first"]
    assert f"{row['adamw_loss']:.3f} / {row['kfc_loss']:.3f}" in done.stdout


def test_an_unknown_package_is_named():
    done = CliRunner().invoke(app, ["bench", "trainers", "acelerate"])
    assert done.exit_code != 0
    assert "accelerate" in done.output
