"""A backward pass to the sites alone, from sampled targets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfc_fx.plan.forms import statistic_shapes
from kfc_fx.statistics.running import fisher_pass
from kfc_fx.statistics.sums import ForwardRecord, Sums

REENTRANT = (
    "layers run within an autograd.Function, which lets no pass through that is for statistics "
    "alone, as a checkpoint with use_reentrant=True does: pass use_reentrant=False to "
    "torch.utils.checkpoint, or fisher='empirical' to KFC"
)
"""Why a pass of sampled targets is not taken."""

if TYPE_CHECKING:
    from kfc_fx.statistics.collector import StatisticsRecorder


class FisherPass:
    """A backward pass to the sites alone, from sampled cotangents, ahead of the loss's.

    Runs once per forward pass, from the tap's backward.
    """

    def __init__(
        self,
        recorder: StatisticsRecorder,
        prediction: Tensor,
        record: ForwardRecord,
    ) -> None:
        self._recorder, self._record = recorder, record
        self._prediction: Tensor | None = prediction
        self._values = values_of(prediction)

    def __call__(self, _: Sequence[Tensor | None]) -> None:
        prediction, self._prediction = self._prediction, None
        if prediction is None:
            return  # a second backward pass through the same forward pass
        start = time.perf_counter()
        examples = self._recorder.likelihood.examples(prediction)
        taken = dict(self._record.inputs)
        if self._record.probes:
            taken |= self._gradients(prediction, examples)
        self._recorder.statistics.add(taken, self._record, examples)
        self._recorder.seconds += time.perf_counter() - start

    def _gradients(self, prediction: Tensor, examples: int) -> Sums:
        """Statistics by block: the gradients of the probes."""
        names = [
            (block, statistic)
            for block in self._record.probes
            for statistic in statistic_shapes(*self._record.emitted[block])
        ]
        probes = [probe for leaves in self._record.probes.values() for probe in leaves]
        with torch.no_grad():
            generator = self._recorder.generator(prediction.device)
            cotangent = self._recorder.likelihood.sampled_cotangent(self._values, generator)
        with fisher_pass(self._recorder.part(examples, self._record.fisher)):
            values = torch.autograd.grad(
                prediction,
                probes,
                cotangent.to(prediction.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        found: Sums = {}
        for (block, statistic), value in zip(names, values, strict=True):
            if value is not None:  # else the block ran, but the prediction does not depend on it
                found.setdefault(block, {})[statistic] = value
        return found


def values_of(prediction: Tensor) -> Tensor:
    """A copy: the user may change the tapped output, its alias, in place before backward. In single
    precision at least: probabilities in half precision lose the tail that samples come from."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.detach().to(wide, copy=True)
