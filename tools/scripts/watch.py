"""What a running script does: its losses, the ends of its steps, and its end after some steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import dataloader


class StepsDone(BaseException):
    """As many steps as were asked for; no ``except Exception`` of a script catches it."""


class Watch:
    """Losses are what the script differentiates: those since the last step of any optimizer,
    summed, are the loss of an optimizer's step. A step of the script ends with that of its last
    optimizer, or without one with the backward pass.

    The first step begins with the last of these before it: the script began, a module was set to
    training, a loader gave a batch.

    Args:
        steps: after which :class:`StepsDone` is raised.
        optimizers: how many the script has; none where it updates parameters by hand.
    """

    def __init__(self, steps: int, optimizers: int) -> None:
        self._steps, self._optimizers = steps, optimizers
        self._pending: list[float] = []
        self._seen: list[torch.optim.Optimizer] = []
        self._start = time.perf_counter()
        self._ends: list[float] = []
        self.losses: list[list[float]] = [[] for _ in range(max(optimizers, 1))]

    def install(self) -> None:
        """Watch whatever this process does from here on."""
        register_optimizer_step_post_hook(lambda opt, *_: self._stepped(opt))
        torch.Tensor.backward = self._after(  # type: ignore[method-assign]
            torch.Tensor.backward, self._differentiated
        )
        nn.Module.train = self._after(nn.Module.train, self._mark)  # type: ignore[method-assign]
        batches = dataloader._BaseDataLoaderIter
        batches.__next__ = self._after(  # type: ignore[method-assign]
            batches.__next__, self._mark
        )

    def seconds(self) -> tuple[float | None, float | None]:
        """Of the first step, and the median of the others; None where there are none."""
        if not self._ends:
            return None, None
        between = [b - a for a, b in zip(self._ends, self._ends[1:], strict=False)]
        return self._ends[0] - self._start, statistics.median(between) if between else None

    @staticmethod
    def _after(call: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
        """A method that notes its object after each call."""

        def noted(own: Any, *args: Any, **kwargs: Any) -> Any:
            result = call(own, *args, **kwargs)
            note(own)
            return result

        return noted

    def _mark(self, _: Any) -> None:
        if not self._ends and not any(self.losses):
            self._start = time.perf_counter()

    def _differentiated(self, loss: Tensor) -> None:
        self._pending.append(float(loss.detach().sum()))
        if not self._optimizers:
            self._end_of(0)

    def _stepped(self, opt: torch.optim.Optimizer) -> None:
        if all(opt is not other for other in self._seen):
            self._seen.append(opt)
        self._end_of(next(i for i, other in enumerate(self._seen) if other is opt))

    def _end_of(self, optimizer: int) -> None:
        """Take the losses of one optimizer's step."""
        self.losses[optimizer].append(sum(self._pending))
        self._pending.clear()
        if optimizer == len(self.losses) - 1:
            self._ends.append(time.perf_counter())
            if len(self._ends) == self._steps:
                raise StepsDone
