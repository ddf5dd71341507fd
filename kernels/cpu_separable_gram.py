"""The two partial traces of the patch Gram in ATen, without patches.

    Ω_C = Σ_p w_p x_p x_pᵀ,        w_p = number of (location, offset) pairs that meet pixel p
    Ω_Δ = Σ_c patch_gram(x_c)

The channel factor is one product over the map, every pixel scaled by the root of its weight as
it is copied. The offset factor takes the channels as more examples of a map of one channel: a
scalar product per distinct shift, with exact borders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_patch_gram import patch_gram
from kfc_fx.kernels.cpu_symmetric_product import add_upper_gram, mirror_upper, upper_blocks
from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry

BUFFER_ELEMENTS = 2**20


def separable_gram(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """``x``: ``[N, C, *spatial]`` -> ``[G, C/G, C/G]`` and ``[G, K, K]``."""
    return channel_gram(x, geometry), offset_gram(x, geometry)


def offset_gram(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The trace over channels: ``[G, K, K]``."""
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    shape = (len(x) * channels, groups, *x.shape[2:])
    maps = x.unflatten(1, (groups, channels)).transpose(1, 2).reshape(shape)
    return patch_gram(maps, geometry, bias=False, method="auto")


def channel_gram(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The trace over offsets: ``[G, C/G, C/G]``."""
    dtype = statistic_dtype(x)
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    x, root = _reached_pixels(x, geometry, dtype)
    gram = x.new_empty((groups, channels, channels), dtype=dtype)
    if not x.numel():
        return gram.zero_()
    blocks = upper_blocks(channels, x.numel() // x.shape[1])
    for number, part in enumerate(x.split(max(1, BUFFER_ELEMENTS * len(x) // x.numel()))):
        # Rows of channels: BLAS packs the operands of a narrow product twice as fast.
        scaled = x.new_empty((groups, len(part), *part.shape[2:], channels), dtype=dtype)
        source = part.unflatten(1, (groups, channels)).movedim(0, 1).movedim(2, -1)
        torch.mul(source, root.unsqueeze(-1), out=scaled)
        add_upper_gram(gram, scaled.view(groups, -1, channels).mT, blocks, fresh=number == 0)
    mirror_upper(gram, blocks)
    return gram


def _reached_pixels(x: Tensor, geometry: ConvGeometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The part of ``x`` that patches reach, and the root of each pixel's weight."""
    root = torch.ones((), dtype=dtype, device=x.device)
    for axis, out in enumerate(geometry.output_size(x.shape[2:])):
        counts = reach_counts(geometry, axis, x.shape[2 + axis], out)
        reached = [index for index, count in enumerate(counts) if count]
        if len(reached) < len(counts):
            x = x.index_select(2 + axis, torch.tensor(reached, dtype=torch.long, device=x.device))
        along = torch.tensor([counts[index] for index in reached], dtype=dtype, device=x.device)
        root = root.unsqueeze(-1) * along.sqrt()
    return x, root


def reach_counts(geometry: ConvGeometry, axis: int, size: int, out: int) -> list[int]:
    """How many (location, kernel position) pairs of one axis meet each pixel."""
    counts = [0] * size
    for position in range(geometry.kernel_size[axis]):
        origin = geometry.dilation[axis] * position - geometry.padding[axis][0]
        for location in range(out):
            pixel = geometry.stride[axis] * location + origin
            if 0 <= pixel < size:
                counts[pixel] += 1
    return counts
