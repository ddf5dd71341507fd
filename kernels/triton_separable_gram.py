# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The two partial traces of the patch Gram on the tensor cores, without patches.

    Ω_C[g] = Σ_n Σ_p w_p x_np x_npᵀ,     w_p: how many (location, offset) pairs meet pixel p
    Ω_Δ[g] = Σ_c patch_gram(x_c)

One pass reads ``x`` where it lies and writes what each of two Gram products reads along K:

    weighted[c, p, n] = √(w_p / max w) · x[n, c, p]
    maps[b, p', c, n] = x[n, b·T + c, p' − padding],    zero outside the image

The weight is at most one, so float16 does not overflow, and exactly one inside the map of a
convolution of stride one, where nothing is rounded. ``maps`` has blocks of ``T`` channels
innermost, like more images of a map of one channel: the im2col product then walks along them with
aligned loads and no masks, a block a program, so that a block's lines stay in the cache between
the offsets that read them. Read in place, every one of its loads would be a single element with a
border to test, which costs more than the copy. So memory moves ``x`` five times, for both.

A factor of a single offset or a single channel is the trace of the other, with no pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from types import EllipsisType

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfc_fx.kernels.cpu_separable_gram import reach_counts
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.triton_case import KernelCase, argument_types
from kfc_fx.kernels.triton_configs import precision_mode, processor
from kfc_fx.kernels.triton_im2col_gram import im2col_gram, im2col_gram_reference, packed_gram
from kfc_fx.kernels.triton_pack import (
    BLOCK_BATCH,
    BLOCK_POSITIONS,
    MAX_SPATIAL,
    Packed,
    pack_source,
    read_block,
    round_to_tf32,
)
from kfc_fx.kernels.triton_row_gram import row_gram

LEAST_LINE = 512  # places along K, so that the masked end of a line is a small part of it


@triton.jit
def separable_pack_kernel(
    x, counts, weighted, maps, batch, channels, depth, height, width,
    padded_depth, padded_height, padded_width, before_depth, before_height, before_width,
    stride_batch, stride_channel, stride_depth, stride_height, stride_width, batch_vectors,
    together, most,
    CHANNELS_LAST: tl.constexpr, ROUND_TF32: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid ``[blocks of positions · blocks of the batch]``; reads ``[N, P]``, writes ``[P, N]``.

    ``counts`` is float32, the pairs that meet each pixel along the depth, the height and the
    width, one after the other; ``most`` is the largest product of the three.
    """
    padded_batch = batch_vectors * UNIT
    values, image, channel, pixel, d, h, w, exists, inside = read_block(
        x, batch, channels, depth, height, width, padded_depth, padded_height, padded_width,
        before_depth, before_height, before_width,
        stride_batch, stride_channel, stride_depth, stride_height, stride_width, padded_batch,
        CHANNELS_LAST, BLOCK_P, BLOCK_N)  # fmt: skip
    weight = tl.load(counts + d, mask=inside, other=0.0)
    weight *= tl.load(counts + depth + h, mask=inside, other=0.0)
    weight *= tl.load(counts + depth + height + w, mask=inside, other=0.0)
    root = tl.sqrt_rn(tl.div_rn(weight, most))
    # What nothing reaches is nothing, even where it is not finite.
    reached = tl.where(root[None, :] > 0, values, 0.0).to(tl.float32)
    scaled = (reached * root[None, :]).to(values.dtype)
    if ROUND_TF32:
        values = round_to_tf32(values)
        scaled = round_to_tf32(scaled)
    in_batch = (image < padded_batch)[None, :]
    place = channel.to(tl.int64) * (depth * height * width) + ((d * height + h) * width + w)
    tl.store(weighted + (place * padded_batch)[:, None] + image[None, :], tl.trans(scaled),
             mask=inside[:, None] & in_batch)  # fmt: skip
    pixels = padded_depth * padded_height * padded_width
    place = (channel // together).to(tl.int64) * pixels + pixel
    place = place * together + channel % together
    tl.store(maps + (place * padded_batch)[:, None] + image[None, :], tl.trans(values),
             mask=exists[:, None] & in_batch)  # fmt: skip


def separable_gram(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """The traces of the patch Gram over offsets and over channels, in float32.

    Args:
        x: ``[N, C, *spatial]`` in float32, bfloat16 or float16, any strides.
        geometry: of the convolution.

    Returns:
        ``[G, C/G, C/G]`` and ``[G, K, K]``, symmetric to the last bit. Where two-byte or TF32
        pixels must be weighted, the products are those of weighted pixels rounded to nearest.

    Raises:
        TypeError: another dtype.
    """
    mode = precision_mode(x.dtype)
    groups, offsets, channels = geometry.groups, geometry.offsets, x.shape[1] // geometry.groups
    if x.numel() == 0 or 0 in geometry.output_size(x.shape[2:]):
        shapes = ((groups, channels, channels), (groups, offsets, offsets))
        channel, offset = (x.new_zeros(shape, dtype=torch.float32) for shape in shapes)
        return channel, offset
    if offsets == 1:
        channel = _reached_gram(x, geometry)
        return channel, _traces(channel)
    if channels == 1:
        offset = im2col_gram(x, geometry)
        return _traces(offset), offset
    weighted, maps, most = separable_pack(x, geometry, round_tf32=mode == "tf32")
    pointwise = ConvGeometry((1,), (1,), ((0, 0),), (1,), groups)
    # Every block of maps is a group of one channel: blocks of one group of channels add up.
    of_blocks = ConvGeometry(
        geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, maps.channels
    )
    return (
        packed_gram(weighted, pointwise, mode, scale=most),
        packed_gram(maps, of_blocks, mode, results=groups),
    )


def separable_pack(
    x: Tensor, geometry: ConvGeometry, *, round_tf32: bool = False
) -> tuple[Packed, Packed, float]:
    """``weighted``: ``[C, 1, 1, P, N']``, ``maps``: ``[C/T, D', H', W', T·N']``, and ``max w``.

    Args:
        x: ``[N, C, *spatial]``, not empty, in a dtype of two or four bytes.
        geometry: of the convolution; ``T`` divides its channels per group.
        round_tf32: round float32 to the nearest number that TF32 holds.
    """
    source = pack_source(x, geometry)
    batch, channels, *sizes = source.volume.shape
    padded_batch = source.padded_batch
    line = geometry.output_size(x.shape[2:])[-1] * padded_batch
    together = channels_together(
        channels // geometry.groups, geometry.groups, line, processor(x).count
    )
    weighted = x.new_empty((channels, 1, 1, prod(sizes), padded_batch))
    maps = x.new_empty((channels // together, *source.padded, together * padded_batch))
    counts, most = _counts(geometry, tuple(x.shape[2:]), x.device)
    separable_pack_kernel[(source.blocks,)](
        source.volume, counts, weighted, maps, batch, channels, *sizes, *source.padded,
        *source.before, *source.volume.stride(), source.vectors, together, most,
        CHANNELS_LAST=source.volume.stride(1) == 1, ROUND_TF32=round_tf32, UNIT=source.unit,
        BLOCK_P=BLOCK_POSITIONS, BLOCK_N=BLOCK_BATCH, num_warps=4,
    )  # fmt: skip
    return Packed(weighted, batch), Packed(maps, together * batch), most


@lru_cache(maxsize=512)
def channels_together(channels: int, groups: int, line: int, processors: int) -> int:
    """``T``: the fewest channels that fill lines of ``LEAST_LINE`` places from ``line`` a channel,
    in no more blocks than programs that run at once, since each leaves a partial result."""
    fitting = (
        together
        for together in range(1, channels)
        if channels % together == 0
        and groups * (channels // together) <= 2 * processors
        and together * line >= LEAST_LINE
    )
    return next(fitting, channels)


@lru_cache(maxsize=512)
def _counts(
    geometry: ConvGeometry, sizes: tuple[int, ...], device: torch.device
) -> tuple[Tensor, float]:
    """The pairs that meet each pixel, axis after axis: ``[D + H + W]``; the largest product.

    Made once for a geometry, so that a step waits for no copy to the device.
    """
    axes = [[1]] * (MAX_SPATIAL - geometry.ndim)
    for axis, out in enumerate(geometry.output_size(sizes)):
        axes.append(reach_counts(geometry, axis, sizes[axis], out))
    joined = [float(count) for counts in axes for count in counts]
    most = prod(max(counts) for counts in axes)
    return torch.tensor(joined, dtype=torch.float32, device=device), float(max(most, 1))


def _reached_gram(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Channel Gram of a kernel of one offset: no pixel is met twice, and some are not at all."""
    pixels: tuple[EllipsisType | slice, ...] = (..., *_reached_pixels(geometry, x.shape[2:]))
    reached = x[pixels]
    channels = x.shape[1] // geometry.groups
    if reached.numel() == 0:
        return x.new_zeros((geometry.groups, channels, channels), dtype=torch.float32)
    if geometry.groups == 1:
        return row_gram(reached.movedim(1, -1)).unsqueeze(0)
    axes = geometry.ndim
    ones = (1,) * axes
    return im2col_gram(reached, ConvGeometry(ones, ones, ((0, 0),) * axes, ones, geometry.groups))


def _reached_pixels(geometry: ConvGeometry, sizes: tuple[int, ...]) -> list[slice]:
    outs = geometry.output_size(sizes)
    return [
        slice(-before % stride, max(0, stride * (out - 1) - before + 1), stride)
        for (before, _), stride, out in zip(geometry.padding, geometry.stride, outs, strict=True)
    ]


def _traces(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)


def separable_gram_reference(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """The same in plain torch from the whole patch Gram, in the dtype of ``x`` or float32."""
    offsets = geometry.offsets
    dense = im2col_gram_reference(x, geometry)
    blocks = dense.unflatten(2, (-1, offsets)).unflatten(1, (-1, offsets))
    return torch.einsum("gckdk->gcd", blocks), torch.einsum("gckcl->gkl", blocks)


def offline_cases() -> Iterator[KernelCase]:
    """The pass in both memory formats and each width of element."""
    names = separable_pack_kernel.arg_names
    integers = " ".join(names[names.index("batch") : names.index("most")])
    for dtype, unit in (("bf16", 8), ("fp32", 4)):
        types = argument_types({"i32": integers, f"*{dtype}": "x weighted maps"})
        types |= {"counts": "*fp32", "most": "fp32"}
        for last in (False, True):
            adjacent = "stride_channel" if last else "stride_width"
            constants = {
                "CHANNELS_LAST": last,
                "ROUND_TF32": dtype == "fp32",
                "UNIT": unit,
                "BLOCK_P": BLOCK_POSITIONS,
                "BLOCK_N": BLOCK_BATCH,
            }
            yield KernelCase(
                "separable_pack",
                separable_pack_kernel,
                "channels last" if last else "channels first",
                dtype,
                types | {adjacent: 1},
                constants,
                frozenset(["stride_batch"]),
                4,
                1,
            )
