"""How the optimizers of one cell stand: ends, and steps and seconds to each rival's end."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kfc_fx.tools.race_optimizers import ENTRANTS, RIVALS
from kfc_fx.tools.race_results import CostResult, ResultsFile, RunResult
from kfc_fx.tools.race_search import best_rate


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds, and the lowest and highest of them."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class ToTarget:
    """What an optimizer needed for the final training loss of ``rival``; all ``None`` where it
    did not get there.

    ``relative_seconds`` are in mean SGD steps, by the step costs that were measured in turns;
    ``clock_seconds`` by the runs' own clock, the capture included.
    """

    rival: str
    loss: float
    steps: int | None
    relative_seconds: float | None
    clock_seconds: float | None


@dataclass(frozen=True)
class Standing:
    """One optimizer at its best learning rate; ``lr`` is ``None`` where every rate diverged.

    ``curve`` is the smoothed training loss by step, the mean over the seeds. ``rates`` are all
    that were tried, ``diverged`` those that did.
    """

    optimizer: str
    lr: float | None
    rates: tuple[float, ...]
    diverged: tuple[float, ...]
    curve: tuple[float, ...]
    final: Spread | None
    test_loss: Spread | None
    test_accuracy: Spread | None
    peak_memory: float | None
    capture_seconds: float | None
    cost: CostResult | None
    targets: tuple[ToTarget, ...] = ()


@dataclass(frozen=True)
class Cell:
    """All standings of one task, batch size and length, in the order of :data:`ENTRANTS`."""

    task: str
    batch_size: int
    steps: int
    train_size: int
    standings: tuple[Standing, ...]


def cells(file: ResultsFile) -> list[Cell]:
    """Every cell that has a run, in the order of the file."""
    keys = dict.fromkeys((s.task, s.batch_size, s.steps) for s in file.runs)
    return [_cell(key, file) for key in keys]


def steps_to(curve: Sequence[float], loss: float) -> int | None:
    """Steps until ``curve`` is at ``loss`` or below for the first time."""
    return next((step for step, value in enumerate(curve, 1) if value <= loss), None)


def _cell(key: tuple[str, int, int], file: ResultsFile) -> Cell:
    runs = [r for r in file.runs.values() if (r.spec.task, r.spec.batch_size, r.spec.steps) == key]
    costs = {c.optimizer: c for c in file.costs if (c.task, c.batch_size) == key[:2]}
    names = [name for name in ENTRANTS if any(run.spec.optimizer == name for run in runs)]
    best = {name: _best(name, runs) for name in names}
    targets = {
        name: _mean_curve(best[name])[-1]
        for name in RIVALS
        if best.get(name) and not any(run.diverged for run in best[name])
    }
    standings = tuple(_standing(name, runs, best[name], costs.get(name), targets) for name in names)
    return Cell(*key, runs[0].train_size, standings)


def _best(name: str, runs: Iterable[RunResult]) -> list[RunResult]:
    own = [run for run in runs if run.spec.optimizer == name]
    lr = best_rate(own)
    return [run for run in own if run.spec.lr == lr]


def _standing(
    name: str,
    runs: Sequence[RunResult],
    best: list[RunResult],
    cost: CostResult | None,
    targets: dict[str, float],
) -> Standing:
    tried = sorted((r for r in runs if r.spec.optimizer == name), key=lambda run: run.spec.lr)
    curve = _mean_curve(best)
    return Standing(
        optimizer=name,
        lr=best[0].spec.lr if best else None,
        rates=tuple(dict.fromkeys(run.spec.lr for run in tried)),
        diverged=tuple(dict.fromkeys(run.spec.lr for run in tried if run.diverged)),
        curve=tuple(curve),
        final=_spread(run.final_loss for run in best),
        test_loss=_spread(run.test_loss for run in best),
        test_accuracy=_spread(run.test_accuracy for run in best),
        peak_memory=_mean(run.peak_memory for run in best),
        capture_seconds=_mean(run.capture_seconds for run in best),
        cost=cost,
        targets=tuple(_to_target(rival, targets[rival], curve, cost, best) for rival in targets),
    )


def _to_target(
    rival: str, loss: float, curve: list[float], cost: CostResult | None, best: list[RunResult]
) -> ToTarget:
    steps = steps_to(curve, loss)
    if steps is None:
        return ToTarget(rival, loss, None, None, None)
    clock = _mean(run.capture_seconds + sum(run.seconds[:steps]) for run in best)
    return ToTarget(rival, loss, steps, cost and cost.relative_seconds(steps), clock)


def _mean_curve(runs: Sequence[RunResult]) -> list[float]:
    """Infinite from where one of them diverged."""
    return [statistics.fmean(losses) for losses in zip(*(r.curve for r in runs), strict=True)]


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), min(known), max(known), len(known))


def _mean(values: Iterable[float | None]) -> float | None:
    spread = _spread(values)
    return None if spread is None else spread.mean
