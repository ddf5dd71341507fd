# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""How a convolution walks over activations packed with the batch innermost.

Entry ``(c, δ)`` of the patch at location ``t`` of image ``n`` is at

    address(c, δ, t, n) = base(c, δ) + line(t) + run(t_w, n)

where ``line`` belongs to one output line and ``run`` is the place within it. Steps of a K loop
take ``BLOCK_K`` places of a line at a time. Distances are counted in places of the batch, so that
a kernel that multiplies them by the padded batch knows their divisibility.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.triton_pack import MAX_SPATIAL, Packed


@triton.jit
def patch_entry(column, channel_step, depth_step, height_step, width_step,
                kernel_depth, kernel_height, kernel_width):  # fmt: skip
    """``base(c, δ)`` in places of the batch, for columns in the order of the weight's."""
    offsets = kernel_depth * kernel_height * kernel_width
    offset = column % offsets
    w = offset % kernel_width
    h = (offset // kernel_width) % kernel_height
    d = offset // (kernel_width * kernel_height)
    place = (column // offsets).to(tl.int64) * channel_step + d.to(tl.int64) * depth_step
    return place + h.to(tl.int64) * height_step + w.to(tl.int64) * width_step


@triton.jit
def line_place(step, steps_per_line, out_height, line_depth, line_height):
    """``line(t)``, in places of the batch, of the output line that a step belongs to."""
    line = step // steps_per_line
    depth = tl.cast(line // out_height, tl.int64) * line_depth
    return depth + tl.cast(line % out_height, tl.int64) * line_height


@triton.jit
def run_place(step, steps_per_line, padded_batch, skipped,
              STRIDED: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Places along K of a step, and the elements that they are from the line's beginning."""
    run = (step % steps_per_line) * BLOCK_K + tl.arange(0, BLOCK_K)
    if STRIDED:
        return run, run + (run // padded_batch) * skipped
    else:  # noqa: RET505 - the branch is chosen when the kernel is compiled
        return run, run


@dataclass(frozen=True)
class PatchWalk:
    """A convolution over a packed buffer, as distances in places of the batch.

    Three spatial dimensions always; those that are missing have size one.
    """

    kernel: tuple[int, ...]
    out: tuple[int, ...]
    channel_step: int
    offset_steps: tuple[int, int, int]
    line_steps: tuple[int, int]
    stride_width: int

    @property
    def lines(self) -> int:
        """Number of output lines of an image."""
        return self.out[0] * self.out[1]


def patch_walk(packed: Packed, geometry: ConvGeometry) -> PatchWalk:
    """The distances between a patch's entries and between output locations."""
    _, depth, height, width, _ = packed.buffer.shape
    return _walk(geometry, depth, height, width)


@lru_cache(maxsize=512)
def _walk(geometry: ConvGeometry, depth: int, height: int, width: int) -> PatchWalk:
    missing = (1,) * (MAX_SPATIAL - geometry.ndim)
    stride, dilation = missing + geometry.stride, missing + geometry.dilation
    kernel = missing + geometry.kernel_size
    out = [
        max(0, (size - d * (k - 1) - 1) // s + 1)
        for size, k, s, d in zip((depth, height, width), kernel, stride, dilation, strict=True)
    ]
    plane = height * width
    return PatchWalk(
        kernel,
        tuple(out),
        depth * plane,
        (dilation[0] * plane, dilation[1] * width, dilation[2]),
        (stride[0] * plane, stride[1] * width),
        stride[2],
    )
