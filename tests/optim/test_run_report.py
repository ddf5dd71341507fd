"""The report of a run: what is in it, and what a wrong file does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import kfc_fx
from kfc_fx.engine.factors import Factors
from kfc_fx.optim.run_report import factor_summary
from tests.models import backward, conv_network, make, train


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_a_report_of_a_run(scaling, tmp_path):
    net = conv_network()
    compiled, opt = make(net, scaling=scaling, every=2, input_factor="separable")
    path = tmp_path / "run.json"
    for step in range(6):
        backward(compiled)
        opt.step()
        opt.zero_grad()
        if step % 2:
            opt.save_report(path, loss=2.0 - step)
    report = json.loads(path.read_text())
    assert [entry["step"] for entry in report["steps"]] == [2, 4, 6]
    assert [entry["loss"] for entry in report["steps"]] == [1.0, -1.0, -3.0]
    for entry in report["steps"]:
        assert (entry["lr"], entry["damping"]) == (0.01, None if scaling == "adam" else 0.01)
        assert set(entry["seconds"]) == {"gradient", "statistics", "refresh", "update"}
        assert all(seconds >= 0 for seconds in entry["seconds"].values())
        assert (entry["nu"] is None) == (scaling == "adam")
    assert set(report["factors"]) == set(opt.factors)
    first = report["factors"]["0"]
    assert first["omega_spectrum"] == sorted(first["omega_spectrum"], reverse=True)
    assert 1 <= first["gamma_effective_rank"] <= 64
    assert first["gamma_condition"] >= 1


@pytest.mark.parametrize("loss", [float("nan"), torch.tensor(float("inf"))], ids=str)
def test_a_report_of_a_run_that_diverged_is_json(loss, tmp_path):
    compiled, opt = make(conv_network())
    backward(compiled)
    opt.step()
    path = tmp_path / "run.json"
    opt.save_report(path, loss=torch.tensor(2.5))
    opt.save_report(path, loss=loss)
    text = path.read_text()
    assert [entry["loss"] for entry in json.loads(text)["steps"]] == [2.5, None]
    assert "NaN" not in text
    assert "Infinity" not in text


def test_spectra():
    omega = torch.diag(torch.tensor([4.0, 1.0, 1.0, 2.0]))[None]
    found = factor_summary(Factors(torch.eye(3)[None] * 5, dense=omega))
    assert found["omega_spectrum"] == pytest.approx([4, 2, 1, 1])
    assert found["omega_condition"] == pytest.approx(4)
    shares = [0.5, 0.25, 0.125, 0.125]
    rank = math.exp(-sum(share * math.log(share) for share in shares))
    assert found["omega_effective_rank"] == pytest.approx(rank)
    assert found["gamma_effective_rank"] == pytest.approx(3)
    assert found["omega_image"][0] == [4, 0, 0, 0]


def test_spectra_of_other_forms():
    diagonal = Factors(torch.ones(1, 3, 1), dense=torch.tensor([[[3.0, 1.0]]]))
    assert factor_summary(diagonal)["omega_spectrum"] == pytest.approx([3, 1])
    channel, offset = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([2.0, 1.0]))
    separable = Factors(torch.eye(2)[None], channel=channel[None], offset=offset[None])
    assert factor_summary(separable)["omega_spectrum"] == pytest.approx(
        [4 / 3, 2 / 3, 2 / 3, 1 / 3]
    )
    nothing = factor_summary(Factors(torch.zeros(1, 2, 2), dense=torch.zeros(1, 2, 2)))
    assert (nothing["omega_condition"], nothing["omega_effective_rank"]) == (None, 0.0)
    wide = factor_summary(Factors(torch.eye(2)[None], dense=torch.eye(200)[None]))
    assert (len(wide["omega_spectrum"]), len(wide["omega_image"])) == (64, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [("not json", "is no report"), ("[1]", "is no report"), ('{"version": 9}', "version 9, not 1")],
)
def test_another_file_is_not_overwritten(text, message, tmp_path):
    compiled, opt = make(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)))
    backward(compiled)
    opt.step()
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(kfc_fx.KfcError, match=message):
        opt.save_report(path)
    assert path.read_text() == text


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """As when the process is killed in the middle of it, or the disk is full."""
    compiled, opt = make()
    train(compiled, opt, 1)
    path = tmp_path / "run.json"
    opt.save_report(path)
    before = path.read_text()

    def fail(self: Path, text: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        opt.save_report(path)
    assert path.read_text() == before
