"""A first call that takes long says what it does; no other call says anything."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from torch import nn

import kfc_fx
from kfc_fx.compilation import progress


class Terminal(io.StringIO):
    """Standard error of a person at a terminal."""

    def isatty(self) -> bool:
        return True


class Small(nn.Module):
    """One block."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).tanh()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)


def test_a_terminal_shows_a_line_before_and_after(impatient, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    net = kfc_fx.compile(Small())
    kfc_fx.KFC(net)
    net(torch.randn(3, 4))
    before, after = terminal.getvalue().splitlines()
    assert before.startswith("kfc_fx: capturing Small; its first call does so")
    assert after.startswith("kfc_fx: captured Small in ")
    assert after.endswith(" s: 1 graph, 1 block")
    net(torch.randn(3, 4))
    net(torch.randn(5, 4))
    assert len(terminal.getvalue().splitlines()) == 2


def test_elsewhere_it_is_logged(impatient, caplog, capsys):
    net = kfc_fx.compile(Small())
    with caplog.at_level(logging.INFO, "kfc_fx"):
        net.kfc.trace(torch.randn(3, 4))
    told = [record.getMessage() for record in caplog.records if record.name == "kfc_fx"]
    assert len(told) == 2
    assert told[0].startswith("capturing Small")
    assert capsys.readouterr().err == ""


def test_a_short_call_says_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    kfc_fx.compile(Small())(torch.randn(3, 4))
    assert terminal.getvalue() == ""


def test_an_error_stream_that_is_no_file_does_no_harm(impatient, monkeypatch, caplog):
    class Recorder:
        def write(self, text: str) -> None:
            raise AssertionError(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr("sys.stderr", Recorder())
    with caplog.at_level(logging.INFO, "kfc_fx"):
        kfc_fx.compile(Small())(torch.randn(3, 4))
    assert [r.name for r in caplog.records if r.name == "kfc_fx"] == ["kfc_fx", "kfc_fx"]


def test_calls_without_gradients_say_nothing(impatient, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    net = kfc_fx.compile(Small(), backend="aot_eager")
    with torch.no_grad():
        net(torch.randn(3, 4))
    assert terminal.getvalue() == ""
    net(torch.randn(3, 4))
    assert "captured Small" in terminal.getvalue()


def test_a_call_that_fails_says_nothing_of_what_was_captured(impatient, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    net = kfc_fx.compile(Small())
    with pytest.raises(RuntimeError):
        net(torch.randn(3, 7))
    assert "captured" not in terminal.getvalue()
