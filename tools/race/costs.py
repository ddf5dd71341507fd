"""What a step of each optimizer costs in steps of SGD, measured in turns in one block."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kfc_fx.engine.work import refresh_flops
from kfc_fx.optim.kfc import KFC
from kfc_fx.tools.race.optimizers import Entered
from kfc_fx.tools.race.results import CostResult
from kfc_fx.tools.race.run import batches, device_name, make, take_step, versions
from kfc_fx.tools.race.tasks import RaceData, TaskSpec

REFERENCE = "sgd"
SHORT_TURN = 10
"""Steps of a turn where each KFC has statistics and refreshes at the same ones: one of those, and
enough of the others to know them by. Also SOAP's interval."""
LEARNING_RATE = 1e-5
"""So small that no network leaves the place where its steps are typical."""


@dataclass
class Racer:
    """One optimizer with a network of its own, and what its turns took: of KFC, the first step of
    each interval apart, which has statistics and a refresh."""

    name: str
    entered: Entered
    step: Callable[[], object]
    first_seconds: list[float] = field(default_factory=list)
    rest_seconds: list[float] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)

    @property
    def kfc(self) -> KFC | None:
        """The optimizer, where it is KFC."""
        found = [each for each in self.entered.optimizers if isinstance(each, KFC)]
        return found[0] if found else None

    def turn(self, steps: int) -> float:
        """Mean seconds of ``steps`` steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - started) / steps

    def skip_early_phase(self, interval: int) -> None:
        """Let KFC's next step be the first of a whole interval after its early phase, as if it had
        taken the steps until then."""
        self.turn(1)  # the first step: caches, generated code
        if self.kfc is not None:
            self._steps_until_interval(interval, 1)
            self.turn(1)

    def interval(self, interval: int, steps: int) -> None:
        """A turn of ``steps`` steps: the first of an interval, and others. What the first cost
        counts once in ``interval`` steps."""
        if self.kfc is None:
            self.round_seconds.append(self.turn(steps))
            return
        self.first_seconds.append(self.turn(1))
        self._steps_until_interval(interval, steps - 1)
        self.rest_seconds.append(self.turn(steps - 1))
        both = self.first_seconds[-1] + (interval - 1) * self.rest_seconds[-1]
        self.round_seconds.append(both / interval)

    def _steps_until_interval(self, interval: int, steps: int) -> None:
        assert self.kfc is not None
        begin = math.ceil((self.kfc.schedule.early_phase + 1) / interval) * interval
        self.kfc.diagnostics.steps = begin - steps


def measure_costs(
    task: TaskSpec, batch_size: int, names: Sequence[str], data: RaceData, rounds: int
) -> list[CostResult]:
    """Cost of every optimizer of ``names``, and of SGD, which they are relative to.

    All take ``rounds`` turns. KFC's early phase is skipped; what it costs, and what a whole refresh
    interval does, is reckoned from the steps with statistics and a refresh and those without.
    """
    racers = [_racer(task, name, batch_size, data) for name in dict.fromkeys((REFERENCE, *names))]
    interval, steps = whole_interval(racers), turn_steps(racers)
    for racer in racers:
        racer.skip_early_phase(interval)
    for _ in range(rounds):
        for racer in racers:
            racer.interval(interval, steps)
    device = data.train.inputs.device
    return [_cost(task, batch_size, racer, racers[0], interval, device) for racer in racers]


def whole_interval(racers: Sequence[Racer]) -> int:
    """Steps that hold a whole number of every KFC's statistics and refreshes."""
    return math.lcm(SHORT_TURN, *(number for pair in _intervals(racers) for number in pair))


def turn_steps(racers: Sequence[Racer]) -> int:
    """Steps of a turn: a short one shows no step with statistics alone, or a refresh alone."""
    at_once = all(statistics == refresh for statistics, refresh in _intervals(racers))
    return SHORT_TURN if at_once else whole_interval(racers)


def _intervals(racers: Sequence[Racer]) -> list[tuple[int, int]]:
    schedules = [racer.kfc.schedule for racer in racers if racer.kfc is not None]
    return [(each.every, each.refresh_every) for each in schedules]


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
    interval: int,
    device: torch.device,
) -> CostResult:
    low, mean, high = _quartiles(racer.round_seconds, reference.round_seconds)
    found = CostResult(
        task=task.name,
        batch_size=batch_size,
        optimizer=racer.name,
        mean=mean,
        low=low,
        high=high,
        early=mean,
        early_steps=0,
        interval=interval,
        rounds=len(racer.round_seconds),
        sgd_seconds=statistics.median(reference.round_seconds),
        threads=torch.get_num_threads(),
        versions=versions(),
        device=device_name(device),
    )
    if racer.kfc is None:
        return found
    schedule = racer.kfc.schedule
    steps = range(schedule.early_phase)
    dues = tuple(step for step in steps if schedule.refresh_due(step))
    work = _refresh_work(racer.kfc)
    early = replace(
        found,
        early_steps=len(steps),
        due=_quartiles(racer.first_seconds, reference.round_seconds)[1],
        plain=_quartiles(racer.rest_seconds, reference.round_seconds)[1],
        early_due=dues,
        early_shares=tuple(
            sum(own for stack, own in work.items() if schedule.refresh_due(step, stack))
            / sum(work.values())
            for step in dues
        ),
    )
    return replace(early, early=early.relative_seconds(len(steps)) / len(steps))


def _refresh_work(opt: KFC) -> dict[str, float]:
    """Operations of a refresh by stack, of the models that an optimizer has."""
    spec = opt._engine.spec
    return {stack.key: refresh_flops(spec, stack) for stack in spec.stacks}


def _quartiles(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Of the ratios, round by round."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, median, high
