"""Backward passes that take statistics, and what lets the gradient of a probe through in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from kfc_fx.statistics.share import WHOLE, Part


@dataclass(eq=False)
class StatisticsPass:
    """A backward pass that takes statistics.

    ``part``: of the batch, that statistics are estimated from.
    ``seconds``: spent on them in graphs that are not compiled.
    """

    part: Part = WHOLE
    seconds: float = 0.0


_passes: list[StatisticsPass] = []
"""Those that run."""


_parts: list[Part] = []
"""The forward passes that run, each by the part of its examples that statistics are taken of."""


@contextmanager
def input_part(part: Part) -> Iterator[None]:
    """While it lasts, statistics that are taken in the forward pass are of a part of the batch."""
    _parts.append(part)
    try:
        yield
    finally:
        _parts.remove(part)


def forward_part() -> Part:
    """The part of the batch that the forward pass which runs takes statistics of."""
    return _parts[-1] if _parts else WHOLE


@contextmanager
def taking_statistics(part: Part = WHOLE) -> Iterator[StatisticsPass]:
    """While it lasts, backward passes through emissions compute statistics.

    Of the process, not of the thread: autograd runs CUDA nodes on threads of its own. Outside,
    emissions pass the cotangent on and return nothing for the probes.
    """
    running = StatisticsPass(part)
    _passes.append(running)
    try:
        yield running
    finally:
        _passes.remove(running)


@contextmanager
def fisher_pass(part: Part = WHOLE) -> Iterator[None]:
    """The same for a backward pass after which the loss's own goes through the same graph."""
    # The graph is retained; AOTAutograd reads the setting when it compiles and again when it runs.
    with taking_statistics(part), torch._functorch.config.patch(donated_buffer=False):
        yield


def running_pass() -> StatisticsPass | None:
    """The pass that runs, the last one opened."""
    return _passes[-1] if _passes else None


class _FisherGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probe: Tensor) -> Tensor:  # type: ignore[override]
        return probe.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:  # type: ignore[override]
        return gradient if _passes else None


class _Collection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probe: Tensor, take: Callable[[Tensor], None]) -> Tensor:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.take = take
        return probe.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:  # type: ignore[override]
        if gradient is not None:
            ctx.take(gradient.detach())
        return None, None


def collected(probe: Tensor, take: Callable[[Tensor], None]) -> Tensor:
    """Hand a probe's gradient to ``take`` and let nothing through to the probe itself."""
    return _Collection.apply(probe, take)


def taken_by(probe: Tensor) -> Callable[[Tensor], None] | None:
    """What the probe was :func:`collected` by."""
    return getattr(probe.grad_fn, "take", None)


def gate(probe: Tensor) -> Tensor:
    """Let a probe's gradient through in a Fisher pass only.

    For compiled graphs, whose backward computes every output that it was traced with.
    """
    return _FisherGate.apply(probe)
