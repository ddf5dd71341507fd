"""Likelihoods: the predictive distribution whose Fisher matrix is approximated.

A *cotangent* is the derivative of the negative log-likelihood of each example with respect to
the model's output, never of a batch mean. Its sign does not matter to Γ, its scale does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kfc_fx.errors import OutputError

ROUNDING = 1e-3
"""Of a scale that is read off gradients."""


class Likelihood(Protocol):
    """What statistics and the exact ν need to know of a predictive distribution."""

    output: str | int | None
    """Name or index of the tensor that is meant in an output of several."""

    def check(self, output: Tensor) -> None:
        """Raise :class:`OutputError` for an output that the distribution cannot be of."""

    def examples(self, output: Tensor, batch_dim: int = 0) -> int:
        """Number N of examples in an output."""

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """Cotangent of the output's shape for one target per example drawn from the model."""

    def scale(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """The factor from the loss's cotangents c, of whatever reduction, to those of one example's
        log-likelihood of the true targets.

        With ``c = s c*`` row by row it is the least-squares factor ``Σ c·c* / Σ c·c``, so that
        weights of examples and classes keep their proportions.
        """

    def counts(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Which predictions the loss counts, broadcastable to the output: not the ignored ones, of
        padding, or of weight zero, whose cotangent is zero."""

    def agreement(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Cosine of the loss's cotangent and the likelihood's of the targets that it suggests."""

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``T F_z Tᵀ`` summed over examples, F_z the Fisher matrix of the output.

        Args:
            tangents: T, k tangents of the output stacked along a leading dimension.

        Returns:
            ``[k, k]``.
        """

    def as_dict(self) -> dict[str, Any]:
        """Plain data that stands for it in a saved state."""


class BatchOfPredictions:
    """A prediction for each entry of the output's dimension of examples.

    Args:
        output: name or index of the tensor that is meant in an output of several; by default the
            one that the loss differentiates most.
    """

    def __init__(self, output: str | int | None = None) -> None:
        self.output = output

    def check(self, output: Tensor) -> None:
        """See :class:`Likelihood`."""
        if output.dim() == 0:
            raise OutputError(
                "the model's output is a scalar, perhaps a loss: a likelihood needs the prediction "
                "itself; return it, alone or as .logits beside the loss"
            )

    def examples(self, output: Tensor, batch_dim: int = 0) -> int:
        """See :class:`Likelihood`."""
        return output.shape[batch_dim if output.dim() > batch_dim else 0]

    def counts(self, _: Tensor, cotangent: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        return cotangent != 0

    def agreement(self, output: Tensor, _: Tensor) -> Tensor:
        """One: any cotangent may be that of some targets."""
        return output.new_ones(())

    def as_dict(self) -> dict[str, Any]:
        """See :class:`Likelihood`."""
        return {"name": type(self).__name__.lower(), **vars(self)}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value not in (None, False)}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}({shown})"


def at_a_reduction(scale: Tensor, counts: Sequence[int], otherwise: Tensor) -> Tensor:
    """Scales of soft targets: that of a mean or a sum, where it is such a one.

    Args:
        scale: the least that leaves all targets within [0, 1].
        counts: what losses are divided by.
        otherwise: scales to take where none of these fits.
    """
    found = otherwise
    for count in sorted(set(counts)):  # the smallest that fits comes last
        reduction = 1 / max(count, 1)
        fits = (scale <= reduction * (1 + ROUNDING)) & (scale >= reduction / 2)
        found = torch.where(fits, reduction, found)
    return found


def gram(rows: Tensor) -> Tensor:
    """Inner products of tensors that are stacked along the leading dimension."""
    flat = rows.flatten(1)
    return flat @ flat.mT
