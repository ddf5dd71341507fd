"""What a backward pass that takes statistics needs to know of whom they are for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kfc_fx.statistics.likelihoods.choice import LikelihoodChoice
from kfc_fx.statistics.record import ForwardRecord
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.statistics.sums import BlockSums, Sums


class Deliver(Protocol):
    """Adds what a pass has taken to the sums of the collector as they are then."""

    def __call__(
        self, taken: BlockSums, record: ForwardRecord, examples: int, seconds: float
    ) -> None: ...


class Closable(Protocol):
    """A pass that can be ended early."""

    def close(self) -> None: ...


@dataclass(eq=False)
class Taps:
    """The taps of one collector: those that wait for a backward pass, and what the last one did."""

    waiting: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    backward: int = -1
    """Autograd's number of the backward pass that has reached a tap last."""
    opened: list[Any] = field(default_factory=list)
    """The forward passes whose predictions it has reached, the last one last."""

    @property
    def current(self) -> list[Any]:
        """What the backward pass that runs has opened."""
        return self.opened if self.backward == torch._C._current_graph_task_id() else []

    def note_opened(self, opened: object) -> None:
        """Keep what the backward pass that runs has opened."""
        task = torch._C._current_graph_task_id()
        self.opened = [*(self.opened if self.backward == task else []), opened]
        self.backward = task

    def forget(self, opened: object = None) -> None:
        """Hold what was opened no longer, or nothing at all; autograd's graph hangs on it."""
        self.opened = [] if opened is None else [own for own in self.opened if own is not opened]


@dataclass(frozen=True, eq=False)
class PassSetup:
    """One armed forward pass, and what the backward pass for its statistics works with.

    Attributes:
        record: of the forward pass.
        choice: the likelihood of the model's output.
        request: what is asked for.
        examples: of the forward pass's inputs; 0 where that is not known.
        batch_dim: dimension of the examples in the output.
        generator: of the sampled targets, by device.
        sums: of the collector as they are now. A step or ``zero_grad`` between the forward pass and
            then starts new sums, and the pass adds to the new ones.
        deliver: takes what the pass has found.
        miss: takes the reason for which a pass gives no statistics.
        opened: passes that are within the loss's backward pass now, for whoever ends them early.
        taps: those of the collector.
    """

    record: ForwardRecord
    choice: LikelihoodChoice
    request: StatisticsRequest
    examples: int
    batch_dim: int
    generator: Callable[[torch.device], torch.Generator]
    sums: Callable[[], Sums]
    deliver: Deliver
    miss: Callable[[str], None]
    opened: list[Closable]
    taps: Taps
