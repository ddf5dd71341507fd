"""Independent binary variables."""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.statistics.likelihoods.likelihood import (
    BatchOfPredictions,
    at_a_reduction,
    gram,
)

EDGE = 1e-6
"""Distance that probabilities keep from 0 and 1."""
SOFT = 5e-3
"""Standard deviation of the logarithms of the entries' scales from which on targets are soft."""


class Bernoulli(BatchOfPredictions):
    """A binary variable for every entry of the output: the cotangent is ``sigmoid(z) − sample``.

    Args:
        probabilities: the output holds the probabilities p themselves, as a sigmoid in the model
            gives them: the cotangent is ``(p − sample) / (p (1 − p))``.
        output: see :class:`BatchOfPredictions`.
    """

    def __init__(self, *, probabilities: bool = False, output: str | int | None = None) -> None:
        super().__init__(output)
        self.probabilities = probabilities

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Likelihood`."""
        probability = self._probability(output)
        uniform = torch.empty_like(output).uniform_(generator=generator)
        sample = (uniform < probability).to(output.dtype)
        return (probability - sample) / self._slope(probability)

    def scale(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Exact for targets 0 and 1, any reduction, and a weight for each sign.

        Such an entry is ``s p`` or ``−s (1 − p)``, over the slope of p. Where targets are soft,
        s is that of a mean or a sum, where one fits; else the largest of these entries' scales,
        which is right if some targets are 0 or 1.
        """
        own = self.entry_scales(output, cotangent)
        probability = self._probability(output)
        counted = (cotangent != 0) & (probability > EDGE) & (probability < 1 - EDGE)
        logs = torch.where(counted, own.clamp_min(torch.finfo(own.dtype).tiny).log(), 0)
        spread = [_deviation(logs, counted & side) for side in (cotangent > 0, cotangent < 0)]
        is_soft = torch.stack(spread).amax() > SOFT
        counts = (output.numel(), len(output), 1)
        own = torch.where(is_soft, at_a_reduction(own.amax(), counts, own.amax()), own)
        square = cotangent.square()
        inverse = torch.where(counted, square / torch.where(counted, own, 1), 0).sum()
        return inverse / torch.where(counted, square, 0).sum().clamp_min(
            torch.finfo(square.dtype).tiny
        )

    def counts(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """See :class:`Likelihood`. A side that is certain has no cotangent either, and counts."""
        probability = self._probability(output)
        return (cotangent != 0) | (probability <= EDGE) | (probability >= 1 - EDGE)

    def agreement(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        probability = self._probability(output)
        likely = (probability - (cotangent < 0).to(output.dtype)) / self._slope(probability)
        likely = likely * (cotangent != 0)
        norms = torch.linalg.vector_norm(likely) * torch.linalg.vector_norm(cotangent)
        return (likely * cotangent).sum() / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``Σ p(1−p) s t``, of tangents s and t of logits; ``Σ s t / (p(1−p))`` of those of
        probabilities."""
        probability = self._probability(output)
        variance = (probability * (1 - probability)).sqrt()
        return gram(tangents / variance if self.probabilities else tangents * variance)

    def entry_scales(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """The least s for which each entry's target ``p − c / s`` is within [0, 1]."""
        probability = self._probability(output)
        own = cotangent * self._slope(probability)
        return torch.where(own > 0, own / probability, -own / (1 - probability))

    def _probability(self, output: Tensor) -> Tensor:
        probability = output if self.probabilities else output.sigmoid()
        return probability.clamp(EDGE, 1 - EDGE)

    def _slope(self, probability: Tensor) -> Tensor | float:
        """By how much the cotangent of a probability is larger than that of its logit."""
        return probability * (1 - probability) if self.probabilities else 1.0


def _deviation(values: Tensor, chosen: Tensor) -> Tensor:
    """Standard deviation of the chosen values; zero for none."""
    count = chosen.sum().clamp_min(1)
    mean = torch.where(chosen, values, 0).sum() / count
    return (torch.where(chosen, values - mean, 0).square().sum() / count).sqrt()
