"""Emission: a statistic is the gradient of a probe.

A site's output goes through an emission, the identity in the forward pass. In a backward pass
that takes statistics it returns them as the gradients of *probes*: zero-stride leaf tensors of the
statistics' shapes, which hold no memory. Gradient accumulation then sums the statistics of several
uses, and tracing compilers see nothing but pure functions.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from kfc_fx.capture.regions import is_run_again
from kfc_fx.statistics.record import Destination, ForwardRecord, destinations_of
from kfc_fx.statistics.rules.matrices import EmissionRule, MatrixRule
from kfc_fx.statistics.rules.table import rule
from kfc_fx.statistics.running import forward_share
from kfc_fx.statistics.share import WHOLE, BatchShare


def emit(
    y: Tensor,
    inputs: tuple[Tensor, ...],
    probes: tuple[Tensor, ...],
    *,
    kind: str,
    block: str = "",
    recomputed: bool = False,
    **options: Any,
) -> Tensor:
    """Identity on ``y`` that emits the statistics of a layer.

    Args:
        y: the layer's output.
        inputs: the layer's input, and what its rule reads besides: the running mean and variance
            of a batch norm in evaluation mode, the ends of the rows of each entry of a batched
            linear map.
        probes: one of the shape of each statistic, in the order of ``plan.forms.statistic_shapes``.
            The gradient of a probe is the sum of its statistic over examples and locations.
        kind: of the layer, as in ``plan.kinds.KINDS``.
        block: name of the layer's block, for the profiler.
        recomputed: whether the call stands in a checkpointed region.
        options: the fields of the kind's rule in ``rules.table.RULES``.
    """
    to = destinations_of(probes)
    if to and not to[0].wanted:
        return y
    own = rule(kind, options)
    inputs = tuple(map(unnested, inputs))
    if not recomputed and _are_hooked(y):
        if is_run_again():
            return y  # it has emitted when it ran first
        kept = Kept.of(own, inputs, to[0].record.share if to else WHOLE)
        return _Emission.apply(y, kept, block, to, len(probes), *probes)
    return _Emission.apply(y, own, block, to, len(probes), *probes, *inputs)


@dataclass(frozen=True)
class Kept:
    """A rule with what it needs of its inputs, where the emission must not save them.

    Hooks on saved tensors, such as those of an activation checkpoint that runs op by op, expect the
    tensors that the model saves and no others. So the statistics of the input are taken in the
    forward pass; of a layer for which they need the cotangent, its input is held.
    """

    rule: EmissionRule
    inputs: tuple[Tensor, ...]
    input_statistics: tuple[Tensor, ...]

    @classmethod
    def of(cls, rule: EmissionRule, inputs: tuple[Tensor, ...], share: BatchShare) -> Kept:
        """What is to be kept of a layer's inputs."""
        inputs = tuple(tensor.detach() for tensor in inputs)
        if not isinstance(rule, MatrixRule):
            return cls(rule, inputs, ())
        statistics = rule.input_statistics(share, *inputs)
        return cls(rule, rule.kept(*inputs), statistics)

    def statistics(self, share: BatchShare, g: Tensor) -> tuple[Tensor, ...]:
        """See :class:`EmissionRule`."""
        if not isinstance(self.rule, MatrixRule):
            return self.rule.statistics(share, *self.inputs[:1], g, *self.inputs[1:])
        return (*self.input_statistics, *self.rule.output_statistics(share, g, *self.inputs))


def _are_hooked(y: Tensor) -> bool:
    """Whether what is saved for the backward pass goes through hooks."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and not is_traced(y)


class _Emission(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        rule: EmissionRule | Kept,
        block: str,
        destinations: tuple[Destination, ...],
        probes: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors[probes:])
        ctx.rule, ctx.block, ctx.destinations = rule, block, destinations
        ctx.probes, ctx.others = probes, len(tensors) - probes
        # An alias, not a view: no copy, and an in-place op may follow. `mark_dirty` would do
        # the same but for an output that is itself a view, as F.linear's on a 3-d input is.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        statistics: tuple[Tensor | None, ...]
        if is_traced(cotangent):
            # Forward and backward are traced together, in the forward pass.
            statistics = _statistics(ctx, cotangent, forward_share(ctx.block, traced=True) or WHOLE)
        elif ctx.destinations and ctx.destinations[0].record.running:
            statistics = _taken(ctx, cotangent, ctx.destinations[0].record)
        else:
            statistics = (None,) * ctx.probes
        return cotangent, None, None, None, None, *statistics, *(None,) * ctx.others


def _taken(ctx: Any, cotangent: Tensor, record: ForwardRecord) -> tuple[Tensor | None, ...]:
    """Gradients of the probes: the statistics, in a pass that asks for these gradients. In the
    loss's own pass they go to the record at once, because it may ask for those of parameters
    alone."""
    start = time.perf_counter()
    # The loss's backward pass may be one that is differentiated itself.
    with torch.no_grad(), profiler_range(ctx.block, cotangent):
        statistics = _statistics(ctx, cotangent, record.share)
    record.seconds += time.perf_counter() - start
    if record.fisher == "sampled":
        return statistics
    for destination, statistic in zip(ctx.destinations, statistics, strict=True):
        destination.take(statistic)
    return (None,) * ctx.probes


def unnested(tensor: Tensor) -> Tensor:
    """Of a nested tensor, the rows of all its entries, one entry after the other."""
    return tensor.contiguous().values() if tensor.is_nested else tensor


def _statistics(ctx: Any, cotangent: Tensor, share: BatchShare) -> tuple[Tensor, ...]:
    """What an emission returns for its probes."""
    cotangent = unnested(cotangent)
    if isinstance(ctx.rule, Kept):
        return ctx.rule.statistics(share, cotangent)
    x, *others = ctx.saved_tensors
    return ctx.rule.statistics(share, x, cotangent, *others)  # type: ignore[no-any-return]


def is_traced(cotangent: Tensor) -> bool:
    """Whether AOTAutograd traces the backward pass: it must see the statistics, which the compiled
    one then computes. Before torch 2.12 ``is_compiling`` is False there."""
    return torch.compiler.is_compiling() or detect_fake_mode([cotangent]) is not None


def profiler_range(block: str, cotangent: Tensor) -> AbstractContextManager[object]:
    """A range of torch.profiler that names the block, but in no traced graph."""
    if is_traced(cotangent):
        return nullcontext()
    return torch.profiler.record_function(f"kfc_fx::statistics {block}")


torch.compiler.allow_in_graph(emit)
