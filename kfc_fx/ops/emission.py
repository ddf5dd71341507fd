"""Emission: a statistic is the gradient of a probe.

A site's output goes through :func:`emit_factors`, the identity in the forward pass. In the
backward pass of the Fisher pass it returns the factor statistics as the gradients of *probes*:
zero-stride leaf tensors of the statistics' shapes, which hold no memory. Gradient accumulation
then sums the statistics of several uses and several micro-batches, and tracing compilers see
nothing but pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from kfc_fx.ops.patch_gram import patch_gram
from kfc_fx.ops.row_gram import row_gram
from kfc_fx.ops.separable_gram import separable_gram

Pads = Sequence[tuple[int, int]]

_fisher_passes = 0


@contextmanager
def fisher_pass() -> Iterator[None]:
    """While it lasts, backward passes through emissions compute statistics.

    A counter of the process, not of the thread: autograd runs CUDA nodes on threads of its own.
    Outside, emissions pass the cotangent on and return nothing for the probes.
    """
    global _fisher_passes
    _fisher_passes += 1
    try:
        # The graph is retained for the loss's own backward pass; AOTAutograd reads the setting
        # when it compiles and again when it runs.
        with torch._functorch.config.patch(donated_buffer=False):
            yield
    finally:
        _fisher_passes -= 1


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
) -> Tensor:
    """Identity on ``y`` that emits the dense Ω of ``x`` and the Γ of the cotangent of ``y``.

    Args:
        y: output of the layer, ``[N, C_out, *out]``, or ``[..., C_out]`` for a linear layer
            (``kernel_size`` empty).
        x: its input, ``[N, C_in, *in]`` or ``[..., C_in]``.
        omega_probe: ``[groups, D, D]``, ``D = C_in/groups * |Δ| + bias``; its gradient is
            ``Σ_n Σ_t a aᵀ``.
        gamma_probe: ``[groups, C_out/groups, C_out/groups]``; its gradient is ``Σ_n Σ_t g gᵀ``.
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    return _Emission.apply(y, x, gamma_probe, omega_probe, None, geometry, bias)


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
) -> Tensor:
    """As :func:`emit_factors`, with the two partial traces of Ω in place of Ω.

    Args:
        channel_probe: ``[groups, C_in/groups, C_in/groups]``, the trace over offsets.
        offset_probe: ``[groups, |Δ|, |Δ|]``, the trace over channels.
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    return _Emission.apply(y, x, gamma_probe, channel_probe, offset_probe, geometry, False)


class _Emission(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        x: Tensor,
        gamma_probe: Tensor,
        omega_probe: Tensor,
        offset_probe: Tensor | None,
        geometry: tuple[Any, ...],
        bias: bool,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.geometry, ctx.bias, ctx.separable = geometry, bias, offset_probe is not None
        # An alias, not a view: no copy, and an in-place op may follow. `mark_dirty` would do
        # the same but for an output that is itself a view, as F.linear's on a 3-d input is.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not (_fisher_passes or torch.compiler.is_compiling()):
            return cotangent, None, None, None, None, None, None
        (x,) = ctx.saved_tensors
        omega, offset = _input_factor(x, ctx.geometry, ctx.bias, ctx.separable)
        gamma = _output_factor(cotangent, len(ctx.geometry[0]), ctx.geometry[4])
        return cotangent, None, gamma, omega, offset, None, None


def _input_factor(
    x: Tensor, geometry: tuple[Any, ...], bias: bool, separable: bool
) -> tuple[Tensor, Tensor | None]:
    kernel_size, stride, padding, dilation, groups = geometry
    if not kernel_size:
        return row_gram(x, bias=bias).unsqueeze(0), None
    if x.dim() == len(kernel_size) + 1:
        x = x.unsqueeze(0)
    if separable:
        return separable_gram(
            x, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
    omega = patch_gram(
        x, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias
    )
    return omega, None


def _output_factor(cotangent: Tensor, spatial: int, groups: int) -> Tensor:
    if not spatial:
        return row_gram(cotangent).unsqueeze(0)
    if cotangent.dim() == spatial + 1:
        cotangent = cotangent.unsqueeze(0)
    return patch_gram(cotangent, (1,) * spatial, groups=groups)


class _FisherGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probe: Tensor) -> Tensor:  # type: ignore[override]
        return probe.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:  # type: ignore[override]
        return gradient if _fisher_passes else None


def gate(probe: Tensor) -> Tensor:
    """Let a probe's gradient through in a Fisher pass only.

    For compiled graphs, whose backward computes every output that it was traced with.
    """
    return _FisherGate.apply(probe)


torch.compiler.allow_in_graph(emit_factors)
torch.compiler.allow_in_graph(emit_separable_factors)
