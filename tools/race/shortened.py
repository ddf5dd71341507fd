"""Shortened runs: the fewest steps, with a decay of their own, that end as low as a rival.

Towards the end of a run the rate decays and every optimizer's loss falls steeply, so that a curve
passes a rival's end hardly earlier than it ends itself, however much lower that is. What the user
of an optimizer wants to know is how short a run would have done.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kfc_fx.tools.race.results import RunResult, RunSpec
from kfc_fx.tools.race.search import Entry, SearchSpec, best_rates

UP_TO_THREE = (1.2, 1.35, 1.5, 1.6, 1.75, 1.9, 2, 2.25, 2.5)
FEWER = (*UP_TO_THREE, 3, 3.5, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)
"""Times fewer steps than a cell's that may be tried."""
LEAST_STEPS = 2
RATES = 2
"""Of each length: short runs may want another rate than whole ones. Rivals have four or more."""


def lengths(entry: Entry) -> list[int]:
    """Steps of the runs that may be made, the longest first."""
    found = dict.fromkeys(round(entry.cell[2] / fewer) for fewer in FEWER)
    return [steps for steps in found if LEAST_STEPS <= steps < entry.steps]


def next_shortened(
    entry: Entry,
    targets: Sequence[float],
    search: SearchSpec,
    results: Mapping[RunSpec, RunResult],
) -> list[RunSpec]:
    """The shortened runs of ``entry`` that can be made now; empty at the end.

    For each of ``targets``, the rivals' final losses, a bisection with seed 0 finds the shortest
    length that ends near the target: no further above it than the seeds of a whole run are apart.
    Each length is run at the rates that were best for whole runs. The length found is then run with
    all seeds at the better of its rates. If their mean does not reach the target, the next longer
    length is run so.
    """
    runs = entry.runs(results)
    rates = best_rates(runs)[:RATES]
    if not rates:
        return []
    whole = [run.final_loss for run in runs if run.spec.lr == rates[0] and not run.diverged]
    known = _ShortenedRuns(entry, rates, entry.seeds_of(search), results)
    for target in targets:
        if missing := known.missing_for(target, apart=max(whole) - min(whole)):
            return missing
    return []


@dataclass(frozen=True)
class _ShortenedRuns:
    """The shortened runs of one entry that were made.

    Attributes:
        rates: at which each length is tried.
        seeds: runs of a length that decide whether it reaches a target.
    """

    entry: Entry
    rates: Sequence[float]
    seeds: int
    results: Mapping[RunSpec, RunResult]

    def missing_for(self, target: float, apart: float) -> list[RunSpec]:
        """Runs to make next, until the shortest length that reaches ``target`` is known."""
        ascending = lengths(self.entry)[::-1]
        low, high = 0, len(ascending)
        while low < high:
            middle = (low + high) // 2
            if missing := self._missing_rates(ascending[middle]):
                return missing
            is_near = self._better(ascending[middle]).final_loss <= target + apart
            low, high = (low, middle) if is_near else (middle + 1, high)
        for steps in ascending[low:]:
            if missing := self._missing_rates(steps) or self._missing_seeds(steps):
                return missing
            if statistics.fmean(self.results[s].final_loss for s in self._seeds(steps)) <= target:
                break
        return []

    def _missing_rates(self, steps: int) -> list[RunSpec]:
        return [spec for spec in self._rates(steps) if spec not in self.results]

    def _missing_seeds(self, steps: int) -> list[RunSpec]:
        return [spec for spec in self._seeds(steps) if spec not in self.results]

    def _better(self, steps: int) -> RunResult:
        return min((self.results[s] for s in self._rates(steps)), key=lambda run: run.final_loss)

    def _rates(self, steps: int) -> list[RunSpec]:
        return [self._spec(steps, lr, seed=0) for lr in self.rates]

    def _seeds(self, steps: int) -> list[RunSpec]:
        lr = self._better(steps).spec.lr
        return [self._spec(steps, lr, seed) for seed in range(self.seeds)]

    def _spec(self, steps: int, lr: float, seed: int) -> RunSpec:
        return replace(self.entry.run(lr, seed), steps=steps, cell_steps=self.entry.cell[2])


def shortest(runs: Iterable[RunResult], seeds: int, target: float) -> int | None:
    """Fewest steps of which all ``seeds`` runs of a rate were made and end at ``target`` or below
    in the mean; ``None`` where there are none."""
    ends: dict[tuple[int, float], list[float]] = {}
    for run in runs:
        ends.setdefault((run.spec.steps, run.spec.lr), []).append(run.final_loss)
    found = [
        steps
        for (steps, _), losses in ends.items()
        if len(losses) >= seeds and statistics.fmean(losses) <= target
    ]
    return min(found, default=None)
