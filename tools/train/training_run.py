"""One training run, step by step, and its record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfc_fx.tools.data.sets import DataSet, ImageSet
from kfc_fx.tools.train.objective import Classification, Objective, Reconstruction, Test
from kfc_fx.tools.train.optimizers import OptimizerSpec, prepare

WARM_UP_STEPS = 10


@dataclass(frozen=True)
class RunSpec:
    """How long and on what to train: the same for all optimizers that are compared."""

    epochs: int
    batch_size: int
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class RunRecord:
    """What a run did, up to its end or to where it was interrupted.

    ``losses`` has one mini-batch loss per step, taken before the step's update; ``seconds`` the
    training time at the end of each step: capture and steps, but no evaluation. ``tested`` are
    figures of the test set, of the kind ``test``, one per finished epoch.
    """

    optimizer: OptimizerSpec
    planned_steps: int
    capture_seconds: float
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    tested: tuple[float, ...]
    test: Test = "accuracy"

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    @property
    def finished(self) -> bool:
        return self.diverged or self.steps == self.planned_steps


class TrainingRun:
    """Trains ``network`` in place; :meth:`record` may be asked at any time.

    Batches are drawn anew every epoch in an order that depends on the seed alone; a last
    batch that is not full is left out.
    """

    def __init__(
        self,
        optimizer: OptimizerSpec,
        network: nn.Module,
        data: DataSet,
        spec: RunSpec,
        *,
        reconstructs: bool = False,
    ) -> None:
        """``reconstructs``: the network returns its own input, and not a class."""
        self.optimizer = optimizer
        self._spec = spec
        self._device = torch.device(spec.device)
        self._network = network.to(self._device)
        self._train = _to_device(data.train, self._device)
        self._test = _to_device(data.test, self._device)
        self._objective: Objective = Reconstruction()
        if not reconstructs:
            self._objective = Classification(self._train)
        self._batch_size = min(spec.batch_size, len(data.train))
        self.planned_steps = spec.epochs * (len(data.train) // self._batch_size)
        self._capture_seconds = 0.0
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._tested: list[float] = []

    def record(self) -> RunRecord:
        """The run so far; only whole steps are in it."""
        steps = min(len(self._losses), len(self._seconds))
        return RunRecord(
            self.optimizer,
            self.planned_steps,
            self._capture_seconds,
            tuple(self._losses[:steps]),
            tuple(self._seconds[:steps]),
            tuple(self._tested),
            self._objective.test,
        )

    def steps(self) -> Iterator[float]:
        """Train, yielding the loss of each step; ends early where it is not finite."""
        torch.manual_seed(self._spec.seed)
        example = self._objective.inputs(self._train.images[: self._batch_size])
        likelihood = self._objective.likelihood
        prepared = prepare(self.optimizer, self._network, example, likelihood)
        self._capture_seconds = prepared.capture_seconds
        network, optimizer = prepared.network, prepared.optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_scale(step, self.planned_steps)
        )
        elapsed = self._capture_seconds
        order = torch.Generator().manual_seed(self._spec.seed)
        for _ in range(self._spec.epochs):
            for rows in self._batches(order):
                started = time.perf_counter()
                loss = self._step(network, optimizer, rows)
                schedule.step()
                elapsed += time.perf_counter() - started
                self._losses.append(loss)
                self._seconds.append(elapsed)
                yield loss
                if not math.isfinite(loss):
                    return
            self._tested.append(self._test_figure(network))

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
        loss = self._objective.loss(network, self._train, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return loss.item()

    @torch.no_grad()
    def _test_figure(self, network: nn.Module) -> float:
        network.eval()
        figure = self._objective.figure(network, self._test)
        network.train()
        return figure

    def _batches(self, order: torch.Generator) -> Iterator[Tensor]:
        permutation = torch.randperm(len(self._train), generator=order).to(self._device)
        whole = len(self._train) // self._batch_size * self._batch_size
        yield from permutation[:whole].split(self._batch_size)


def warm_up_steps(total: int) -> int:
    """A sixth of a run, 10 steps at most."""
    return min(WARM_UP_STEPS, math.ceil(total / 6))


def learning_rate_scale(step: int, total: int) -> float:
    """Factor of the learning rate: a warm-up, constant, then from half of the run linearly towards
    0, which the step after the last would have."""
    warm_up = min(1.0, (step + 1) / warm_up_steps(total))
    decay = min(1.0, (total - step) / max(1.0, total / 2))
    return min(warm_up, decay)


def _to_device(examples: ImageSet, device: torch.device) -> ImageSet:
    return ImageSet(examples.images.to(device), examples.labels.to(device))
