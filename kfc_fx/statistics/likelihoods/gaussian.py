"""Normal around the output."""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.statistics.likelihoods.likelihood import BatchOfPredictions, gram


class Gaussian(BatchOfPredictions):
    """Unit-variance normal around the output: the cotangent of a sample is standard normal.

    Args:
        output: see :class:`BatchOfPredictions`.
    """

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Likelihood`."""
        return torch.empty_like(output).normal_(generator=generator)

    def scale(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """That which gives the loss's cotangents the mean square one of the likelihood's: residuals
        in units of their own size. Entries without a cotangent are left out."""
        count = (cotangent != 0).sum()
        square = cotangent.square().sum().clamp_min(torch.finfo(cotangent.dtype).tiny)
        return (count / square).sqrt()

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``sᵀt``, of tangents s and t."""
        return gram(tangents)
