"""One loss, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Exactness = Literal["scale", "soft", "direction"]
"""What of Γ is known: all of it; its scale up to a share that soft targets leave open; or its
directions, of a loss that is no log-likelihood."""


@dataclass(frozen=True)
class LossCase:
    """A loss of a small network's output.

    Attributes:
        name: of the loss.
        decision: the likelihood that is to be found, as ``repr`` shows it.
        shape: of the output, examples first.
        loss: from the output to the loss.
        output: what the network does to the numbers of its last layer.
        examples: from the output to ``[N]``, the negative log-likelihood of each example: what Γ is
            to be of. None where the loss is none.
        weights: of the examples in the loss, where they differ.
        exact: what of Γ is known.
        doubtful: whether a warning is to say that another likelihood would fit too.
    """

    name: str
    decision: str
    shape: tuple[int, ...]
    loss: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor] = torch.Tensor.contiguous
    examples: Callable[[Tensor], Tensor] | None = None
    weights: Tensor | None = None
    exact: Exactness = "scale"
    doubtful: bool = False
