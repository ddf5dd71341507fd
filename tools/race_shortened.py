"""Shortened runs: the fewest steps, with a decay of their own, that end as low as a rival.

Towards the end of a run the rate decays and every optimizer's loss falls steeply, so that a curve
passes a rival's end hardly earlier than it ends itself, however much lower that is. What the user
of an optimizer wants to know is how short a run would have done.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kfc_fx.tools.race_results import RunResult, RunSpec
from kfc_fx.tools.race_search import Entry, SearchSpec, best_rate

FEWER = (1.2, 1.5, 2, 3, 4, 6, 8, 10, 12, 15, 20, 25, 30)
"""Times fewer steps than a cell's that are tried."""
LEAST_STEPS = 2


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
    """The shortened runs of ``entry`` that can be made now, at its best rate; empty at the end.

    Shorter and shorter ones of seed 0, until one ends above all ``targets``, the rivals' final
    losses, by more than the whole runs of the rate are apart. Then for each target the shortest
    that reached it, up to as much, is repeated with the other seeds; if their mean does not reach
    it, the next longer one.
    """
    runs = entry.runs(results)
    lr = best_rate(runs)
    if lr is None or not targets:
        return []
    whole = [run.final_loss for run in runs if run.spec.lr == lr and not run.diverged]
    apart = max(whole) - min(whole)
    ends: dict[int, float] = {}
    for steps in lengths(entry):
        first = _spec(entry, steps, lr, 0)
        if first not in results:
            return [first]
        ends[steps] = results[first].final_loss
        if ends[steps] > max(targets) + apart:
            break
    for target in targets:
        for steps in sorted(steps for steps, end in ends.items() if end <= target + apart):
            specs = [_spec(entry, steps, lr, seed) for seed in range(entry.seeds_of(search))]
            missing = [spec for spec in specs if spec not in results]
            if missing:
                return missing
            if statistics.fmean(results[spec].final_loss for spec in specs) <= target:
                break
    return []


def shortest(runs: Iterable[RunResult], seeds: int, target: float) -> int | None:
    """Fewest steps of which all ``seeds`` runs were made and end at ``target`` or below in the
    mean; ``None`` where there are none."""
    ends: dict[int, list[float]] = {}
    for run in runs:
        ends.setdefault(run.spec.steps, []).append(run.final_loss)
    found = [
        steps
        for steps, losses in ends.items()
        if len(losses) >= seeds and statistics.fmean(losses) <= target
    ]
    return min(found, default=None)


def _spec(entry: Entry, steps: int, lr: float, seed: int) -> RunSpec:
    return replace(entry.run(lr, seed), steps=steps, cell_steps=entry.cell[2])
