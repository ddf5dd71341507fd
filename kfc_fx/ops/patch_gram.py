"""Input factor of a convolution: the Gram matrix of its patches.

    Ω = Σ_n Σ_t [[a]]_{n,t} [[a]]_{n,t}ᵀ                 (Grosse & Martens 2016, eq. 25)

unnormalised: the sum over the N examples and the output locations T, so that statistics of
micro-batches add up. The one scale convention of the project divides it by N later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.plan.geometry import ConvGeometry, IntOrInts, conv_geometry

METHODS = ("auto", "structured", "im2col")


def patch_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: IntOrInts = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    bias: bool = False,
    method: str = "auto",
) -> Tensor:
    """Sum of outer products of a convolution's patches.

    Args:
        x: ``[N, C, *spatial]`` input of the convolution, 0 to 3 spatial dimensions.
        kernel_size: one size per spatial dimension.
        stride, padding, dilation, groups: as in ``F.conv*d``; ``padding`` may also be
            ``(before, after)`` pairs.
        bias: append the homogeneous coordinate, a constant one, to every patch.
        method: ``"structured"``, ``"im2col"`` or ``"auto"``.

    Returns:
        ``[groups, D, D]`` with ``D = C/groups * prod(kernel_size) + bias``, in the column
        order of ``weight.reshape(C_out, -1)``; float64 for a float64 input, else float32.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    geometry = conv_geometry(
        kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    before = [pad[0] for pad in geometry.padding]
    after = [pad[1] for pad in geometry.padding]
    return torch.ops.kfc_fx.patch_gram(
        x,
        list(geometry.kernel_size),
        list(geometry.stride),
        before,
        after,
        list(geometry.dilation),
        groups,
        bias,
        method,
    )


@torch.library.custom_op("kfc_fx::patch_gram", mutates_args=())
def _patch_gram(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding_before: list[int],
    padding_after: list[int],
    dilation: list[int],
    groups: int,
    bias: bool,
    method: str,
) -> Tensor:
    padding = tuple(zip(padding_before, padding_after, strict=True))
    geometry = ConvGeometry(tuple(kernel_size), tuple(stride), padding, tuple(dilation), groups)
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    pads = [p for pair in reversed(geometry.padding) for p in pair]
    windows = F.pad(x, pads) if any(pads) else x
    for axis in range(geometry.ndim):
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        windows = windows.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # windows: [N, C, *out, *kernel] -> rows [G, N*T, C/G*K]
    n, c = x.shape[:2]
    nd = geometry.ndim
    t = 1
    for s in windows.shape[2 : 2 + nd]:
        t *= s
    w = windows.reshape(n, groups, c // groups, t, geometry.offsets)
    rows = w.permute(1, 0, 3, 2, 4).reshape(groups, n * t, c // groups * geometry.offsets)
    if bias:
        rows = torch.cat([rows, rows.new_ones(groups, n * t, 1)], dim=2)
    return rows.mT @ rows


@_patch_gram.register_fake
def _(x, kernel_size, stride, padding_before, padding_after, dilation, groups, bias, method):
    side = x.shape[1] // groups
    for k in kernel_size:
        side = side * k
    side = side + int(bias)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((groups, side, side), dtype=dtype)
