from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from kfc_fx.tools.train import report
from kfc_fx.tools.train.comparison import Comparison, compare
from kfc_fx.tools.train.training_run import RunRecord

MakeRecord = Callable[..., RunRecord]


@pytest.fixture
def comparison(make_record: MakeRecord) -> Comparison:
    fast = [2.0, 1.0, 0.5, 0.25] + [0.125] * 36
    return compare(
        [make_record("kfc", fast), make_record("sgd", [2.0 - 0.04 * k for k in range(40)])]
    )


def printed(comparison: Comparison) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table(comparison, "a net on digits"))
    return capture.get()


def test_table_fits_and_says_what_it_compares(comparison: Comparison) -> None:
    text = printed(comparison)
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "a net on digits" in lines
    assert "optimizer lr final loss test accuracy iterations seconds capture in all" in lines
    assert "KFC (adam) 0.1 0.125 75.0% 4 4.50 0.50 40.50" in lines
    assert "SGD Nesterov 0.1 0.480 75.0% 40 40.50 0.50 40.50" in lines
    assert "Losses: of training, the mean of 5 mini-batches, 2 either side." in lines
    assert "Iterations, seconds: to a loss of 0.480, SGD Nesterov's at its end." in lines
    assert "stopped" not in text


def test_table_of_a_cut_and_of_a_diverged_run(make_record: MakeRecord) -> None:
    cut, diverged = make_record("sgd", [2.0] * 6, 10), make_record("kfc", [2.0, math.inf], 10)
    text = printed(compare([cut, diverged]))
    assert "SGD Nesterov stopped after 6 of 10 steps." in text
    assert "diverged" in text
    assert "inf" not in text


def test_table_without_runs() -> None:
    assert "optimizer" in printed(compare([]))


def test_speed_up_in_words(comparison: Comparison, make_record: MakeRecord) -> None:
    assert report.speed_ups(comparison) == [
        "KFC (adam) takes 10.0 times fewer iterations and 9.0 times less time "
        "to the loss that SGD Nesterov ends with."
    ]
    abreast = compare([make_record("kfc", [2.0] * 6), make_record("sgd", [2.0] * 6)])
    assert "takes about as many iterations and about as much time" in report.speed_ups(abreast)[0]
    behind = compare([make_record("kfc", [3.0] * 6), make_record("sgd", [2.0] * 6)])
    assert report.speed_ups(behind) == []
    assert report.speed_ups(compare([])) == []


def test_plot_is_a_png(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "curves.of.losses"
    report.plot(comparison, "a net on digits", path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1500, 600)


def test_saved_runs(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report.save(comparison, {"data": "digits"}, interrupted=False, path=path)
    saved = json.loads(path.read_text())
    assert saved["settings"] == {"data": "digits"}
    assert saved["interrupted"] is False
    assert saved["target"]["reference"] == "sgd"
    assert saved["target"]["loss"] == pytest.approx(0.48)
    kfc, sgd = saved["runs"]
    assert (kfc["optimizer"], kfc["scaling"], sgd["scaling"]) == ("kfc", "adam", None)
    assert kfc["iterations_to_target"] == 4
    assert kfc["losses"][:3] == [2.0, 1.0, 0.5]
    assert len(kfc["seconds"]) == kfc["steps"] == kfc["planned_steps"] == 40
    assert kfc["tested"] == [0.5, 0.75]
    assert {"platform", "python", "torch", "threads"} <= saved["machine"].keys()


def test_saved_numbers_are_standard_json(make_record: MakeRecord, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    diverged = compare([make_record("sgd", [2.0, math.nan], 5)])
    report.save(diverged, {}, interrupted=True, path=path)
    (run,) = json.loads(path.read_text(), parse_constant=pytest.fail)["runs"]
    assert run["losses"] == [2.0, None]
    assert run["diverged"] is True
    assert run["final_loss"] is None
