"""The battery of faults, in small; whole by ``kfc-fx bench faults``."""

from __future__ import annotations

import json
from collections import Counter

import torch
from typer.testing import CliRunner

from kfc_fx.tools.cli import app
from kfc_fx.tools.faults import command
from kfc_fx.tools.faults.battery import battery, kills
from kfc_fx.tools.faults.outcome import Outcome, Reference, try_fault


def test_every_fault_leaves_a_whole_state():
    """Of the default; ``kfc-fx bench faults`` has all scalings."""
    outcomes = list(battery("adam", points=1, interrupt_points=3))
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    assert not wrong
    assert len({outcome.fault for outcome in outcomes}) == len(outcomes) == 25


def test_a_process_that_is_killed_leaves_a_whole_report():
    assert all(outcome.is_right for outcome in kills(1))


def test_a_state_that_is_neither_is_seen():
    outcome = Outcome("a write to a parameter", "adam")

    def step(subject) -> None:
        with torch.no_grad():
            subject.net.scale.add_(1.0)

    try_fault(outcome, Reference.of("adam"), step)
    assert outcome.left == {"neither": 1}
    assert not outcome.is_right


def test_the_command_writes_its_table_and_fails_where_a_fault_does_harm(tmp_path, monkeypatch):
    right = Outcome(
        "one", "adam", tried=2, left=Counter(before=2), raised=Counter({"": 2}), goes_on=2
    )
    wrong = Outcome("other", "adam", tried=1, left=Counter(neither=1), raised=Counter({"": 1}))
    monkeypatch.setattr(command, "battery", lambda scaling, *_: [right])
    path = tmp_path / "faults.json"
    done = CliRunner().invoke(app, ["bench", "faults", "--kill", "0", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert [row["is_right"] for row in json.loads(path.read_text())["rows"]] == [True] * 4
    monkeypatch.setattr(command, "battery", lambda scaling, *_: [right, wrong])
    done = CliRunner().invoke(app, ["bench", "faults", "--kill", "0"])
    assert done.exit_code == 1
    assert "other" in done.output
