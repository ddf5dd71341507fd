"""Emission: a statistic is the gradient of a probe.

A site's output goes through an emission, the identity in the forward pass. In a backward pass
that takes statistics it returns them as the gradients of *probes*: zero-stride leaf tensors of the
statistics' shapes, which hold no memory. Gradient accumulation then sums the statistics of several
uses, and tracing compilers see nothing but pure functions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from kfc_fx.capture.regions import is_run_again
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.statistics.record import Destination, ForwardRecord, destinations_of
from kfc_fx.statistics.rules.batched_linear import Axes, BatchedLinearRule
from kfc_fx.statistics.rules.matrices import (
    ConvRule,
    ConvTransposeRule,
    EmbeddingRule,
    EmissionRule,
    LinearRule,
    MatrixRule,
)
from kfc_fx.statistics.rules.scale_shift import Norm, ScaleShiftRule
from kfc_fx.statistics.share import WHOLE, BatchShare

Pads = Sequence[tuple[int, int]]


def emit_linear_factors(
    y: Tensor,
    x: Tensor,
    omega_probe: Tensor,
    gamma_probe: Tensor,
    *,
    bias: bool,
    diagonal_input: bool = False,
    diagonal_output: bool = False,
    projections: tuple[int, int, int] = (0, 1, 1),
    reduce: bool = False,
    block: str = "",
    recomputed: bool = False,
) -> Tensor:
    """Identity on ``y`` that emits the Ω of ``x`` and the Γ of the cotangent of ``y``.

    Args:
        y: ``[..., C_out]``, output of a linear layer.
        x: ``[..., C_in]``, its input.
        omega_probe: ``[1, D, D]``, ``D = C_in + bias``; its gradient is ``Σ_n Σ_t a aᵀ``. Of a
            diagonal factor, ``[1, 1, D]``.
        gamma_probe: ``[1, C_out, C_out]``; its gradient is ``Σ_n Σ_t g gᵀ``. Of a diagonal
            factor, ``[1, C_out, 1]``.
        projections: ``(start, stop, P)`` where the weight holds P projections, of which ``y`` is
            some; the probes are then ``[P, ...]``.
        reduce: average x and sum the cotangent over all dimensions but the first and last.

    Of a factor that is cut into k parts, the probe has k times the entries, each of a k-th of the
    side, and no bias column.
    """
    rule = LinearRule(
        bias,
        diagonal_input,
        diagonal_output,
        *projections,
        reduce=reduce,
        input_parts=len(omega_probe) // projections[2],
        output_parts=len(gamma_probe) // projections[2],
    )
    return _emit(block, recomputed, y, rule, (omega_probe, gamma_probe), x)


def emit_factors(
    y: Tensor,
    x: Tensor,
    omega_probe: Tensor,
    gamma_probe: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    block: str = "",
    recomputed: bool = False,
) -> Tensor:
    """Identity on ``y`` that emits the dense Ω of a convolution's input and its Γ.

    Args:
        y: ``[N, C_out, *out]``, output of the convolution.
        x: ``[N, C_in, *in]``, its input.
        omega_probe: ``[groups, D, D]``, ``D = C_in/groups * |Δ| + bias``.
        gamma_probe: ``[groups, C_out/groups, C_out/groups]``.

    Factors may be cut into parts, as those of :func:`emit_linear_factors`, Ω of one offset.
    """
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups)
    parts = len(omega_probe) // groups, len(gamma_probe) // groups
    rule = ConvRule(geometry, bias, False, *parts)
    return _emit(block, recomputed, y, rule, (omega_probe, gamma_probe), x)


def emit_separable_factors(
    y: Tensor,
    x: Tensor,
    channel_probe: Tensor,
    offset_probe: Tensor,
    gamma_probe: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    block: str = "",
    recomputed: bool = False,
) -> Tensor:
    """As :func:`emit_factors`, with the two partial traces of Ω in place of Ω.

    Args:
        channel_probe: ``[groups, C_in/groups, C_in/groups]``, the trace over offsets.
        offset_probe: ``[groups, |Δ|, |Δ|]``, the trace over channels.
    """
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups)
    rule = ConvRule(geometry, False, True, output_parts=len(gamma_probe) // groups)
    return _emit(block, recomputed, y, rule, (channel_probe, offset_probe, gamma_probe), x)


def emit_transposed_factors(
    y: Tensor,
    x: Tensor,
    omega_probe: Tensor,
    gamma_probe: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    block: str = "",
    recomputed: bool = False,
) -> Tensor:
    """Identity on ``y`` that emits the factors of a transposed convolution.

    Args:
        y: ``[N, C_out, *out]``, output of the transposed convolution.
        x: ``[N, C_in, *in]``, its input.
        omega_probe: ``[groups, C_in/groups, C_in/groups]``.
        gamma_probe: ``[groups, R, R]``, ``R = C_out/groups * |Δ|``: patches of the cotangent.
    """
    rule = ConvTransposeRule(conv_geometry(kernel_size, stride, padding, dilation, groups))
    return _emit(block, recomputed, y, rule, (omega_probe, gamma_probe), x)


def emit_embedding_factors(
    y: Tensor,
    indices: Tensor,
    omega_probe: Tensor,
    gamma_probe: Tensor,
    *,
    padding_idx: int | None,
    block: str = "",
    recomputed: bool = False,
) -> Tensor:
    """Identity on ``y`` that emits the factors of an embedding.

    Args:
        y: ``[..., E]``, rows of the table.
        indices: ``[...]``, their numbers.
        omega_probe: ``[1, 1, V]``; its gradient counts every token.
        gamma_probe: ``[1, E, E]``, or its parts.
    """
    rule = EmbeddingRule(omega_probe.shape[-1], padding_idx, len(gamma_probe))
    return _emit(block, recomputed, y, rule, (omega_probe, gamma_probe), indices)


def emit_scale_shift_factors(
    y: Tensor,
    x: Tensor,
    omega_probe: Tensor,
    gamma_probe: Tensor,
    *running: Tensor,
    norm: Norm,
    shape: Sequence[int],
    bias: bool,
    groups: int = 1,
    eps: float | None = None,
    block: str = "",
    recomputed: bool = False,
) -> Tensor:
    """Identity on ``y`` that emits the factor of a norm layer's scale and shift.

    Args:
        y: the layer's output, examples first.
        x: its input.
        omega_probe: ``[C, 2, 2]``, or ``[C, 1, 1]`` without bias; C the elements of ``shape``.
        gamma_probe: ``[C, 1, 1]``; its gradient counts rows.
        running: mean and variance that a batch norm in evaluation mode reads.
        norm, shape, groups, eps: which norm, and its arguments.
    """
    rule = ScaleShiftRule(norm, tuple(shape), bias, groups, eps)
    return _emit(block, recomputed, y, rule, (omega_probe, gamma_probe), x, *running)


def emit_batched_linear_factors(
    y: Tensor,
    x: Tensor,
    omega_probe: Tensor,
    gamma_probe: Tensor,
    *ends: Tensor,
    bias: bool,
    inputs: Axes,
    outputs: Axes,
    entries: tuple[int, int, int],
    block: str = "",
    recomputed: bool = False,
) -> Tensor:
    """Identity on ``y`` that emits the factors of a batched linear map, one pair for each entry.

    Args:
        y: its output, with the axes of entry and row that ``outputs`` names.
        x: its input, with the axes of entry and channel that ``inputs`` names.
        omega_probe: ``[E, D, D]``, ``D = C_in + bias``.
        gamma_probe: ``[E, C_out, C_out]``.
        ends: ``[E]`` where x is ``[S, C_in]``: the end of each entry's rows.
        entries: ``(start, stop, E)``, the entries of the weight that ``y`` is of.
    """
    rule = BatchedLinearRule(bias, inputs, outputs, *entries)
    return _emit(block, recomputed, y, rule, (omega_probe, gamma_probe), x, *ends)


EMISSIONS = (
    emit_batched_linear_factors,
    emit_linear_factors,
    emit_factors,
    emit_separable_factors,
    emit_transposed_factors,
    emit_embedding_factors,
    emit_scale_shift_factors,
)
"""Every emission, as it stands in a graph."""


def _emit(
    block: str,
    recomputed: bool,
    y: Tensor,
    rule: EmissionRule,
    probes: tuple[Tensor, ...],
    *inputs: Tensor,
) -> Tensor:
    inputs = tuple(map(_dense, inputs))
    to = destinations_of(probes)
    if not recomputed and _are_hooked(y):
        if is_run_again():
            return y  # it has emitted when it ran first
        kept = Kept.of(rule, inputs, to[0].record.share if to else WHOLE)
        return _Emission.apply(y, kept, block, to, len(probes), *probes)
    return _Emission.apply(y, rule, block, to, len(probes), *probes, *inputs)


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
    return hooks is not None and not _is_traced(y)


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
        if _is_traced(cotangent):
            statistics = _statistics(ctx, cotangent, WHOLE)
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


def _dense(tensor: Tensor) -> Tensor:
    """Of a nested tensor, the rows of all its entries, one entry after the other."""
    return tensor.contiguous().values() if tensor.is_nested else tensor


def _statistics(ctx: Any, cotangent: Tensor, share: BatchShare) -> tuple[Tensor, ...]:
    """What an emission returns for its probes."""
    cotangent = _dense(cotangent)
    if isinstance(ctx.rule, Kept):
        return ctx.rule.statistics(share, cotangent)
    x, *others = ctx.saved_tensors
    return ctx.rule.statistics(share, x, cotangent, *others)  # type: ignore[no-any-return]


def _is_traced(cotangent: Tensor) -> bool:
    """Whether AOTAutograd traces the backward pass: it must see the statistics, which the compiled
    one then computes. Before torch 2.12 ``is_compiling`` is False there."""
    return torch.compiler.is_compiling() or detect_fake_mode([cotangent]) is not None


def profiler_range(block: str, cotangent: Tensor) -> AbstractContextManager[object]:
    """A range of torch.profiler that names the block, but in no traced graph."""
    if _is_traced(cotangent):
        return nullcontext()
    return torch.profiler.record_function(f"kfc_fx::statistics {block}")


def conv_geometry(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    pads = tuple((before, after) for before, after in padding)
    return ConvGeometry(tuple(kernel_size), tuple(stride), pads, tuple(dilation), groups)


for _emission in EMISSIONS:
    torch.compiler.allow_in_graph(_emission)
