"""Shortened runs of ``kfc-fx bench train``: which are made, and what they show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_race_search import cost, result

from kfc_fx.tools.race.command import chosen_cells, entry_of
from kfc_fx.tools.race.report import shortened
from kfc_fx.tools.race.results import ResultsFile, RunResult, RunSpec
from kfc_fx.tools.race.search import Entry, SearchSpec
from kfc_fx.tools.race.shortened import lengths, next_shortened, shortest
from kfc_fx.tools.race.standings import cells, rival_ends

ENTRY = Entry("gpt", 128, 60, "kfc-adam")
SEARCH = SearchSpec(seeds=2)
LR = 0.1


def constant(spec: RunSpec, end: float) -> RunResult:
    """A run whose loss is ``end`` throughout."""
    made = result(spec, end)
    return RunResult(**{**vars(made), "losses": (end,) * spec.steps})


def searched(
    end_of: Callable[[RunSpec], float], targets: list[float], apart: float = 0.0
) -> dict[RunSpec, RunResult]:
    """All shortened runs where each ends at ``end_of`` it, after the whole ones, which end ``apart``
    from each other."""
    specs = [ENTRY.run(LR, seed) for seed in range(SEARCH.seeds)]
    results = {spec: constant(spec, 0.5 + apart * spec.seed) for spec in specs}
    while due := next_shortened(ENTRY, targets, SEARCH, results):
        assert not set(due) & set(results)
        results |= {spec: constant(spec, end_of(spec)) for spec in due}
    return {spec: run for spec, run in results.items() if spec.cell_steps == ENTRY.steps}


def test_lengths_are_shares_of_the_cell_s_steps() -> None:
    dense = [50, 44, 40, 38, 34, 32, 30, 27, 24, 20, 17, 15, 12, 10, 8, 6, 5, 4, 3, 2]
    assert lengths(ENTRY) == dense
    assert lengths(Entry("gpt", 128, 12, "kfc-adam")) == [10, 9, 8, 7, 6, 5, 4, 3, 2]
    # Of one whose rate is found by shorter runs, only those that are shorter still.
    assert lengths(Entry("kfc-cifar", 4096, 15, "kfc-adam", 60)) == [12, 10, 8, 6, 5, 4, 3, 2]


def test_the_shortest_for_each_target_is_found_by_bisection() -> None:
    made = searched(lambda spec: 60 / spec.steps, targets=[3.5, 1.6])
    firsts = [spec.steps for spec in made if spec.seed == 0]
    assert {17, 20, 34, 38} <= set(firsts)
    assert len(firsts) <= len(lengths(ENTRY)) / 2
    # The shortest for each target has its second seed, no other.
    assert {spec.steps for spec in made if spec.seed == 1} == {20, 38}
    assert {spec.lr for spec in made} == {LR}


@pytest.mark.parametrize("target", [0.9, 1.1, 2.2, 5.5, 29.0, 40.0])
def test_bisection_finds_what_all_lengths_would(target: float) -> None:
    made = searched(lambda spec: 60 / spec.steps, [target])
    expected = min((n for n in lengths(ENTRY) if 60 / n <= target), default=None)
    assert shortest(made.values(), SEARCH.seeds, target) == expected


def test_a_length_that_one_seed_alone_reaches_is_not_enough() -> None:
    made = searched(
        lambda spec: 60 / spec.steps + (2 if (spec.steps, spec.seed) == (20, 1) else 0), [3.5]
    )
    assert {spec.steps for spec in made if spec.seed == 1} == {20, 24}
    assert shortest(made.values(), SEARCH.seeds, 3.5) == 24
    assert shortest(made.values(), SEARCH.seeds, 1.0) is None


def test_a_first_seed_that_misses_by_less_than_seeds_differ_is_repeated() -> None:
    def end_of(spec: RunSpec) -> float:
        return 60 / spec.steps + (0.6 if spec.seed == 0 else -0.6)

    made = searched(end_of, [4.2])
    assert {spec.steps for spec in made if spec.seed == 1} == {17}
    made = searched(end_of, [4.2], apart=0.5)
    assert {spec.steps for spec in made if spec.seed == 1} == {15}  # 4.6 and 3.4
    assert shortest(made.values(), SEARCH.seeds, 4.2) == 15


def test_a_short_run_may_want_another_rate_than_whole_ones() -> None:
    specs = [ENTRY.run(lr, seed) for lr, seed in ((LR, 0), (LR, 1), (0.3, 0), (0.9, 0))]
    results = {spec: constant(spec, spec.lr) for spec in specs}
    while due := next_shortened(ENTRY, [3.5], SEARCH, results):
        results |= {spec: constant(spec, 60 / spec.steps + (spec.lr == LR)) for spec in due}
    made = [spec for spec in results if spec.cell_steps == ENTRY.steps]
    assert {spec.lr for spec in made} == {LR, 0.3}
    assert {(spec.steps, spec.lr) for spec in made if spec.seed == 1} == {(20, 0.3)}
    assert shortest([results[spec] for spec in made], SEARCH.seeds, 3.5) == 20
    # Not two seeds of different rates.
    one_each = [spec for spec in made if spec.seed == 0]
    assert shortest([results[spec] for spec in one_each], SEARCH.seeds, 3.5) is None


def test_nothing_is_shortened_without_a_target_or_a_run_that_ended() -> None:
    whole = {ENTRY.run(LR): result(ENTRY.run(LR), None)}
    assert next_shortened(ENTRY, [1.0], SEARCH, whole) == []
    ended = {ENTRY.run(LR): constant(ENTRY.run(LR), 0.5)}
    assert next_shortened(ENTRY, [], SEARCH, ended) == []


def test_a_diverged_length_reaches_nothing() -> None:
    specs = [ENTRY.run(LR, seed) for seed in range(SEARCH.seeds)]
    results = {spec: constant(spec, 0.5) for spec in specs}
    (first,) = next_shortened(ENTRY, [3.0], SEARCH, results)
    results[first] = result(first, None)
    (second,) = next_shortened(ENTRY, [3.0], SEARCH, results)
    assert second.steps > first.steps


@pytest.fixture
def file(tmp_path: Path) -> ResultsFile:
    """SGD ends at 2 in 60 steps, KFC in 15, and at 1 in 60."""
    file = ResultsFile(tmp_path / "results.json")
    for name, end in (("sgd", 2.0), ("kfc-adam", 1.0)):
        for seed in (0, 1):
            file.add_run(constant(Entry("gpt", 128, 60, name).run(LR, seed), end))
    for steps, end in ((20, 1.5), (15, 1.9), (10, 2.5)):
        for seed in (0, 1):
            file.add_run(constant(RunSpec("gpt", 128, steps, "kfc-adam", LR, seed, 60), end))
    file.add_costs([cost("sgd", 1.0, 1.0), cost("kfc-adam", 1.5, 3.0)])
    return file


def test_shortened_runs_belong_to_their_cell_and_move_no_end(file: ResultsFile) -> None:
    (cell,) = cells(file)
    assert rival_ends(file, ("gpt", 128, 60)) == {"sgd": 2.0}
    _, kfc = cell.standings
    assert (len(kfc.curve), kfc.lr, kfc.final and kfc.final.seeds) == (60, LR, 2)
    (target,) = kfc.targets
    assert (target.steps, target.shortened) == (1, 15)
    assert target.shortened_seconds == 5 * 3.0 + 10 * 1.5  # five early steps
    assert shortened(cell) == [
        "KFC adam ends as low as SGD Nesterov in 15 steps (4 times fewer, in 0.50 of its time)."
    ]


def test_a_whole_run_is_no_shorter(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "whole.json")
    for name, end in (("sgd", 2.0), ("kfc-adam", 1.0)):
        file.add_run(constant(Entry("gpt", 128, 60, name).run(LR), end))
    (cell,) = cells(file)
    assert shortened(cell) == ["KFC adam ends as low as SGD Nesterov in 60 steps (as many)."]


def test_they_come_back_from_the_file(file: ResultsFile) -> None:
    assert ResultsFile(file.path).runs == file.runs


def test_short_runs_are_smoothed_over_an_eighth() -> None:
    spec = RunSpec("gpt", 128, 15, "kfc-adam", LR, 0, 60)
    falling = RunResult(
        **{**vars(result(spec, 1.0)), "losses": tuple(float(15 - step) for step in range(15))}
    )
    assert falling.curve[-1] == 1.5  # of the last two, where a whole run takes three
    assert math.isclose(falling.curve[7], 8.0)


def test_what_counts_is_the_loss_after_the_last_update(file: ResultsFile) -> None:
    # By its curve, a step behind, this run ends above SGD's 2.0; by what it leads to, below.
    for seed in (0, 1):
        made = constant(RunSpec("gpt", 128, 10, "kfc-adam", LR, seed, 60), 2.5)
        file.add_run(replace(made, end_loss=1.9))
    _, kfc = cells(file)[0].standings
    assert kfc.targets[0].shortened == 10
    # Where a rival's end was measured the same way, that is the target; its curve's is the curve's.
    for seed in (0, 1):
        made = constant(Entry("gpt", 128, 60, "sgd").run(LR, seed), 2.0)
        file.add_run(replace(made, end_loss=1.8))
    _, kfc = cells(file)[0].standings
    assert (kfc.targets[0].loss, kfc.targets[0].shortened, kfc.targets[0].steps) == (1.8, 20, 1)


def test_large_batches_find_kfc_s_rate_by_shorter_runs() -> None:
    ((task, cell),) = chosen_cells("kfc-cifar", "4096")
    entries = {name: entry_of(task, cell, name) for name in cell.of(("sgd", "kfc-adam", "soap"))}
    assert {name: entry.steps for name, entry in entries.items()} == {"sgd": 140, "kfc-adam": 7}
    assert {entry.cell for entry in entries.values()} == {("kfc-cifar", 4096, 140)}
    assert entries["sgd"].run(0.1).cell == entries["kfc-adam"].run(0.1).cell
    assert entries["sgd"].seeds_of(SearchSpec()) == 1
    assert all(entry.finer for entry in entries.values())


def test_published_scalings_have_one_seed_and_the_others_three() -> None:
    (task, cell), *_ = chosen_cells("gpt", "128")
    names = ("sgd", "kfc-adam", "kfc-spectral", "kfc-eigen", "kfc-inverse")
    seeds = [entry_of(task, cell, name).seeds_of(SearchSpec()) for name in names]
    assert seeds == [3, 3, 3, 1, 1]
