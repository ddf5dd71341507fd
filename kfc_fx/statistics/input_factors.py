"""Statistics of a layer's input alone, taken in the forward pass.

Where a block needs no Γ, no cotangent is needed either: the graph computes Ω beside the layer and
returns it, and no Fisher pass is run for it. The functions mirror the emissions, name by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.statistics.emission import (
    Pads,
    conv_geometry,
    emit_batched_linear_factors,
    emit_factors,
    emit_linear_factors,
    emit_separable_factors,
    emit_transposed_factors,
    profiler_range,
)
from kfc_fx.statistics.rules.batched_linear import Axes, BatchedLinearRule
from kfc_fx.statistics.rules.matrices import ConvRule, ConvTransposeRule, LinearRule, MatrixRule
from kfc_fx.statistics.running import forward_share


def linear_input_factors(
    x: Tensor,
    *,
    bias: bool,
    projections: tuple[int, int, int] = (0, 1, 1),
    reduce: bool = False,
    block: str = "",
) -> tuple[Tensor, ...]:
    """The Ω of the input of a linear layer; see :func:`emit_linear_factors`."""
    return _taken(block, LinearRule(bias, False, False, *projections, reduce=reduce), x)


def input_factors(
    x: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    block: str = "",
) -> tuple[Tensor, ...]:
    """The dense Ω of a convolution's input; see :func:`emit_factors`."""
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups)
    return _taken(block, ConvRule(geometry, bias), x)


def separable_input_factors(
    x: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    block: str = "",
) -> tuple[Tensor, ...]:
    """The two partial traces of a convolution's Ω; see :func:`emit_separable_factors`."""
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups)
    return _taken(block, ConvRule(geometry, False, True), x)


def transposed_input_factors(
    x: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
    block: str = "",
) -> tuple[Tensor, ...]:
    """The Ω of a transposed convolution's input; see :func:`emit_transposed_factors`."""
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups)
    return _taken(block, ConvTransposeRule(geometry), x)


def batched_linear_input_factors(
    x: Tensor,
    *ends: Tensor,
    bias: bool,
    inputs: Axes,
    outputs: Axes,
    entries: tuple[int, int, int],
    block: str = "",
) -> tuple[Tensor, ...]:
    """The Ω of each entry of a batched linear map; see :func:`emit_batched_linear_factors`."""
    return _taken(block, BatchedLinearRule(bias, inputs, outputs, *entries), x, *ends)


INPUT_FACTORS: dict[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]] = {
    emit_batched_linear_factors: batched_linear_input_factors,
    emit_linear_factors: linear_input_factors,
    emit_factors: input_factors,
    emit_separable_factors: separable_input_factors,
    emit_transposed_factors: transposed_input_factors,
}
"""The function that takes the place of each emission whose Γ is not needed."""


def _taken(block: str, rule: MatrixRule, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    x = x.detach()
    x = x.contiguous().values() if x.is_nested else x
    with profiler_range(block, x):
        return rule.input_statistics(forward_share(block), x, *others)


for _function in INPUT_FACTORS.values():
    _allowed: Any = torch.compiler.allow_in_graph(_function)
