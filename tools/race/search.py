"""Which runs of one optimizer in one cell are still to be made: its rates, then its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from kfc_fx.tools.race.results import RunResult, RunSpec


@dataclass(frozen=True)
class SearchSpec:
    """How every optimizer is tuned: ``rates`` learning rates, each ``factor`` times the one
    before, around a centre; up to ``widenings`` more where the best is at an edge; the best
    repeated until it has ``seeds`` runs; where ``shortened``, KFC's runs shortened in the end."""

    rates: int = 4
    factor: float = 3.0
    widenings: int = 2
    seeds: int = 3
    shortened: bool = True


@dataclass(frozen=True)
class Entry:
    """One optimizer in one cell, all but its learning rate and seed.

    ``steps`` are those that its rate is found by; ``cell_steps`` the cell's, where they differ;
    ``seeds`` those of the best rate, where they are not the search's; ``finer``: whether one rate
    halfway between the two best is tried, too.
    """

    task: str
    batch_size: int
    steps: int
    optimizer: str
    cell_steps: int | None = None
    seeds: int | None = None
    finer: bool = False

    @property
    def cell(self) -> tuple[str, int, int]:
        """Task, batch size and steps of the cell."""
        return self.task, self.batch_size, self.cell_steps or self.steps

    def seeds_of(self, search: SearchSpec) -> int:
        """Runs of the best rate."""
        return self.seeds or search.seeds

    def run(self, lr: float, seed: int = 0) -> RunSpec:
        """The run of a learning rate and a seed."""
        own = (self.task, self.batch_size, self.steps, self.optimizer)
        return RunSpec(*own, lr, seed, self.cell_steps)

    def runs(self, results: Mapping[RunSpec, RunResult]) -> list[RunResult]:
        """The finished runs of this entry."""
        return [run for spec, run in results.items() if replace(spec, lr=0, seed=0) == self.run(0)]


def grid(centre: float, search: SearchSpec) -> list[float]:
    """The rates to begin with, ascending."""
    offsets = [number - (search.rates - 1) / 2 for number in range(search.rates)]
    return [_rounded(centre * search.factor**offset) for offset in offsets]


def best_rate(runs: list[RunResult]) -> float | None:
    """The rate whose run of seed 0 ends with the lowest training loss; ``None`` where all
    diverged."""
    return next(iter(best_rates(runs)), None)


def best_rates(runs: list[RunResult]) -> list[float]:
    """The rates whose runs of seed 0 did not diverge, the lowest training loss first."""
    finished = [run for run in runs if run.spec.seed == 0 and not run.diverged]
    return [run.spec.lr for run in sorted(finished, key=lambda run: run.final_loss)]


def next_runs(
    entry: Entry, centre: float, search: SearchSpec, results: Mapping[RunSpec, RunResult]
) -> list[RunSpec]:
    """The runs that can be made now, none of which is in ``results``; empty at the end.

    They depend on nothing but what is finished, so that a search which was stopped goes on
    where it was.
    """
    begin = grid(centre, search)
    missing = [run for run in map(entry.run, begin) if run not in results]
    if missing:
        return missing
    tried = [run for run in entry.runs(results) if run.spec.seed == 0]
    wider = _wider(tried, begin, search)
    if wider is not None:
        return [entry.run(wider)]
    between = _between(tried, search) if entry.finer else None
    if between is not None:
        return [entry.run(between)]
    best = best_rate(tried)
    if best is None:
        return []
    repeats = (entry.run(best, seed) for seed in range(1, entry.seeds_of(search)))
    return [run for run in repeats if run not in results]


def _wider(tried: list[RunResult], begin: list[float], search: SearchSpec) -> float | None:
    """One more rate beyond the edge that the best lies at, if it does and one may be added."""
    rates = {run.spec.lr for run in tried}
    if len(rates) - len(begin) >= search.widenings:
        return None
    best = best_rate(tried)
    if best is None or math.isclose(best, min(rates)):
        return _rounded(min(rates) / search.factor)
    if math.isclose(best, max(rates)):
        return _rounded(max(rates) * search.factor)
    return None


def _between(tried: list[RunResult], search: SearchSpec) -> float | None:
    """The rate halfway between the best and the better of its neighbours, in logarithms, unless
    a grid that wide has been refined already."""
    rates = sorted(run.spec.lr for run in tried)
    steps = [upper / lower for lower, upper in pairwise(rates)]
    best = best_rates(tried)
    if len(best) < 2 or min(steps) < 0.9 * search.factor:
        return None
    place = rates.index(best[0])
    neighbours = [rate for rate in best if abs(rates.index(rate) - place) == 1]
    return _rounded(math.sqrt(best[0] * neighbours[0])) if neighbours else None


def _rounded(rate: float) -> float:
    """To three digits: a rate names a run, and must come out the same every time."""
    return float(f"{rate:.3g}")
