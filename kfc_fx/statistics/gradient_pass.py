"""Statistics in the loss's own backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Variable

from kfc_fx.errors import OutputError
from kfc_fx.statistics.fisher_pass import values_of
from kfc_fx.statistics.running import StatisticsPass, taking_statistics
from kfc_fx.statistics.sums import ForwardRecord

if TYPE_CHECKING:
    from kfc_fx.statistics.collector import StatisticsRecorder


class GradientPass:
    """Statistics in the loss's own backward pass, of its own cotangents.

    The tap's backward, which comes first in it, opens it; it closes where autograd ends, also with
    an error. The cotangents c of the loss are those c* of the likelihood up to a factor: by the
    size of the batch, the reduction of the loss, a gradient scaler. It is found by least squares,
    ``(c · c*) / (c · c)``, and its square is what statistics are multiplied by. Of a loss that the
    model computes inside, c is not seen; where the scale of Γ does not matter, the factor is that
    of a mean over the examples then.

    Args:
        position: of the prediction among the tapped tensors.
    """

    def __init__(
        self,
        recorder: StatisticsRecorder,
        prediction: Tensor,
        position: int,
        record: ForwardRecord,
    ) -> None:
        self._recorder, self._record, self._position = recorder, record, position
        self._examples = recorder.likelihood.examples(prediction)
        self._values: Tensor | None = values_of(prediction)
        self._pass = StatisticsPass()
        self._running = ExitStack()

    def __call__(self, cotangents: Sequence[Tensor | None]) -> None:
        values, self._values = self._values, None
        if values is None:
            return  # a second backward pass through the same forward pass
        if not self._record.probes and not self._record.again:
            self._recorder.statistics.add(self._record.inputs, self._record, self._examples)
            return
        self._record.square = self._scale(values, cotangents[self._position])
        part = self._recorder.part(self._examples, self._record.fisher)
        self._pass = self._running.enter_context(taking_statistics(part))
        if self._record.again:
            self._running.enter_context(self._record.again(self._record))
        self._recorder.open_passes.append(self)
        end = partial(self._finish)  # autograd drops it, called or after an error
        weakref.finalize(end, self.close)
        Variable._execution_engine.queue_callback(end)

    @torch.no_grad()
    def _scale(self, values: Tensor, cotangent: Tensor | None) -> Tensor:
        """The square of the factor."""
        if cotangent is None:
            if self._recorder.scale_free:
                return values.new_full((), float(self._examples) ** 2)
            raise OutputError(
                "fisher='empirical' takes the gradient of the loss with respect to the prediction, "
                "and the loss was not computed from it; use fisher='sampled'"
            )
        wanted = self._recorder.likelihood.empirical_cotangent(values, cotangent)
        own = cotangent.to(wanted.dtype).flatten()  # dot products make no third copy of the logits
        square = torch.dot(own, own)
        factor = torch.dot(own, wanted.flatten()) / square
        return torch.where(square > 0, factor, 0).square()

    def close(self) -> None:
        """Take no more; what was taken so far is lost."""
        self._record.square = None
        self._running.close()
        if self in self._recorder.open_passes:
            self._recorder.open_passes.remove(self)

    def _finish(self) -> None:
        if self._record.square is None:
            return  # closed within the backward pass, by a step that a hook took
        self.close()
        taken = self._record.inputs | self._record.collected
        self._recorder.statistics.add(taken, self._record, self._examples)
        self._recorder.seconds += self._pass.seconds
