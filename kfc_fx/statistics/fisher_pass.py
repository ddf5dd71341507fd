"""A backward pass to the sites alone, from sampled targets, ahead of the loss's own."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch._functorch.config
from torch import Tensor

from kfc_fx.plan.forms import statistic_shapes
from kfc_fx.statistics.setup import PassSetup, values_of
from kfc_fx.statistics.sums import BlockSums

REENTRANT = (
    "layers run within an autograd.Function, which lets no pass through that is for statistics "
    "alone, as a checkpoint with use_reentrant=True does: pass use_reentrant=False to "
    "torch.utils.checkpoint, or fisher='empirical' to KFC"
)
"""Why a pass of sampled targets is not taken."""


class FisherPass:
    """Takes the statistics of one forward pass, once, when the output tap's backward runs."""

    def __init__(self, setup: PassSetup, prediction: Tensor) -> None:
        self._setup = setup
        self._prediction: Tensor | None = prediction
        self._values = values_of(prediction)

    def __call__(self, _: Sequence[Tensor | None]) -> None:
        prediction, self._prediction = self._prediction, None
        if prediction is None:
            return  # a second backward pass through the same forward pass
        start = time.perf_counter()
        setup, record = self._setup, self._setup.record
        examples = setup.likelihood.examples(prediction)
        taken = dict(record.inputs)
        if record.probes:
            taken |= self._gradients(prediction)
        setup.deliver(taken, record, examples, time.perf_counter() - start)

    def _gradients(self, prediction: Tensor) -> BlockSums:
        """Statistics by block: the gradients of the probes."""
        setup, record = self._setup, self._setup.record
        names = [
            (block, statistic)
            for block in record.probes
            for statistic in statistic_shapes(*record.emitted[block])
        ]
        probes = [probe for leaves in record.probes.values() for probe in leaves]
        with torch.no_grad():
            generator = setup.generator(prediction.device)
            cotangent = setup.likelihood.sampled_cotangent(self._values, generator)
        record.running = True
        try:
            # The loss's own pass goes through the same graph afterwards. AOTAutograd reads the
            # setting when it compiles and again when it runs.
            with torch._functorch.config.patch(donated_buffer=False):
                values = torch.autograd.grad(
                    prediction,
                    probes,
                    cotangent.to(prediction.dtype),
                    retain_graph=True,
                    allow_unused=True,
                )
        finally:
            record.running = False
        found: BlockSums = {}
        for (block, statistic), value in zip(names, values, strict=True):
            if value is not None:  # else the block ran, but the prediction does not depend on it
                found.setdefault(block, {})[statistic] = value
        return found
