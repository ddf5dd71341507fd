"""What a backward pass that takes statistics needs to know of whom they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kfc_fx.statistics.likelihood import Likelihood
from kfc_fx.statistics.record import ForwardRecord
from kfc_fx.statistics.sums import BlockSums


class Deliver(Protocol):
    """Adds what a pass has taken to the sums of the collector as they are then."""

    def __call__(
        self, taken: BlockSums, record: ForwardRecord, examples: int, seconds: float
    ) -> None: ...


class Closable(Protocol):
    """A pass that can be ended early."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class PassSetup:
    """One armed forward pass, and what the backward pass for its statistics works with.

    Attributes:
        record: of the forward pass.
        likelihood: of the model's output.
        scale_free: whether only the directions of Γ count.
        maximize: whether the loss is the negative of one.
        generator: of the sampled targets, by device.
        deliver: takes what the pass has found. A step or ``zero_grad`` between the forward pass and
            then starts new sums, and the pass adds to the new ones.
        opened: passes that are within the loss's backward pass now, for whoever ends them early.
    """

    record: ForwardRecord
    likelihood: Likelihood
    scale_free: bool
    maximize: bool
    generator: Callable[[torch.device], torch.Generator]
    deliver: Deliver
    opened: list[Closable]


def values_of(prediction: Tensor) -> Tensor:
    """A copy of a prediction, whose tapped alias the user may change in place before backward.

    In single precision at least: probabilities in half precision lose the tail that samples come
    from.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.detach().to(wide, copy=True)
