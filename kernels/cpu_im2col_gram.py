"""Patch Gram by patches, a few images at a time: small maps, and wherever nothing is shared.

    Ω = Σ_chunks A Aᵀ,    A: [G, c·K, T·n]

The images of a chunk are laid out once as ``[C, *padded, n]``, zeros and all. Patches are then
one strided copy: at stride one its runs are lines of a map, times the images, where ``F.unfold``
copies lines of single images. Unlike one unfold of the whole batch, they stay in cache. The Gram
is formed in upper blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_buffers import Pass, one_pass
from kfc_fx.kernels.cpu_symmetric_product import add_upper_gram, mirror_upper, upper_blocks
from kfc_fx.kernels.geometry import ConvGeometry

LEAST_ROWS = 512  # a shorter sum would spend its time on reading and writing Ω


def planned_pass(shape: Sequence[int], geometry: ConvGeometry) -> Pass:
    """How much of ``shape`` ``[N, C, *spatial]`` has its patches laid out at once."""
    locations = prod(geometry.output_size(shape[2:]))
    patches = shape[1] // geometry.groups * geometry.offsets * locations
    least = ceil(LEAST_ROWS / max(1, locations))
    return one_pass(shape, geometry.groups, patches, least=least)


def fill_im2col_gram(omega: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Ω of ``x``: ``[N, C, *spatial]`` into ``omega``: ``[G, c·K, c·K]``, uninitialised."""
    out = geometry.output_size(x.shape[2:])
    side = omega.shape[1]
    if not x.numel() or not prod(out):
        omega.zero_()
        return
    planned = planned_pass(x.shape, geometry)
    buffer = x.new_empty(planned.groups * planned.images * side * prod(out), dtype=omega.dtype)
    blocks = upper_blocks(side, len(x) * prod(out))
    channels = planned.groups * x.shape[1] // geometry.groups
    for total, maps in zip(omega.split(planned.groups), x.split(channels, dim=1), strict=True):
        for number, part in enumerate(maps.split(planned.images)):
            shape = (maps.shape[1], *geometry.kernel_size, *out, len(part))
            patches = buffer[: prod(shape)].view(shape)
            source = part if reads_once(geometry) else _padded(part, geometry, omega.dtype)
            patches.copy_(_patches_of(source, patches.shape, geometry))
            add_upper_gram(total, patches.view(len(total), side, -1), blocks, fresh=number == 0)
    mirror_upper(omega, blocks)


def reads_once(geometry: ConvGeometry) -> bool:
    """Whether no pixel is in two patches and none is padding: a layout would be a copy more."""
    steps = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    padded = any(map(any, geometry.padding))
    return not padded and all(k == 1 or k * d <= s for k, s, d in steps)


def _padded(x: Tensor, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """``[n, C, *spatial]`` with its padding, in memory order ``[C, *padded, n]``."""
    sizes = x.shape[2:]
    padded = [size + sum(pad) for size, pad in zip(sizes, geometry.padding, strict=True)]
    laid = x.new_zeros((x.shape[1], *padded, len(x)), dtype=dtype).movedim(-1, 0)
    inside = [slice(p, p + size) for (p, _), size in zip(geometry.padding, sizes, strict=True)]
    laid[(slice(None), slice(None), *inside)] = x
    return laid


def _patches_of(x: Tensor, shape: torch.Size, geometry: ConvGeometry) -> Tensor:
    """View of padded images ``[n, C, *padded]`` as patches ``[C, *kernel, *out, n]``."""
    image, channel, *pixel = x.stride()
    kernel = [step * size for step, size in zip(geometry.dilation, pixel, strict=True)]
    out = [step * size for step, size in zip(geometry.stride, pixel, strict=True)]
    return x.as_strided(shape, (channel, *kernel, *out, image))
