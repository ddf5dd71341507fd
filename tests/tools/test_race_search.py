"""The search of ``kfc-fx bench train``, its file, and how its figures are reckoned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kfc_fx.tools.failures import CommandError
from kfc_fx.tools.race.results import CostResult, ResultsFile, RunResult, RunSpec, rounded
from kfc_fx.tools.race.search import Entry, SearchSpec, best_rate, grid, next_runs
from kfc_fx.tools.race.standings import cells, steps_to

ENTRY = Entry("gpt", 128, 12, "sgd")
SEARCH = SearchSpec()


def result(spec: RunSpec, end: float | None, capture_seconds: float = 0.5) -> RunResult:
    """A run that falls from 12 by equal steps to ``end``, or diverges after two losses."""
    steps = spec.steps
    losses = (
        (12.0, None)
        if end is None
        else tuple(12 + (end - 12) * step / (steps - 1) for step in range(steps))
    )
    return RunResult(
        spec=spec,
        diverged=end is None,
        losses=losses,
        seconds=2.0 * len(losses),
        capture_seconds=capture_seconds,
        test_loss=end,
        test_accuracy=None,
        peak_memory=2**20,
        train_size=100,
        threads=1,
        workers=1,
        versions={"torch": "x"},
    )


def cost(optimizer: str, mean: float, early: float, sgd_seconds: float = 1.0) -> CostResult:
    return CostResult(
        "gpt", 128, optimizer, mean, mean, mean, early, 5, 10, 3, sgd_seconds, 1, {"torch": "x"}
    )


def searched(end_of: Callable[[float], float | None]) -> dict[RunSpec, RunResult]:
    """All runs of one search where a rate's end is ``end_of`` it."""
    results: dict[RunSpec, RunResult] = {}
    while due := next_runs(ENTRY, 1.0, SEARCH, results):
        assert not set(due) & set(results)
        results |= {spec: result(spec, end_of(spec.lr)) for spec in due}
    return results


def rates(results: dict[RunSpec, RunResult]) -> list[float]:
    return sorted({spec.lr for spec in results})


def test_grid_is_geometric_around_its_centre() -> None:
    assert grid(1.0, SEARCH) == [0.192, 0.577, 1.73, 5.2]
    assert grid(1.0, SearchSpec(rates=3)) == [0.333, 1.0, 3.0]


def test_a_best_rate_inside_the_grid_is_repeated_with_two_seeds() -> None:
    results = searched(lambda lr: abs(math.log(lr / 1.73)))
    assert rates(results) == grid(1.0, SEARCH)
    assert {spec.seed for spec in results if spec.lr == 1.73} == {0, 1, 2}
    assert len(results) == 6


@pytest.mark.parametrize(
    ("slope", "wider"), [(-1.0, [15.6, 46.8]), (1.0, [0.064, 0.0213])], ids=["high", "low"]
)
def test_a_best_rate_at_an_edge_widens_the_grid_twice_at_most(
    slope: float, wider: list[float]
) -> None:
    results = searched(lambda lr: 5 + slope * math.log10(lr))
    assert rates(results) == sorted([*grid(1.0, SEARCH), *wider])
    assert len(results) == 8
    assert {spec.seed for spec in results if spec.lr == wider[-1]} == {0, 1, 2}


def test_widening_ends_where_the_new_rate_is_worse() -> None:
    results = searched(lambda lr: abs(math.log(lr / 5.2)))
    assert rates(results) == [*grid(1.0, SEARCH), 15.6]


def finely_searched(end_of: Callable[[float], float | None]) -> dict[RunSpec, RunResult]:
    entry, results = replace(ENTRY, finer=True), dict[RunSpec, RunResult]()
    while due := next_runs(entry, 1.0, SEARCH, results):
        assert not set(due) & set(results)
        results |= {spec: result(spec, end_of(spec.lr)) for spec in due}
    return results


def test_a_finer_search_tries_one_rate_between_the_two_best() -> None:
    results = finely_searched(lambda lr: abs(math.log(lr / 1.2)))  # 1.73, then 0.577
    assert rates(results) == sorted([*grid(1.0, SEARCH), 0.999])
    assert {spec.seed for spec in results if spec.lr == 0.999} == {0, 1, 2}
    worse = finely_searched(lambda lr: 5.0 if lr == 0.999 else abs(math.log(lr / 1.2)))
    assert rates(worse) == rates(results)
    assert {spec.seed for spec in worse if spec.lr == 1.73} == {0, 1, 2}


def test_a_finer_search_needs_a_neighbour_that_did_not_diverge() -> None:
    results = finely_searched(lambda lr: 1.0 if lr == 1.73 else None)
    assert rates(results) == grid(1.0, SEARCH)


def test_an_optimizer_that_always_diverges_gets_lower_rates_and_no_seeds() -> None:
    results = searched(lambda lr: None)
    assert rates(results) == [0.0213, 0.064, *grid(1.0, SEARCH)]
    assert {spec.seed for spec in results} == {0}
    assert best_rate(list(results.values())) is None


def test_a_diverged_rate_is_never_the_best() -> None:
    results = searched(lambda lr: None if lr > 1 else 3.0 + lr)
    assert best_rate(list(results.values())) == rates(results)[0]


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    file = ResultsFile(path)
    ended, failed = result(ENTRY.run(0.1), 3.0), result(ENTRY.run(0.2), None)
    file.add_run(ended)
    file.add_run(failed)
    file.add_costs([cost("sgd", 1.0, 1.0), cost("muon", 1.5, 1.0)])
    again = ResultsFile(path)
    assert list(again.runs.values()) == list(file.runs.values())
    assert list(again.runs.values()) == [rounded(ended), rounded(failed)]
    assert list(again.costs) == list(file.costs)
    assert [child.name for child in path.parent.iterdir()] == ["results.json"]


def test_a_file_keeps_five_digits_of_curves_and_whole_ends(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.json")
    run = replace(result(ENTRY.run(0.1), 3.0), end_loss=1.23456789, seconds=0.000123456789)
    file.add_run(replace(run, losses=(2.3456789, None)))
    (kept,) = file.runs.values()
    assert (kept.end_loss, kept.seconds, kept.losses) == (1.23456789, 0.00012346, (2.3457, None))


def test_costs_of_a_new_block_replace_those_of_the_old_one(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.json")
    file.add_costs([cost("sgd", 1.0, 1.0), cost("muon", 1.5, 1.0)])
    file.add_costs([cost("sgd", 1.0, 1.0), cost("adamw", 1.1, 1.0)])
    assert [each.optimizer for each in file.costs] == ["sgd", "adamw"]


@pytest.mark.parametrize("text", ["{", "{}", '{"runs": [{"spec": {}}], "costs": []}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(CommandError, match=r"results\.json is not a file of this version"):
        ResultsFile(path)
    assert path.read_text() == text


def test_time_counts_the_early_phase_by_its_own_cost() -> None:
    measured = cost("kfc-adam", mean=1.5, early=3.0)  # five early steps
    assert [measured.relative_seconds(steps) for steps in (0, 2, 5, 7)] == [0, 6, 15, 18]


def test_steps_to_a_loss_are_counted_from_one() -> None:
    assert steps_to([4.0, 3.0, 2.0, 1.0], 2.5) == 3
    assert steps_to([4.0], 4.0) == 1
    assert steps_to([4.0, math.inf], 3.0) is None


def test_standings_measure_all_against_each_rival_s_end(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.json")
    ends = {"sgd": [6.0, 5.0, 7.0], "kfc-adam": [1.0, 1.0, 1.0], "muon": [None]}
    for name, of_seeds in ends.items():
        entry = Entry("gpt", 128, 12, name)
        for seed, end in enumerate(of_seeds):
            file.add_run(result(entry.run(0.1, seed), end))
        file.add_run(result(entry.run(0.9), 11.0 if name == "sgd" else None))
    file.add_costs([cost("sgd", 1.0, 1.0), cost("kfc-adam", 1.5, 3.0)])
    (cell,) = cells(file)
    sgd, muon, kfc = cell.standings
    assert (sgd.optimizer, muon.optimizer, kfc.optimizer) == ("sgd", "muon", "kfc-adam")
    assert sgd.final is not None
    # The last three of 12 losses that fall to 6, 5 and 7 by 6/11, 7/11 and 5/11 a step.
    assert sgd.final.mean == pytest.approx(6 + 6 / 11, rel=1e-4)
    assert (sgd.final.low, sgd.final.high) == pytest.approx((5 + 7 / 11, 7 + 5 / 11), rel=1e-4)
    assert (muon.lr, muon.final, muon.diverged) == (None, None, (0.1, 0.9))
    assert [target.rival for target in kfc.targets] == ["sgd"]
    # KFC falls by one a step from 12: 6.55 is passed at the seventh.
    (target,) = kfc.targets
    assert (target.steps, target.relative_seconds) == (7, 5 * 3 + 2 * 1.5)
    assert target.clock_seconds == 0.5 + 7 * 2
    assert sgd.targets[0].steps == 12
    assert muon.targets[0].steps is None
    assert (kfc.lr, kfc.diverged) == (0.1, (0.9,))


def test_a_seed_that_diverges_keeps_a_curve_from_its_target(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "results.json")
    for name, ends in {"sgd": (6.0, 6.0), "kfc-adam": (1.0, None)}.items():
        for seed, end in enumerate(ends):
            file.add_run(result(Entry("gpt", 128, 12, name).run(0.1, seed), end))
    (cell,) = cells(file)
    assert cell.standings[1].targets[0].steps is None
    assert cell.standings[1].final is not None
    assert cell.standings[1].final.mean == math.inf
