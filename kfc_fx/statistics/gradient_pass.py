"""Statistics in the loss's own backward pass, of its own cotangents."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Variable

from kfc_fx.errors import OutputError
from kfc_fx.statistics.setup import PassSetup, values_of


class GradientPass:
    """Takes the statistics of one forward pass while the loss's backward pass runs.

    The tap's backward, which comes first in it, opens it; it closes where autograd ends, also with
    an error. The cotangents c of the loss are those c* of the likelihood up to a factor: by the
    size of the batch, the reduction of the loss, a gradient scaler. It is found by least squares,
    ``(c · c*) / (c · c)``, and its square is what statistics are multiplied by. Of a loss that the
    model computes inside, c is not seen; where the scale of Γ does not matter, the factor is that
    of a mean over the examples then.

    Args:
        prediction: the output's; ``position``: its place among the tapped tensors.
    """

    def __init__(self, setup: PassSetup, prediction: Tensor, position: int) -> None:
        self._setup, self._position = setup, position
        self._examples = setup.likelihood.examples(prediction)
        self._values: Tensor | None = values_of(prediction)
        self._running = ExitStack()

    def __call__(self, cotangents: Sequence[Tensor | None]) -> None:
        values, self._values = self._values, None
        if values is None:
            return  # a second backward pass through the same forward pass
        setup, record = self._setup, self._setup.record
        if not record.probes and not record.again:
            setup.deliver(record.inputs, record, self._examples, 0.0)
            return
        record.square = self._square(values, cotangents[self._position])
        record.running = True
        if record.again:
            self._running.enter_context(record.again())
        setup.opened.append(self)
        self._close_where_autograd_ends()

    def _close_where_autograd_ends(self) -> None:
        """Let autograd call :meth:`_finish` at the end of the backward pass that runs.

        Autograd drops the callback after an error without calling it, and the finalizer of the
        callback, which nothing else holds, closes the pass then.
        """
        end = partial(self._finish)
        weakref.finalize(end, self.close)
        Variable._execution_engine.queue_callback(end)

    @torch.no_grad()
    def _square(self, values: Tensor, cotangent: Tensor | None) -> Tensor:
        """The square of the factor from the loss's cotangents to the likelihood's."""
        if cotangent is None:
            if self._setup.scale_free:
                return values.new_full((), float(self._examples) ** 2)
            raise OutputError(
                "fisher='empirical' takes the gradient of the loss with respect to the prediction, "
                "and the loss was not computed from it; use fisher='sampled'"
            )
        if self._setup.maximize:
            cotangent = -cotangent
        wanted = self._setup.likelihood.empirical_cotangent(values, cotangent)
        own = cotangent.to(wanted.dtype).flatten()  # dot products make no third copy of the logits
        square = torch.dot(own, own)
        factor = torch.dot(own, wanted.flatten()) / square
        return torch.where(square > 0, factor, 0).square()

    def close(self) -> None:
        """Take no more; what was taken so far is lost."""
        self._setup.record.running = False
        self._running.close()
        if self in self._setup.opened:
            self._setup.opened.remove(self)

    def _finish(self) -> None:
        setup, record = self._setup, self._setup.record
        if not record.running:
            return  # closed within the backward pass, by a step that a hook took
        self.close()
        setup.deliver(record.inputs | record.taken, record, self._examples, record.seconds)
