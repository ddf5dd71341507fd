"""Separable input factor of a convolution: Ω ≈ Ω_C ⊗ Ω_Δ / tr Ω."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfc_fx.ops.patch_gram import patch_gram
from kfc_fx.plan.geometry import IntOrInts


def separable_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: IntOrInts = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The two partial traces of ``patch_gram(x, ...)``.

    Returns:
        ``channel``: ``[groups, C/groups, C/groups]``, the trace over kernel offsets, and
        ``offset``: ``[groups, K, K]`` with ``K = prod(kernel_size)``, the trace over channels;
        float64 for a float64 input, else float32.
    """
    dense = patch_gram(
        x, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    offsets = 1
    for k in kernel_size:
        offsets *= k
    blocks = dense.unflatten(2, (-1, offsets)).unflatten(1, (-1, offsets))
    return torch.einsum("gckdk->gcd", blocks), torch.einsum("gckcl->gkl", blocks)
