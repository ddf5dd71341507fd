"""``kfc-fx inspect --report``: how a run went, as a table, as a picture and on the page."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import kfc_fx
from kfc_fx.tools.cli import app
from tests.inspect.small_networks import ConvNet

CONV_NET = ["inspect", "tests.inspect.small_networks:ConvNet", "--input", "4x2x6x6"]


@pytest.fixture
def report(tmp_path):
    torch.manual_seed(0)
    compiled = kfc_fx.compile(ConvNet())
    opt = kfc_fx.KFC(compiled, lr=0.01)
    path = tmp_path / "run.json"
    for _ in range(3):
        output = compiled(torch.randn(4, 2, 6, 6))
        F.cross_entropy(output, torch.zeros(4, dtype=torch.long)).backward()
        opt.step()
        opt.zero_grad()
        opt.save_report(path, loss=0.5)
    return path


def invoke(*arguments: str):
    return CliRunner().invoke(app, [*CONV_NET, *arguments])


def test_a_table_of_the_run(report):
    result = invoke("--view", "run", "--report", str(report))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["step", "loss", "lr"]
    assert [line.split()[:3] for line in lines[1:4]] == [[n, "0.5", "0.01"] for n in "123"]
    names = set(json.loads(report.read_text())["factors"])
    assert names <= {line.split()[0] for line in lines[5:] if line.strip()}


def test_plots_and_page(report, tmp_path):
    picture, page = tmp_path / "run.png", tmp_path / "net.html"
    assert invoke("--view", "run", "--report", str(report), "--save", str(picture)).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert invoke("--view", "html", "--report", str(report), "--save", str(page)).exit_code == 0
    assert "effective_rank" in page.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[]", "is no report of a run; opt.save_report writes one"),
        ('{"version": 7}', "is a report of version 7, and this reads 1"),
    ],
)
def test_wrong_reports_are_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    result = invoke("--view", "run", "--report", str(path))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_the_view_needs_a_report():
    result = invoke("--view", "run")
    assert result.exit_code == 2
    assert "--view run needs --report FILE" in result.stderr
