# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Activations with the batch innermost, which the convolution kernels read.

    packed[c, d, h, w, n] = x[n, c, d − p_d, h − p_h, w − p_w],   zero outside the image

``x`` is ``[N, C, *spatial]`` with up to three spatial dimensions and any strides; ``packed`` is
``[C, D', H', W', N']`` with the padding of the convolution and ``N'`` the next multiple of 16
bytes. With the batch innermost a kernel offset is a constant distance in memory that keeps every
16-byte load aligned, both operands of a Gram product lie along K, and zeros stand for every
border, so that no product needs a mask but for its ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.triton_case import KernelCase, argument_types

BLOCK_POSITIONS = 64
BLOCK_BATCH = 32
VECTOR_BYTES = 16
MAX_SPATIAL = 3


@triton.jit
def round_to_tf32(values):
    """Round float32 to the nearest TF32, which the tensor cores would else truncate to."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, values, rounded)


@triton.jit
def read_block(
    x, batch, channels, depth, height, width, padded_depth, padded_height, padded_width,
    before_depth, before_height, before_width,
    stride_batch, stride_channel, stride_depth, stride_height, stride_width, padded_batch,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a program packs: values ``[N, P]``, its images, and of its positions the channel, the
    padded pixel, the place ``(d, h, w)`` in the map, and whether each exists and is in the map.

    Positions run over ``(c, d, h, w)``, or over ``(d, h, w, c)`` where channels are adjacent.
    """
    batch_blocks = tl.cdiv(padded_batch, BLOCK_N)
    place = tl.program_id(0) // batch_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    image = tl.program_id(0) % batch_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pixels = padded_depth * padded_height * padded_width
    if CHANNELS_LAST:
        channel = place % channels
        pixel = place // channels
    else:
        channel = place // pixels
        pixel = place % pixels
    w = pixel % padded_width - before_width
    h = (pixel // padded_width) % padded_height - before_height
    d = pixel // (padded_width * padded_height) - before_depth
    exists = place < channels * pixels
    inside = exists & (w >= 0) & (w < width) & (h >= 0) & (h < height) & (d >= 0) & (d < depth)
    source = channel.to(tl.int64) * stride_channel + d.to(tl.int64) * stride_depth
    source += h.to(tl.int64) * stride_height + w.to(tl.int64) * stride_width
    pointers = x + image.to(tl.int64)[:, None] * stride_batch + source[None, :]
    values = tl.load(pointers, mask=(image < batch)[:, None] & inside[None, :], other=0.0)
    return values, image, channel, pixel, d, h, w, exists, inside


@triton.jit
def pack_kernel(
    x, packed, batch, channels, depth, height, width, padded_depth, padded_height, padded_width,
    before_depth, before_height, before_width,
    stride_batch, stride_channel, stride_depth, stride_height, stride_width, batch_vectors,
    CHANNELS_LAST: tl.constexpr, ROUND_TF32: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid ``[blocks of positions · blocks of the batch]``; reads ``[N, P]``, writes ``[P, N]``."""
    padded_batch = batch_vectors * UNIT
    values, image, channel, pixel, _, _, _, exists, _ = read_block(
        x, batch, channels, depth, height, width, padded_depth, padded_height, padded_width,
        before_depth, before_height, before_width,
        stride_batch, stride_channel, stride_depth, stride_height, stride_width, padded_batch,
        CHANNELS_LAST, BLOCK_P, BLOCK_N)  # fmt: skip
    if ROUND_TF32:
        values = round_to_tf32(values)
    target = (channel * (padded_depth * padded_height * padded_width) + pixel).to(tl.int64)
    mask = exists[:, None] & (image < padded_batch)[None, :]
    tl.store(packed + (target * padded_batch)[:, None] + image[None, :], tl.trans(values),
             mask=mask)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """``buffer`` is ``[C, D', H', W', N']``; ``batch`` of its innermost entries are images."""

    buffer: Tensor
    batch: int

    @property
    def channels(self) -> int:
        """Number of channels, all groups together."""
        return self.buffer.shape[0]

    @property
    def padded_batch(self) -> int:
        """Length of the innermost dimension."""
        return self.buffer.shape[4]

    @property
    def unit(self) -> int:
        """Elements in 16 bytes; the padded batch is a multiple of it."""
        return VECTOR_BYTES // self.buffer.element_size()


def pack(x: Tensor, geometry: ConvGeometry, *, round_tf32: bool = False) -> Packed:
    """Lay ``x`` out with the batch innermost and the convolution's zeros around it.

    Args:
        x: ``[N, C, *spatial]``, not empty, in a dtype of two or four bytes.
        geometry: of the convolution; its padding is applied.
        round_tf32: round float32 to the nearest number that TF32 holds.
    """
    source = pack_source(x, geometry)
    batch, channels, *sizes = source.volume.shape
    packed = x.new_empty((channels, *source.padded, source.padded_batch))
    pack_kernel[(source.blocks,)](
        source.volume, packed, batch, channels, *sizes, *source.padded, *source.before,
        *source.volume.stride(), source.vectors,
        CHANNELS_LAST=source.volume.stride(1) == 1 and channels > 1, ROUND_TF32=round_tf32,
        UNIT=source.unit, BLOCK_P=BLOCK_POSITIONS, BLOCK_N=BLOCK_BATCH, num_warps=4,
    )  # fmt: skip
    return Packed(packed, batch)


@dataclass(frozen=True)
class PackSource:
    """What a packing kernel reads, and how large what it writes is.

    ``volume`` is ``[N, C, D, H, W]``, ``padded`` its ``D', H', W'``, ``before`` the padding at the
    front of each; ``unit`` elements have 16 bytes, and ``vectors`` of them hold the batch.
    """

    volume: Tensor
    padded: tuple[int, ...]
    before: tuple[int, ...]
    unit: int
    vectors: int

    @property
    def padded_batch(self) -> int:
        """N'."""
        return self.vectors * self.unit

    @property
    def blocks(self) -> int:
        """Programs of a launch."""
        positions = self.volume.shape[1] * prod(self.padded)
        return -(-positions // BLOCK_POSITIONS) * -(-self.padded_batch // BLOCK_BATCH)


def pack_source(x: Tensor, geometry: ConvGeometry) -> PackSource:
    """``x``, ``[N, C, *spatial]``, with the padding of ``geometry`` around it."""
    padding = ((0, 0),) * (MAX_SPATIAL - geometry.ndim) + geometry.padding
    volume = with_three_dimensions(x)
    sizes = volume.shape[2:]
    padded = tuple(size + sum(pad) for size, pad in zip(sizes, padding, strict=True))
    unit = VECTOR_BYTES // x.element_size()
    return PackSource(
        volume, padded, tuple(pad[0] for pad in padding), unit, -(-volume.shape[0] // unit)
    )


def pack_reference(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The same buffer in plain torch."""
    volume = with_three_dimensions(F.pad(x, [p for pad in reversed(geometry.padding) for p in pad]))
    unit = VECTOR_BYTES // x.element_size()
    missing = -volume.shape[0] % unit
    return F.pad(volume.permute(1, 2, 3, 4, 0), (0, missing)).contiguous()


def with_three_dimensions(x: Tensor) -> Tensor:
    """``[N, C, *spatial]`` as ``[N, C, D, H, W]``; missing dimensions have size one."""
    missing = MAX_SPATIAL + 2 - x.ndim
    return x.reshape(*x.shape[:2], *(1,) * missing, *x.shape[2:])


def offline_cases() -> Iterator[KernelCase]:
    """Both memory formats in each width of element."""
    names = pack_kernel.arg_names
    integers = " ".join(name for name in names[2 : names.index("CHANNELS_LAST")])
    for dtype, unit in (("bf16", 8), ("fp32", 4)):
        types = argument_types({"i32": integers, f"*{dtype}": "x packed"})
        for last in (False, True):
            adjacent = "stride_channel" if last else "stride_width"
            constants = {
                "CHANNELS_LAST": last,
                "ROUND_TF32": dtype == "fp32",
                "UNIT": unit,
                "BLOCK_P": BLOCK_POSITIONS,
                "BLOCK_N": BLOCK_BATCH,
            }
            config = "channels last" if last else "channels first"
            divisible = frozenset(["stride_batch"])
            yield KernelCase(
                "pack",
                pack_kernel,
                config,
                dtype,
                types | {adjacent: 1},
                constants,
                divisible,
                4,
                1,
            )


def round_to_tf32_reference(x: Tensor) -> Tensor:
    """Nearest TF32 number, ties away from zero."""
    rounded = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)
