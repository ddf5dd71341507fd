"""What a backward pass that takes statistics needs to know of whom they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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
