"""One tensor of a model's output whose likelihood may be meant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """A tensor of the output, before the tap.

    Attributes:
        path: of the tensor in the output, empty for an output that is a tensor.
        position: among the tapped tensors.
        tensor: as the model returned it.
        kept: a copy of its values, whose tapped alias the user may change in place before
            backward; None for those that are not likely to be needed.
        version: of the values when the model returned them.
    """

    path: str
    position: int
    tensor: Tensor
    kept: Tensor | None
    version: int

    @classmethod
    def of(cls, path: str, position: int, tensor: Tensor, *, keep: bool) -> Prediction:
        """A prediction, with a copy of its values where asked."""
        kept = widened(tensor.detach(), copy=True) if keep else None
        return cls(path, position, tensor, kept, tensor._version)

    @property
    def values(self) -> Tensor | None:
        """In single precision at least; None where they were changed and not kept."""
        if self.kept is not None:
            return self.kept
        return widened(self.tensor.detach()) if self.tensor._version == self.version else None


def widened(values: Tensor, *, copy: bool = False) -> Tensor:
    """Values in single precision at least: probabilities in half precision lose the tail that
    samples come from."""
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=copy)
