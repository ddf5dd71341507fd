"""The backward passes that statistics are taken in: one of their own, or the loss's."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd import Variable

from kfc_fx.errors import OutputError
from kfc_fx.ops.part import WHOLE, Part
from kfc_fx.ops.statistics_pass import StatisticsPass, fisher_pass, taking_statistics
from kfc_fx.plan.forms import FactorForms, statistic_shapes
from kfc_fx.plan.spec import BlockSpec

if TYPE_CHECKING:
    from kfc_fx.curvature.recorder import StatisticsRecorder

Fisher = Literal["sampled", "empirical"]

REENTRANT = (
    "layers run within an autograd.Function, which lets no pass through that is for statistics "
    "alone, as a checkpoint with use_reentrant=True does: pass use_reentrant=False to "
    "torch.utils.checkpoint, or fisher='empirical' to KFC"
)
"""Why a pass of sampled targets is not taken."""
Sums = dict[str, dict[str, Tensor]]
"""Sums of statistics by block and statistic."""


@dataclass
class Statistics:
    """Sums over all micro-batches since the last step, unnormalised.

    ``sums[block][statistic]`` is ``Σ_n Σ_t`` of outer products; ``rows[block]`` counts N·|T| of
    each group and ``examples`` N, by which the update divides.
    """

    sums: Sums = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    examples: int = 0

    def add(self, sums: Sums, record: ForwardRecord, examples: int) -> None:
        """Add those of one forward pass."""
        for block, values in sums.items():
            add(self.sums, block, values)
            counts = record.rows[block]
            before = self.rows.get(block, [0] * len(counts))
            self.rows[block] = [sum(pair) for pair in zip(before, counts, strict=True)]
        self.examples += examples


@dataclass(eq=False)
class ForwardRecord:
    """One armed forward pass: the blocks that ran in it and their output rows."""

    fisher: Fisher
    """What Γ of this pass is taken from."""
    rows: dict[str, list[int]] = field(default_factory=dict)
    probes: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    inputs: Sums = field(default_factory=dict)
    """Statistics of the blocks that need those of their input alone."""
    square: Tensor | None = None
    """What statistics that are quadratic in the cotangent are multiplied by while
    :class:`GradientPass` runs; None while it does not."""
    collected: Sums = field(default_factory=dict)
    """What it has taken so far."""
    graphs: int = 0
    """Runs of captured graphs in it."""
    emitted: dict[str, tuple[BlockSpec, FactorForms]] = field(default_factory=dict)
    """What each block was, by its name, when it emitted."""
    missing: str = ""
    """Why it gives no statistics; empty where it does."""
    part: Part = WHOLE
    """Of the batch, that statistics are estimated from."""
    again: Callable[[ForwardRecord], AbstractContextManager[None]] | None = None
    """Lets layers that are called within the backward pass emit, where some may be: an
    ``autograd.Function``, such as a reentrant checkpoint, has called layers."""

    def drop(self, block: str) -> None:
        """Take nothing of a block: what it is has changed while the pass ran."""
        for kept in (self.rows, self.probes, self.inputs, self.emitted):
            kept.pop(block, None)

    def collect(self, block: str, statistic: str, *, quadratic: bool) -> Callable[[Tensor], None]:
        """What takes a statistic of a block while :class:`GradientPass` runs."""

        def take(value: Tensor) -> None:
            if self.square is not None and block in self.rows:
                scaled = value * self.square.to(value) if quadratic else value
                add(self.collected, block, {statistic: scaled})

        return take


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
        self._values = _values(prediction)

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
        self._values: Tensor | None = _values(prediction)
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


def _values(prediction: Tensor) -> Tensor:
    """A copy: the user may change the tapped output, its alias, in place before backward. In single
    precision at least: probabilities in half precision lose the tail that samples come from."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.detach().to(wide, copy=True)


class OutputTap(torch.autograd.Function):
    """Identity; its backward runs the pass, or opens it, then passes the cotangents on."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.run = run
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.run(cotangents)
        return (None, *cotangents)


def add(sums: Sums, block: str, statistics: Mapping[str, Tensor]) -> None:
    """Add statistics of a block to those there are."""
    own = sums.setdefault(block, {})
    for name, value in statistics.items():
        own[name] = own[name] + value if name in own else value
