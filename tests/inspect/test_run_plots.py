"""The plots of a run's report."""

from __future__ import annotations

import json

import pytest

from tests.models import backward, make

pytest.importorskip("matplotlib")

from kfc_fx.inspect.run_plots import run_figure


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_plots_of_a_run(scaling, tmp_path):
    compiled, opt = make(scaling=scaling)
    path = tmp_path / "run.json"
    for step in range(4):
        backward(compiled)
        opt.step()
        opt.zero_grad()
        opt.save_report(path, loss=1.0 / (step + 1))
    figure = run_figure(json.loads(path.read_text()))
    titles = {axes.get_title() for axes in figure.axes if axes.get_title()}
    expected = {"loss", "lr", "seconds a step", "spectrum of omega", "spectrum of gamma"}
    expected |= {"damping", "nu", "clip scale"} if scaling == "inverse" else set()
    assert titles == expected
    loss = next(axes for axes in figure.axes if axes.get_title() == "loss")
    assert list(loss.lines[0].get_ydata()) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    spectra = next(axes for axes in figure.axes if axes.get_title() == "spectrum of omega")
    labels = {line.get_label() for line in spectra.lines}
    assert labels == {block.name for block in compiled.kfc.plan.blocks}
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
