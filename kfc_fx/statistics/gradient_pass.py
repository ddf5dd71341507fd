"""Statistics in the loss's own backward pass, of its own cotangents."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Variable

from kfc_fx.errors import OutputError
from kfc_fx.statistics.counted import counted_share
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.record import ForwardRecord
from kfc_fx.statistics.setup import PassSetup


class GradientPass:
    """Takes the statistics of one forward pass while the loss's backward pass runs.

    It is opened before the backward pass reaches a layer, and closes where autograd ends, also with
    an error. The cotangents c of the loss are those c* of the likelihood up to a factor: by the
    size of the batch, the reduction of the loss, a gradient scaler. Statistics are multiplied by
    the square of that factor.

    Args:
        values: of the prediction.
        cotangent: of the prediction. None for that of a loss which the model computes inside a
            compiled graph; where the scale of Γ does not matter, the factor is that of a mean over
            the examples then.
    """

    lasts = True

    def __init__(
        self, setup: PassSetup, likelihood: Likelihood, values: Tensor, cotangent: Tensor | None
    ) -> None:
        self._setup = setup
        is_loss = values.dim() == 0
        self._examples = setup.examples if is_loss else likelihood.examples(values, setup.batch_dim)
        self._square = self._square_of(likelihood, values, cotangent)
        self._running = ExitStack()
        self._setups = [setup]

    def begin(self) -> None:
        """Take statistics from now on until the backward pass ends."""
        setup, record = self._setup, self._setup.record
        self._start(record)
        setup.opened.append(self)
        self._close_where_autograd_ends()

    def add(self, setup: PassSetup) -> None:
        """Take the statistics of another forward pass too, which the same loss was computed from,
        and whose layers the backward pass has not reached yet."""
        if self in self._setup.opened:
            self._setups.append(setup)
            self._start(setup.record)

    def _start(self, record: ForwardRecord) -> None:
        record.square = self._square
        record.running = True
        if record.again:
            self._running.enter_context(record.again())

    def _close_where_autograd_ends(self) -> None:
        """Let autograd call :meth:`_finish` at the end of the backward pass that runs.

        Autograd drops the callback after an error without calling it, and the finalizer of the
        callback, which nothing else holds, closes the pass then.
        """
        end = partial(self._finish)
        weakref.finalize(end, self.close)
        Variable._execution_engine.queue_callback(end)

    @torch.no_grad()
    def _square_of(
        self, likelihood: Likelihood, values: Tensor, cotangent: Tensor | None
    ) -> Tensor:
        """The square of the factor from the loss's cotangents to the likelihood's."""
        if cotangent is None:
            if self._setup.request.scale_free:
                return values.new_full((), float(self._examples) ** 2)
            raise OutputError(
                "fisher='empirical' takes the gradient of the loss with respect to the prediction, "
                "and the loss was not computed from it, or is all that the model returns: return "
                "the prediction beside the loss, and use fisher='sampled'"
            )
        own = cotangent.to(values.dtype)
        counts = likelihood.counts(values, own).expand_as(values)
        share = counted_share(counts, self._setup.batch_dim)
        return likelihood.scale(values, own).square() / share.to(own)

    def close(self) -> None:
        """Take no more; what was taken so far is lost."""
        for setup in self._setups:
            setup.record.running = False
        self._running.close()
        if self in self._setup.opened:
            self._setup.opened.remove(self)

    def _finish(self) -> None:
        if not self._setup.record.running:
            return  # closed within the backward pass, by a step that a hook took
        self.close()
        examples = self._examples
        for setup in self._setups:
            record = setup.record
            setup.deliver(record.inputs | record.taken, record, examples, record.seconds)
            examples = 0  # the same ones
