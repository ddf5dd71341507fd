"""Input factor of a convolution: the Gram matrix of its patches.

    Ω = Σ_n Σ_t [[a]]_{n,t} [[a]]_{n,t}ᵀ                 (Grosse & Martens 2016, eq. 25)

unnormalised: the sum over the N examples and the output locations T, so that statistics of
micro-batches add up. The one scale convention of the project divides it by N later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.kernels import cpu_patch_gram
from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import IntOrInts
from kfc_fx.ops.convolution import Padding, checked_geometry, decoded, encoded
from kfc_fx.ops.library import define

METHODS = ("auto", "structured", "im2col")


def patch_gram(
    x: Tensor,
    kernel_size: IntOrInts,
    *,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    bias: bool = False,
    method: str = "auto",
) -> Tensor:
    """Sum of outer products of a convolution's patches.

    Args:
        x: ``[N, C, *spatial]`` input of the convolution, 0 to 3 spatial dimensions; float32,
            float64, bfloat16 or float16, of any strides.
        kernel_size: one size per spatial dimension, or one number for all of them.
        stride, padding, dilation, groups: as in ``F.conv*d``; ``padding`` may also be
            ``(before, after)`` pairs.
        bias: append the homogeneous coordinate, a constant one, to every patch.
        method: ``"structured"`` computes each distinct product of the blocks once,
            ``"im2col"`` multiplies patches, ``"auto"`` takes the faster by a cost model.

    Returns:
        ``[groups, D, D]`` with ``D = C/groups * prod(kernel_size) + bias``, in the column
        order of ``weight.reshape(C_out, -1)``; float64 for a float64 input, else float32.

    Raises:
        ValueError: an unknown method; a geometry that does not fit ``x``.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    geometry = checked_geometry(x, kernel_size, stride, padding, dilation, groups)
    return torch.ops.kfc_fx.patch_gram.default(x, encoded(geometry), bias, method)


def _on_any_device(
    x: Tensor,
    numbers: list[int],
    bias: bool,
    method: str,
) -> Tensor:
    geometry = decoded(numbers)
    return cpu_patch_gram.patch_gram(x, geometry, bias=bias, method=method)


def _fake(
    x: Tensor,
    numbers: list[int],
    bias: bool,
    method: str,
) -> Tensor:
    geometry = decoded(numbers)
    side = x.shape[1] // geometry.groups * geometry.offsets + int(bias)
    return x.new_empty((geometry.groups, side, side), dtype=statistic_dtype(x))


define(
    "patch_gram(Tensor x, int[] geometry, bool bias, str method) -> Tensor",
    _on_any_device,
    _fake,
)
