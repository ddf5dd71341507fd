"""How the optimizers of one cell stand: ends, and steps and seconds to each rival's end."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kfc_fx.tools.race.optimizers import ENTRANTS, RIVALS
from kfc_fx.tools.race.results import CostResult, ResultsFile, RunResult
from kfc_fx.tools.race.search import best_rate
from kfc_fx.tools.race.shortened import shortest


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds, and the lowest and highest of them."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class ToTarget:
    """What an optimizer needed for the final training loss ``loss`` of ``rival``; all ``None``
    where it did not get there.

    ``steps`` are where the curve is for the first time as low as the rival's ends, ``shortened``
    those of the shortest run whose own final loss is as low as ``loss``. ``relative_seconds`` and
    ``shortened_seconds`` are in mean SGD steps, by the step costs that were measured in turns;
    ``clock_seconds`` by the runs' own clock, the capture included.
    """

    rival: str
    loss: float
    steps: int | None
    relative_seconds: float | None
    clock_seconds: float | None
    shortened: int | None = None
    shortened_seconds: float | None = None


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
    keys = dict.fromkeys(spec.cell for spec in file.runs)
    return [_cell(key, file) for key in keys]


def steps_to(curve: Sequence[float], loss: float) -> int | None:
    """Steps until ``curve`` is at ``loss`` or below for the first time."""
    return next((step for step, value in enumerate(curve, 1) if value <= loss), None)


def rival_ends(file: ResultsFile, cell: tuple[str, int, int]) -> dict[str, float]:
    """The final training loss of each rival in a cell (task, batch size, steps), at its best rate
    and as a mean over its seeds; without those that diverged."""
    return {name: _mean_end(runs) for name, runs in _rivals(cell, file).items()}


def _rivals(cell: tuple[str, int, int], file: ResultsFile) -> dict[str, list[RunResult]]:
    """The runs of each rival at its best rate, without rivals of which one diverged."""
    best = {name: _best(_tuned(name, _runs_of(cell, file))) for name in RIVALS}
    return {
        name: runs for name, runs in best.items() if runs and not any(run.diverged for run in runs)
    }


def _runs_of(cell: tuple[str, int, int], file: ResultsFile) -> list[RunResult]:
    return [run for run in file.runs.values() if run.spec.cell == cell]


def _cell(key: tuple[str, int, int], file: ResultsFile) -> Cell:
    runs = _runs_of(key, file)
    costs = {c.optimizer: c for c in file.costs if (c.task, c.batch_size) == key[:2]}
    names = [name for name in ENTRANTS if any(run.spec.optimizer == name for run in runs)]
    targets = {
        name: (_mean_end(rivals), _mean_curve(rivals)[-1])
        for name, rivals in _rivals(key, file).items()
    }
    standings = tuple(_standing(name, runs, costs.get(name), targets) for name in names)
    return Cell(*key, runs[0].train_size, standings)


def _tuned(name: str, runs: Iterable[RunResult]) -> list[RunResult]:
    """The runs that an optimizer's rate was found by: its longest, shortened ones left out."""
    own = [run for run in runs if run.spec.optimizer == name]
    longest = max((run.spec.steps for run in own), default=0)
    return [run for run in own if run.spec.steps == longest]


def _best(tuned: list[RunResult]) -> list[RunResult]:
    lr = best_rate(tuned)
    return [run for run in tuned if run.spec.lr == lr]


def _standing(
    name: str,
    runs: Sequence[RunResult],
    cost: CostResult | None,
    targets: dict[str, tuple[float, float]],
) -> Standing:
    tried = sorted(_tuned(name, runs), key=lambda run: run.spec.lr)
    best = _best(tried)
    curve = _mean_curve(best)
    own = [run for run in runs if run.spec.optimizer == name]
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
        targets=tuple(
            _to_target(rival, *targets[rival], curve, cost, best, own) for rival in targets
        ),
    )


def _to_target(
    rival: str,
    loss: float,
    curve_end: float,
    curve: list[float],
    cost: CostResult | None,
    best: list[RunResult],
    own: list[RunResult],
) -> ToTarget:
    steps, fewest = steps_to(curve, curve_end), shortest(own, len(best), loss)
    clock = None
    if steps is not None:
        clock = _mean(run.clock_seconds(steps) for run in best)
    seconds, shortened_seconds = (
        None if cost is None or number is None else cost.relative_seconds(number)
        for number in (steps, fewest)
    )
    return ToTarget(rival, loss, steps, seconds, clock, fewest, shortened_seconds)


def _mean_end(runs: Sequence[RunResult]) -> float:
    return statistics.fmean(run.final_loss for run in runs)


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
