"""Patch Gram by patches, a few images at a time: small maps, and wherever nothing is shared.

    Ω = Σ_chunks A Aᵀ,    A: [G, c·K, n·T]

A chunk is copied once, offset by offset, into one buffer whose zeros are the padding; its Gram
is formed in upper blocks. Unlike one unfold of the whole batch, the patches stay in cache.
"""

from __future__ import annotations

import itertools
from math import ceil, prod

from torch import Tensor

from kfc_fx.kernels.cpu_symmetric_product import add_upper_gram, mirror_upper, upper_blocks
from kfc_fx.plan.geometry import ConvGeometry

BUFFER_ELEMENTS = 2**21
LEAST_ROWS = 512  # a shorter sum would spend its time on reading and writing Ω


def fill_im2col_gram(omega: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Ω of ``x``: ``[N, C, *spatial]`` into ``omega``: ``[G, c·K, c·K]``, uninitialised."""
    dtype = omega.dtype
    out = geometry.output_size(x.shape[2:])
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    side = channels * geometry.offsets
    if not x.numel() or not prod(out):
        omega.zero_()
        return
    images = _images_per_buffer(len(x), groups * side, prod(out))
    shape = (groups, channels, *geometry.kernel_size, images, *out)
    padded = any(map(any, geometry.padding)) or len(x) % images
    patches = x.new_zeros(shape, dtype=dtype) if padded else x.new_empty(shape, dtype=dtype)
    blocks = upper_blocks(side, len(x) * prod(out))
    for chunk, part in enumerate(x.split(images)):
        fill_patches(patches, part.contiguous(), geometry)
        add_upper_gram(omega, patches.view(groups, side, -1), blocks, fresh=chunk == 0)
    mirror_upper(omega, blocks)


def _images_per_buffer(images: int, side: int, locations: int) -> int:
    wanted = max(ceil(LEAST_ROWS / locations), BUFFER_ELEMENTS // (side * locations), 1)
    return ceil(images / ceil(images / wanted))


def fill_patches(patches: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Patches of ``x`` into ``[G, c, *kernel, n, *out]``, whose padding is zero already."""
    axes = geometry.ndim
    channels = x.shape[1] // geometry.groups
    source = x.unflatten(1, (geometry.groups, channels)).movedim(0, 2)  # [G, c, n, *spatial]
    if len(x) < patches.shape[2 + axes]:
        patches.narrow(2 + axes, len(x), patches.shape[2 + axes] - len(x)).zero_()
        patches = patches.narrow(2 + axes, 0, len(x))
    targets = patches.flatten(2, 1 + axes).unbind(2)
    every = (slice(None),) * 3
    for target, offset in zip(
        targets, itertools.product(*map(range, geometry.kernel_size)), strict=True
    ):
        ranges = [
            _reached(geometry, axis, position, x.shape[2 + axis], target.shape[3 + axis])
            for axis, position in enumerate(offset)
        ]
        locations = tuple(locations for locations, _ in ranges)
        target[every + locations] = source[every + tuple(pixels for _, pixels in ranges)]


def _reached(
    geometry: ConvGeometry, axis: int, position: int, size: int, out: int
) -> tuple[slice, slice]:
    """Locations at which one kernel position is on the map, and the pixels it meets there."""
    stride = geometry.stride[axis]
    origin = geometry.dilation[axis] * position - geometry.padding[axis][0]
    start = max(0, -(origin // stride))
    stop = max(start, min(out, (size - 1 - origin) // stride + 1))
    first = stride * start + origin
    return slice(start, stop), slice(first, first + stride * (stop - start), stride)
