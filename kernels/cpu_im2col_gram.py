"""Patch Gram by patches, a few images at a time: small maps, and wherever nothing is shared.

    Ω = Σ_chunks A Aᵀ,    A: [G, c·K, T·n]

The images of a chunk are laid out once as ``[C, *padded, n]``, zeros and all. Patches are then
one strided copy: at stride one its runs are lines of a map, times the images, where ``F.unfold``
copies lines of single images. Unlike one unfold of the whole batch, they stay in cache. The Gram
is formed in upper blocks.
"""

from __future__ import annotations

from math import ceil, prod

from torch import Tensor

from kfc_fx.kernels.cpu_patches import padded_images, patches_of, reads_once
from kfc_fx.kernels.cpu_symmetric_product import add_upper_gram, mirror_upper, upper_blocks
from kfc_fx.plan.geometry import ConvGeometry

BUFFER_ELEMENTS = 2**21
LEAST_ROWS = 512  # a shorter sum would spend its time on reading and writing Ω


def fill_im2col_gram(omega: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Ω of ``x``: ``[N, C, *spatial]`` into ``omega``: ``[G, c·K, c·K]``, uninitialised."""
    out = geometry.output_size(x.shape[2:])
    groups, side = geometry.groups, omega.shape[1]
    if not x.numel() or not prod(out):
        omega.zero_()
        return
    images = _images_per_buffer(len(x), groups * side, prod(out))
    buffer = x.new_empty(groups * side * prod(out) * images, dtype=omega.dtype)
    blocks = upper_blocks(side, len(x) * prod(out))
    for chunk, part in enumerate(x.split(images)):
        shape = (x.shape[1], *geometry.kernel_size, *out, len(part))
        patches = buffer[: prod(shape)].view(shape)
        if not reads_once(geometry):
            part = padded_images(part, geometry, omega.dtype, innermost="images")
        patches.movedim(-1, 1 + geometry.ndim).copy_(patches_of(part, geometry))
        add_upper_gram(omega, patches.view(groups, side, -1), blocks, fresh=chunk == 0)
    mirror_upper(omega, blocks)


def _images_per_buffer(images: int, side: int, locations: int) -> int:
    wanted = max(ceil(LEAST_ROWS / locations), BUFFER_ELEMENTS // (side * locations), 1)
    return ceil(images / ceil(images / wanted))
