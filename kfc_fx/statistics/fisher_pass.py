"""A backward pass to the sites alone, from sampled targets, ahead of the loss's own."""

from __future__ import annotations

import time

import torch
import torch._functorch.config
from torch import Tensor

from kfc_fx.plan.forms import statistic_shapes
from kfc_fx.statistics.counted import counted_share
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.setup import PassSetup
from kfc_fx.statistics.sums import BlockSums

REENTRANT = (
    "layers run within an autograd.Function, which lets no pass through that is for statistics "
    "alone, as a checkpoint with use_reentrant=True does: pass use_reentrant=False to "
    "torch.utils.checkpoint, or fisher='empirical' to KFC"
)
"""Why a pass of sampled targets is not taken."""


class FisherPass:
    """Takes the statistics of one forward pass from sampled targets.

    Args:
        prediction: as the model returned it; ``values`` are its values then.
        cotangent: of the loss; None where that is not seen, and all predictions count.
    """

    def __init__(
        self,
        setup: PassSetup,
        likelihood: Likelihood,
        prediction: Tensor,
        values: Tensor,
        cotangent: Tensor | None = None,
    ) -> None:
        self._setup, self._likelihood, self._prediction = setup, likelihood, prediction
        self._values, self._cotangent = values, cotangent

    lasts = False

    def begin(self) -> None:
        """Run the pass and deliver what it has found."""
        start = time.perf_counter()
        setup, record = self._setup, self._setup.record
        examples = self._likelihood.examples(self._values, setup.batch_dim)
        taken = dict(record.inputs)
        if record.probes:
            taken |= self._gradients()
        setup.deliver(taken, record, examples, time.perf_counter() - start)

    @torch.no_grad()
    def _sampled_cotangent(self) -> Tensor:
        generator = self._setup.generator(self._prediction.device)
        sampled = self._likelihood.sampled_cotangent(self._values, generator)
        if self._cotangent is not None:
            counts = self._likelihood.counts(self._values, self._cotangent)
            share = counted_share(counts.expand_as(self._values), self._setup.batch_dim)
            sampled = sampled * counts / share.sqrt().to(sampled)
        return sampled.to(self._prediction.dtype)

    def _gradients(self) -> BlockSums:
        """Statistics by block: the gradients of the probes."""
        record = self._setup.record
        names = [
            (block, statistic)
            for block in record.probes
            for statistic in statistic_shapes(*record.emitted[block])
        ]
        probes = [probe for leaves in record.probes.values() for probe in leaves]
        cotangent = self._sampled_cotangent()
        record.running = True
        try:
            # The loss's own pass goes through the same graph afterwards. AOTAutograd reads the
            # setting when it compiles and again when it runs.
            with torch._functorch.config.patch(donated_buffer=False):
                values = torch.autograd.grad(
                    self._prediction, probes, cotangent, retain_graph=True, allow_unused=True
                )
        finally:
            record.running = False
        found: BlockSums = {}
        for (block, statistic), value in zip(names, values, strict=True):
            if value is not None:  # else the block ran, but the prediction does not depend on it
                found.setdefault(block, {})[statistic] = value
        return found
