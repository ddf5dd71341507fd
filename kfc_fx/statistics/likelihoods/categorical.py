"""One class for each prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.errors import OutputError
from kfc_fx.statistics.likelihoods.likelihood import (
    BatchOfPredictions,
    at_a_reduction,
    gram,
)

LIKELIEST = 4
"""Classes whose cotangents tell the loss's scale. A few are enough, and unlikely ones have
cotangents that a penalty in the loss would outweigh."""

SOFT = 1e-5
"""Share of a row's square beside the cotangent of one class, from which on its target is soft."""
TINY = 1e-12
CERTAIN = 1e-6
"""Distance of a probability from one at which its cotangent may be lost in rounding."""


class Categorical(BatchOfPredictions):
    """Softmax over class scores: the cotangent is ``softmax(z) − onehot(sample)``.

    The output may hold log-probabilities too. They are scores whose softmax they are the logarithm
    of, and their cotangents are the same once they have passed the log-softmax.

    Args:
        dim: class dimension. By default the last one for outputs of up to three dimensions
            (``[N, classes]``, ``[N, tokens, classes]``), else 1 (``[N, classes, H, W]``).
        probabilities: the output holds the probabilities p themselves, as a softmax in the model
            gives them: the cotangent is ``−onehot(sample) / p``.
        output: see :class:`BatchOfPredictions`.
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        probabilities: bool = False,
        output: str | int | None = None,
    ) -> None:
        super().__init__(output)
        self.dim = dim
        self.probabilities = probabilities

    def check(self, output: Tensor) -> None:
        """See :class:`Likelihood`."""
        super().check(output)
        dim = self.class_dim(output)
        if not -output.dim() <= dim < output.dim():
            raise OutputError(f"{self} has no dimension in an output of {list(output.shape)}")
        if output.shape[dim] == 1:
            raise OutputError(
                f"{self} over one class, in an output of shape {list(output.shape)}: its Fisher "
                "matrix is zero. Pass likelihood='bernoulli' to kfc_fx.compile for one logit, or "
                "'gaussian' for a regression"
            )

    def examples(self, output: Tensor, batch_dim: int = 0) -> int:
        """One for unbatched class scores ``[classes]``, else see :class:`Likelihood`."""
        return 1 if output.dim() == 1 else super().examples(output, batch_dim)

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Likelihood`."""
        dim, probability = self.class_dim(output), self._probability(output)
        # argmax(p / Exp(1)) is categorical in p; unlike multinomial it neither synchronises
        # with the device nor raises on NaN, which screening drops by layer.
        noise = torch.empty_like(probability).exponential_(generator=generator)
        target = (probability / noise).argmax(dim, keepdim=True)
        if self.probabilities:
            drawn = probability.gather(dim, target)
            return torch.zeros_like(probability).scatter_(dim, target, -1 / drawn)
        return probability.scatter_add(dim, target, -torch.ones_like(target, dtype=output.dtype))

    def scale(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Exact for cross-entropy with hard targets, any reduction, weights and ignored targets.

        Such a row is ``c = s (p − onehot)``, so that ``c / p`` is s at every class but the target.
        Where targets are soft it is less than s, at classes of small p; s is that of a mean or a
        sum then, where one fits.
        """
        dim = self.class_dim(output)
        square = cotangent.square().sum(dim)
        if self.probabilities:  # c = −s onehot / p
            own = (cotangent * output).sum(dim).abs()
        else:
            # of log-probabilities the loss's cotangent is −s onehot
            p = output.softmax(dim)
            rows = _row_scales(p, cotangent, dim)
            counts = (output.numel() // output.shape[dim], len(output), 1)
            soft = at_a_reduction(rows.amax(), counts, rows)
            rows = torch.where(_has_hard_targets(p, cotangent, dim), rows, soft)
            own = torch.where((cotangent > 0).any(), rows, cotangent.sum(dim).abs())
        return _least_squares(square, own)

    def counts(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """See :class:`Likelihood`. A class that is certain has no cotangent either, and counts."""
        dim = self.class_dim(output)
        likeliest = output.amax(dim, keepdim=True)
        if not self.probabilities:
            likeliest = (likeliest - output.logsumexp(dim, keepdim=True)).exp()
        certain = likeliest > 1 - CERTAIN
        return (cotangent != 0).any(dim, keepdim=True) | certain

    def agreement(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        dim = self.class_dim(output)
        if self.probabilities:
            return output.new_ones(())
        probability = output.softmax(dim)
        onehot = torch.where((cotangent > 0).any(), probability, torch.zeros_like(probability))
        likely = onehot.scatter_add(
            dim,
            cotangent.argmin(dim, keepdim=True),
            -torch.ones_like(cotangent.narrow(dim, 0, 1)),
        )
        likely = likely * (cotangent != 0).any(dim, keepdim=True)
        norms = torch.linalg.vector_norm(likely) * torch.linalg.vector_norm(cotangent)
        return (likely * cotangent).sum() / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``Σ p s t − (Σ p s)(Σ p t)`` per prediction, of tangents s and t of scores;
        ``Σ s t / p`` of tangents of probabilities."""
        dim, probability = self.class_dim(output) % output.dim(), self._probability(output)
        if self.probabilities:
            return gram(tangents / probability.sqrt())
        means = (probability * tangents).sum(dim + 1, keepdim=True)
        return gram(probability.sqrt() * (tangents - means))

    def class_dim(self, output: Tensor) -> int:
        """The class dimension in an output."""
        if self.dim is not None:
            return self.dim
        return -1 if output.dim() <= 3 else 1

    def _probability(self, output: Tensor) -> Tensor:
        if self.probabilities:
            return output.clamp_min(torch.finfo(output.dtype).tiny)
        return output.softmax(self.class_dim(output))


def _row_scales(probability: Tensor, cotangent: Tensor, dim: int) -> Tensor:
    """``|s|`` of each prediction, from the likeliest classes that are not its target."""
    classes = probability.shape[dim]
    p, likeliest = probability.topk(min(LIKELIEST, classes), dim)
    # A loss that is weighted by a negative advantage pushes its target down, and it alone.
    pushed_down = ((cotangent > 0).sum(dim, keepdim=True) == 1) & (classes > 2)
    sign = torch.where(pushed_down, -1.0, 1.0).to(cotangent)
    target = torch.where(
        pushed_down, cotangent.argmax(dim, keepdim=True), cotangent.argmin(dim, keepdim=True)
    )
    pulled = sign * cotangent.gather(dim, likeliest)
    ratio = torch.where(p > 0, pulled / torch.where(p > 0, p, 1), 0)
    return ratio.masked_fill(likeliest == target, 0).amax(dim)


def _has_hard_targets(probability: Tensor, cotangent: Tensor, dim: int) -> Tensor:
    """Whether each row pushes one class alone up, or down, from where the softmax has it."""
    square = cotangent.square().sum(dim)
    mean, norm = (cotangent * probability).sum(dim), probability.square().sum(dim)
    parallel = torch.zeros_like(square)
    for target in (cotangent.argmin(dim, keepdim=True), cotangent.argmax(dim, keepdim=True)):
        of_target, chance = (x.gather(dim, target).squeeze(dim) for x in (cotangent, probability))
        inner = (mean - of_target).square() / (norm - 2 * chance + 1).clamp_min(TINY)
        parallel = torch.maximum(parallel, inner)
    return square - parallel <= SOFT * square


def _least_squares(square: Tensor, scale: Tensor) -> Tensor:
    """``Σ c·c* / Σ c·c`` for rows ``c = s c*``.

    Args:
        square: ``c · c`` of each row.
        scale: s of each row; rows without one are left out.
    """
    known = scale > 0
    inverse = torch.where(known, square / torch.where(known, scale, 1), 0).sum()
    return inverse / torch.where(known, square, 0).sum().clamp_min(torch.finfo(square.dtype).tiny)
