"""A backward pass to the sites alone, from sampled targets, ahead of the loss's own."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch._functorch.config
from torch import Tensor

from kfc_fx.plan.forms import statistic_shapes
from kfc_fx.statistics.counted import counted_share
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.record import ForwardRecord
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
        others: further forward passes that the prediction was computed from.
        counted: whether its examples count; else another pass of the same loss has counted them.
    """

    def __init__(
        self,
        setup: PassSetup,
        likelihood: Likelihood,
        prediction: Tensor,
        values: Tensor,
        cotangent: Tensor | None = None,
        others: Sequence[PassSetup] = (),
        *,
        counted: bool = True,
    ) -> None:
        self._setup, self._likelihood, self._prediction = setup, likelihood, prediction
        self._values, self._cotangent = values, cotangent
        self._setups, self._counted = [setup, *others], counted

    lasts = False

    def begin(self) -> None:
        """Run the pass and deliver what it has found."""
        start = time.perf_counter()
        examples = self._likelihood.examples(self._values, self._setup.batch_dim)
        records = [setup.record for setup in self._setups]
        found = self._gradients(records)
        seconds = time.perf_counter() - start
        for number, (setup, record) in enumerate(zip(self._setups, records, strict=True)):
            counts = self._counted and not number
            taken = record.inputs | found[number]
            setup.deliver(taken, record, examples if counts else 0, 0.0 if number else seconds)

    @torch.no_grad()
    def _sampled_cotangent(self) -> Tensor:
        generator = self._setup.generator(self._prediction.device)
        sampled = self._likelihood.sampled_cotangent(self._values, generator)
        if self._cotangent is not None:
            counts = self._likelihood.counts(self._values, self._cotangent)
            share = counted_share(counts.expand_as(self._values), self._setup.batch_dim)
            sampled = sampled * counts / share.sqrt().to(sampled)
        return sampled.to(self._prediction.dtype)

    def _gradients(self, records: Sequence[ForwardRecord]) -> list[BlockSums]:
        """Statistics by block, of each forward pass: the gradients of the probes."""
        _gather_rows(records)
        names = [
            (number, block, statistic)
            for number, record in enumerate(records)
            for block in record.probes
            if block in record.rows
            for statistic in statistic_shapes(*record.emitted[block])
        ]
        probes = [
            probe
            for record in records
            for block, leaves in record.probes.items()
            if block in record.rows
            for probe in leaves
        ]
        found: list[BlockSums] = [{} for _ in records]
        if not probes:
            return found
        cotangent = self._sampled_cotangent()
        for record in records:
            record.running = True
        try:
            # The loss's own pass goes through the same graph afterwards. AOTAutograd reads the
            # setting when it compiles and again when it runs.
            with torch._functorch.config.patch(donated_buffer=False):
                values = torch.autograd.grad(
                    self._prediction, probes, cotangent, retain_graph=True, allow_unused=True
                )
        finally:
            for record in records:
                record.running = False
        for (number, block, statistic), value in zip(names, values, strict=True):
            if value is not None:  # else the block ran, but the prediction does not depend on it
                found[number].setdefault(block, {})[statistic] = value
        return found


def _gather_rows(records: Sequence[ForwardRecord]) -> None:
    """Give the rows of a block that ran in several forward passes to the first of these: its probes
    are of one leaf, whose gradient is the sum over all."""
    first: dict[str, ForwardRecord] = {}
    for record in records:
        for block in record.probes.keys() & record.rows.keys():
            if block in first:
                own, more = first[block].rows[block], record.rows.pop(block)
                first[block].rows[block] = [sum(pair) for pair in zip(own, more, strict=True)]
            else:
                first[block] = record
