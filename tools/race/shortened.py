"""Shortened runs: the fewest steps, with a decay of their own, that end as low as a rival.

Towards the end of a run the rate decays and every optimizer's loss falls steeply, so that a curve
passes a rival's end hardly earlier than it ends itself, however much lower that is. What the user
of an optimizer wants to know is how short a run would have done.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

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

    For each of ``targets``, the rivals' final losses, the shortest of seed 0 that ends no further
    above it than the seeds of a whole run are apart is found by bisection, each length at the rates
    that were best for whole runs. It is repeated with the other seeds at its better rate; if their
    mean does not reach the target, the next longer one is, made at once if it was passed over.
    """
    runs = entry.runs(results)
    rates = best_rates(runs)[:RATES]
    if not rates or not targets:
        return []
    whole = [run.final_loss for run in runs if run.spec.lr == rates[0] and not run.diverged]
    apart = max(whole) - min(whole)
    ascending = lengths(entry)[::-1]

    def missing_at(steps: int) -> list[RunSpec]:
        return [spec for lr in rates if (spec := _spec(entry, steps, lr, 0)) not in results]

    def first_at(steps: int) -> RunResult:
        return min(
            (results[_spec(entry, steps, lr, 0)] for lr in rates), key=lambda run: run.final_loss
        )

    for target in targets:
        low, high = 0, len(ascending)
        while low < high:
            middle = (low + high) // 2
            if missing := missing_at(ascending[middle]):
                return missing
            near = first_at(ascending[middle]).final_loss <= target + apart
            low, high = (low, middle) if near else (middle + 1, high)
        for steps in ascending[low:]:
            if missing := missing_at(steps):
                return missing
            lr = first_at(steps).spec.lr
            specs = [_spec(entry, steps, lr, seed) for seed in range(entry.seeds_of(search))]
            if missing := [spec for spec in specs if spec not in results]:
                return missing
            if statistics.fmean(results[spec].final_loss for spec in specs) <= target:
                break
    return []


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


def _spec(entry: Entry, steps: int, lr: float, seed: int) -> RunSpec:
    return replace(entry.run(lr, seed), steps=steps, cell_steps=entry.cell[2])
