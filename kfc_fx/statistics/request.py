"""What an optimizer wants to know of every batch of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kfc_fx.plan.forms import FactorForms, factor_forms
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.share import WHOLE, BatchShare

Fisher = Literal["sampled", "empirical"]
"""What Γ is estimated from: targets of the model's own distribution, or the loss's gradient."""

Samples = int | Literal["auto"] | None
"""Examples of a batch that statistics are estimated from; None for all."""

FormsOf = Callable[[BlockSpec], FactorForms | None]
"""Block to the forms of its factors; None for a block that needs no statistics."""

SHARES: dict[Fisher, tuple[float, int]] = {"sampled": (0.5, 128), "empirical": (0.25, 32)}
"""With "auto": the fraction of a batch, and the least number of examples. Sampled targets are
noise of their own, and their backward pass costs more than a smaller share would spare."""

ROWS = 8
"""With "auto" and the loss's own cotangents: Ω takes no more rows than ROWS times its side, which
determine it as well as its moving average needs."""

LEAST_EXAMPLES, LEAST_FRACTION = 8, 1 / 16
"""The bound by ROWS leaves so many examples, because the rows of one example are much alike, and
such a fraction of the batch, because a large batch pays for good statistics."""


@dataclass(frozen=True)
class StatisticsRequest:
    """Which statistics are taken of a batch, and of how much of it.

    Attributes:
        forms: which blocks emit, in which form.
        fisher: what Γ is estimated from; None for what :meth:`fisher_for` says of the likelihood.
        scale_free: whether only the directions of Γ count. The cotangent of a loss that the model
            computes inside is then taken for that of a mean over the examples.
        samples: examples of a batch that count, of the batches of all ranks together.
        keep_inputs: whether the inputs of the last batch are kept, for the exact Fisher matrix.
        seed: of the sampled targets; torch's initial seed for None.
        maximize: whether the loss is the negative of one, as a log-likelihood is.
        ranks: how many processes have a batch each.
    """

    forms: FormsOf = factor_forms
    fisher: Fisher | None = None
    scale_free: bool = False
    samples: Samples = None
    keep_inputs: bool = False
    seed: int | None = None
    maximize: bool = False
    ranks: int = 1

    def fisher_for(self, likelihood: Likelihood) -> Fisher:
        """What Γ is estimated from. By default the loss's own backward pass, where that trains as
        well: for classes. With Bernoulli outputs its gradients are much alike at first."""
        if self.fisher is not None:
            return self.fisher
        fits = self.scale_free and isinstance(likelihood, Categorical)
        return "empirical" if fits else "sampled"

    def share(self, examples: int, fisher: Fisher) -> BatchShare:
        """The share of a batch that statistics are estimated from.

        Args:
            examples: of the batch; 0 where that is not known.
            fisher: what Γ of this batch is estimated from.
        """
        if self.samples is None or not examples:
            return WHOLE
        if self.samples != "auto":
            return BatchShare(min(1.0, self._of_all(self.samples) / examples))
        fraction, least = SHARES[fisher]
        least = max(self._of_all(least), min(LEAST_EXAMPLES, least))
        own = min(1.0, max(least, fraction * examples) / examples)
        if fisher == "sampled":
            return BatchShare(own)
        least = max(self._of_all(LEAST_EXAMPLES), round(LEAST_FRACTION * examples))
        return BatchShare(own, examples, ROWS / self.ranks, least)

    def _of_all(self, count: int) -> int:
        """This rank's part of a number that is meant for all ranks."""
        return -(-count // self.ranks)
