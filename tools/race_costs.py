"""What a step of each optimizer costs in steps of SGD, measured in turns in one block."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfc_fx.optim import KFC
from kfc_fx.tools.race_optimizers import Entered
from kfc_fx.tools.race_results import CostResult
from kfc_fx.tools.race_run import batches, device_name, make, take_step, versions
from kfc_fx.tools.race_tasks import RaceData, TaskSpec

REFERENCE = "sgd"
LEAST_INTERVAL = 10
TURN = 5
LEARNING_RATE = 1e-5
"""So small that no network leaves the place where its steps are typical."""


@dataclass
class Racer:
    """One optimizer with a network of its own, and what its turns took."""

    name: str
    entered: Entered
    step: Callable[[], object]
    early_seconds: list[float] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)

    def turn(self, steps: int) -> float:
        """Mean seconds of ``steps`` steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - started) / steps


def measure_costs(
    task: TaskSpec, batch_size: int, names: Sequence[str], data: RaceData, rounds: int
) -> list[CostResult]:
    """Cost of every optimizer of ``names``, and of SGD, which they are relative to.

    All take their first steps in turns of five, then ``rounds`` turns of a whole refresh
    interval each, beginning when no optimizer is in its early phase any more.
    """
    racers = [_racer(task, name, batch_size, data) for name in dict.fromkeys((REFERENCE, *names))]
    interval = whole_interval(racers)
    early_steps = whole_early_phase(racers)
    for racer in racers:
        racer.turn(1)  # the first step: caches, generated code
    for _ in range(early_steps // TURN):
        for racer in racers:
            racer.early_seconds.append(racer.turn(TURN))
    for _ in range(rounds):
        for racer in racers:
            racer.round_seconds.append(racer.turn(interval))
    device = data.train.inputs.device
    phases = (early_steps, interval)
    return [_cost(task, batch_size, racer, racers[0], phases, device) for racer in racers]


def whole_interval(racers: Sequence[Racer]) -> int:
    """Steps that hold a whole number of every KFC's statistics and refreshes."""
    schedules = [kfc.schedule for kfc in _kfcs(racers)]
    intervals = [(each.factor_interval, each.inverse_interval) for each in schedules]
    return math.lcm(LEAST_INTERVAL, *(number for pair in intervals for number in pair))


def whole_early_phase(racers: Sequence[Racer]) -> int:
    """Steps of the longest early phase, in whole turns."""
    longest = max((kfc.schedule.early_phase for kfc in _kfcs(racers)), default=0)
    return math.ceil(longest / TURN) * TURN


def _kfcs(racers: Sequence[Racer]) -> list[KFC]:
    optimizers = [each for racer in racers for each in racer.entered.optimizers]
    return [each for each in optimizers if isinstance(each, KFC)]


def _racer(task: TaskSpec, name: str, batch_size: int, data: RaceData) -> Racer:
    entered = make(task, name, LEARNING_RATE, 0, data, batch_size)
    source = batches(data.train, batch_size, 0)
    return Racer(name, entered, _stepper(entered, task, source))


def _stepper(
    entered: Entered, task: TaskSpec, source: Iterator[tuple[Tensor, Tensor]]
) -> Callable[[], object]:
    return lambda: take_step(entered, task, *next(source))


def _cost(
    task: TaskSpec,
    batch_size: int,
    racer: Racer,
    reference: Racer,
    phases: tuple[int, int],
    device: torch.device,
) -> CostResult:
    early_steps, interval = phases
    ratios = [
        own / other for own, other in zip(racer.round_seconds, reference.round_seconds, strict=True)
    ]
    low, mean, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return CostResult(
        task=task.name,
        batch_size=batch_size,
        optimizer=racer.name,
        mean=mean,
        low=low,
        high=high,
        early=_ratio_of_sums(racer.early_seconds, reference.early_seconds),
        early_steps=early_steps,
        interval=interval,
        rounds=len(ratios),
        sgd_seconds=statistics.median(reference.round_seconds),
        threads=torch.get_num_threads(),
        versions=versions(),
        device=device_name(device),
    )


def _ratio_of_sums(own: Sequence[float], other: Sequence[float]) -> float:
    """One where there is no early phase."""
    return sum(own) / sum(other) if other else 1.0
