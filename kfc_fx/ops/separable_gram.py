"""Separable input factor of a convolution: Ω ≈ Ω_C ⊗ Ω_Δ / tr Ω.

The factors are the two partial traces of the patch Gram, over offsets and over channels; both
are formed without patches (``kernels.cpu_separable_gram``, ``kernels.triton_separable_gram``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.kernels import cpu_separable_gram
from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import IntOrInts
from kfc_fx.ops.convolution import Padding, checked_geometry, decoded, encoded
from kfc_fx.ops.library import define


def separable_gram(
    x: Tensor,
    kernel_size: IntOrInts,
    *,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The two partial traces of ``patch_gram(x, ...)``, unnormalised.

    Args:
        x: ``[N, C, *spatial]``.
        kernel_size, stride, padding, dilation, groups: as for ``patch_gram``.

    Returns:
        ``channel``: ``[groups, C/groups, C/groups]``, the trace over kernel offsets, and
        ``offset``: ``[groups, K, K]`` with ``K = prod(kernel_size)``, the trace over channels;
        float64 for a float64 input, else float32. On CUDA the pixels of ``channel``, weighted, are
        rounded again for the tensor cores, where those multiply.

    Raises:
        ValueError: a geometry that does not fit ``x``.
    """
    geometry = checked_geometry(x, kernel_size, stride, padding, dilation, groups)
    return torch.ops.kfc_fx.separable_gram.default(x, encoded(geometry))


def _on_any_device(
    x: Tensor,
    numbers: list[int],
) -> tuple[Tensor, Tensor]:
    geometry = decoded(numbers)
    return cpu_separable_gram.separable_gram(x, geometry)


def _fake(
    x: Tensor,
    numbers: list[int],
) -> tuple[Tensor, Tensor]:
    geometry = decoded(numbers)
    groups, offsets = geometry.groups, geometry.offsets
    channels = x.shape[1] // groups
    return (
        x.new_empty((groups, channels, channels), dtype=statistic_dtype(x)),
        x.new_empty((groups, offsets, offsets), dtype=statistic_dtype(x)),
    )


define(
    "separable_gram(Tensor x, int[] geometry) -> (Tensor, Tensor)",
    _on_any_device,
    _fake,
)
