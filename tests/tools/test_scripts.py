"""``kfc-fx bench scripts``, on a script of our own in the form that scripts have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfc_fx.tools.cli import app
from kfc_fx.tools.scripts import command, table
from kfc_fx.tools.scripts.edits import Edit, PatternError, edited
from kfc_fx.tools.scripts.table import Script, two_lines

SOURCE = '''\
"""Trains on the parity of two signs."""

from __future__ import annotations

import argparse

import torch
from torch import nn, optim

from parts import make


def train(model, optimizer, steps):
    for _ in range(steps):
        x = torch.randn(32, 2)
        target = (x.prod(1) > 0).long()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.01)
    args = parser.parse_args()
    assert open("input.txt").read()
    model = make()
    optimizer = optim.SGD(
        model.parameters(),
        lr=args.lr,
    )
    train(model, optimizer, args.steps)


if __name__ == "__main__":
    main()
'''
PARTS = """\
from torch import nn


def make():
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
"""
EDITS = (two_lines("model", "optimizer = optim.SGD("),)


@pytest.fixture
def checkouts(tmp_path: Path) -> Path:
    """A folder with one project, of which nothing may be written."""
    place = tmp_path / "checkouts" / "signs" / "code"
    place.mkdir(parents=True)
    (place / "main.py").write_text(SOURCE)
    (place / "parts.py").write_text(PARTS)
    return tmp_path / "checkouts"


def rows(monkeypatch, checkouts: Path, **known: Script) -> dict[str, dict]:
    """What the command saves of some scripts, by their names."""
    monkeypatch.setattr(command, "SCRIPTS", known)
    before = {path: path.stat().st_mtime_ns for path in checkouts.rglob("*")}
    path = checkouts.parent / "rows.json"
    asked = ["bench", "scripts", str(checkouts), "--steps=12", f"--json={path}"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert before == {path: path.stat().st_mtime_ns for path in checkouts.rglob("*")}
    found = {row["script"]: row for row in json.loads(path.read_text())["rows"]}
    assert all(name in done.stdout for name in found)
    return found


def test_rows_of_a_script_that_runs_of_one_that_fails_and_of_one_without_the_pattern(
    monkeypatch, checkouts
):
    script = Script("signs", "code/main.py", ("--lr=0.1",), EDITS, ("input_text",))
    found = rows(
        monkeypatch,
        checkouts,
        runs=script,
        fails=Script("signs", "code/main.py", ("--steps=many",), EDITS),
        other=Script("signs", "code/main.py", (), (two_lines("net", "opt = optim.SGD("),)),
        missing=Script("signs", "train.py", (), EDITS),
    )
    runs = found["runs"]
    assert runs["lines"] == 2
    assert 0 < runs["kfc"]["losses"]["loss"] < runs["own"]["losses"]["loss"] < 1
    assert runs["kfc"]["models"][0]["likelihood"] == "Categorical(dim=-1)"
    assert runs["kfc"]["models"][0]["blocks"] == 2
    assert "models" not in runs["own"]
    for run in (runs["own"], runs["kfc"]):
        assert 0 < run["median"] < run["first"]
        assert run["data"] == ["topics of Python's help, by characters"]
    assert found["fails"]["failure"].startswith("as it ships: line ")
    assert "SystemExit: 2" in found["fails"]["failure"]
    assert found["other"]["failure"] == (
        "code/main.py: 0 statements that begin with 'opt = optim.SGD(', not 1"
    )
    assert found["missing"]["failure"].startswith("no train.py in ")


def test_a_statement_over_several_lines_is_replaced_and_the_import_comes_after_the_future():
    changed = edited(SOURCE, list(EDITS)).splitlines()
    assert changed[changed.index("import argparse") - 1] == "import kfc_fx"
    place = changed.index("    kfc_fx.compile(model)")
    assert changed[place - 1 : place + 3] == [
        "    model = make()",
        "    kfc_fx.compile(model)",
        "    optimizer = kfc_fx.KFC(model)",
        "    train(model, optimizer, args.steps)",
    ]
    assert len(changed) == len(SOURCE.splitlines()) - 1  # four lines less, three more


def test_a_statement_may_stay_beside_the_new_lines():
    edit = Edit("model = make(", ("...", "kfc_fx.compile(model)"))
    assert edit.changed == 1
    assert "    model = make()\n    kfc_fx.compile(model)\n" in edited(SOURCE, [edit])


def test_a_pattern_of_two_statements_is_refused():
    with pytest.raises(PatternError, match="2 statements that begin with 'import '"):
        edited(SOURCE, [Edit("import ", ())])


def test_an_unknown_script_and_a_folder_without_checkouts_are_named(tmp_path):
    done = CliRunner().invoke(app, ["bench", "scripts", str(tmp_path), "--only=mnits"])
    assert done.exit_code == 2
    assert "did you mean 'mnist'" in done.output
    done = CliRunner().invoke(app, ["bench", "scripts", str(tmp_path)])
    assert done.exit_code == 2
    assert "examples, minGPT, nanoGPT, pytorch-cifar" in done.output


def test_every_rule_names_data_that_there_is():
    from kfc_fx.tools.scripts.data import STAND_INS

    used = {name for script in table.SCRIPTS.values() for name in script.data}
    assert used == set(STAND_INS)
