# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gram matrix of a convolution's patches, which are never formed: an implicit-im2col SYRK.

    Ω[g] = Σ_n Σ_t [[a]]_{n,t} [[a]]_{n,t}ᵀ,     Ω: [G, C/G·|Δ| + bias, C/G·|Δ| + bias]

It takes every geometry; the structured kernel takes fewer products where it applies. ``a`` is
packed with the batch innermost (``triton_pack``). Entry ``(c, δ)`` of the patch at location ``t``
of image ``n`` is then at

    address(c, δ, t, n) = base(c, δ) + line(t) + run(t_w, n)

a sum of a term for each row of the operand tile, one scalar for each output line and one term for
each place along K, where K runs over ``(t_w, n)`` within an output line. Nothing in the loop
depends on a row and a place at once, and every load is 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.triton_case import KernelCase, argument_types, gram_cases
from kfc_fx.kernels.triton_configs import (
    SYMMETRIC,
    GramConfig,
    default_splits,
    default_symmetric,
    fit_stages,
    precision_mode,
    processor,
)
from kfc_fx.kernels.triton_pack import VECTOR_BYTES, Packed, pack
from kfc_fx.kernels.triton_patch_walk import (
    PatchWalk,
    line_place,
    patch_entry,
    patch_walk,
    run_place,
)
from kfc_fx.kernels.triton_split_reduction import (
    SymmetricOutput,
    lower_tiles,
    reduce_splits,
    symmetric_output,
)
from kfc_fx.kernels.triton_symmetric import (
    dot_precision,
    emit_sums,
    emit_tile,
    lower_tile,
    multiply_add,
)


@triton.jit
def im2col_gram_kernel(
    x, target, sums, side, leading, tiles, steps, steps_per_part, steps_per_line,
    batch_vectors, group_step, channel_step, depth_step, height_step, width_step,
    kernel_depth, kernel_height, kernel_width, out_height, out_width,
    line_depth, line_height, stride_width, padded_side, scale, corner,
    HAS_BIAS: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
    STRIDED: tl.constexpr, EVEN_K: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid ``[tiles + border blocks, parts, G]``; steps count places ``BLOCK_K`` at a time."""
    number = tl.program_id(0)
    part = tl.program_id(1)
    group = tl.cast(tl.program_id(2), tl.int64)
    part_of_group = group * tl.num_programs(1) + part
    first = part * steps_per_part
    last = tl.minimum(first + steps_per_part, steps)
    padded_batch = batch_vectors * UNIT
    length = out_width * padded_batch
    skipped = (stride_width - 1) * padded_batch
    within = tl.arange(0, BLOCK)
    x += group * group_step * padded_batch
    if DIRECT:
        target += group * leading * leading
    if number < tiles:
        i, j = lower_tile(number)
        rows = i * BLOCK + within
        columns = j * BLOCK + within
        left = x + padded_batch * patch_entry(
            rows, channel_step, depth_step, height_step, width_step,
            kernel_depth, kernel_height, kernel_width)[:, None]  # fmt: skip
        right = x + padded_batch * patch_entry(
            columns, channel_step, depth_step, height_step, width_step,
            kernel_depth, kernel_height, kernel_width)[None, :]  # fmt: skip
        row_exists = (rows < side)[:, None]
        column_exists = (columns < side)[None, :]
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for step in range(first, last):
            line = line_place(step, steps_per_line, out_height, line_depth, line_height)
            run, place = run_place(step, steps_per_line, padded_batch, skipped, STRIDED, BLOCK_K)
            line *= padded_batch
            if EVEN_K:
                a = tl.load(left + line + place[None, :], mask=row_exists, other=0.0)
                b = tl.load(right + line + place[:, None], mask=column_exists, other=0.0)
            else:
                here = run < length
                a = tl.load(
                    left + line + place[None, :], mask=row_exists & here[None, :], other=0.0
                )
                b = tl.load(right + line + place[:, None], mask=column_exists & here[:, None],
                            other=0.0)  # fmt: skip
            total = multiply_add(a, b, total, PRECISION)
        emit_tile(target, total, part_of_group * tiles + number, i, j, side, leading, scale,
                  BLOCK, DIRECT)  # fmt: skip
    elif HAS_BIAS:
        columns = (number - tiles) * BLOCK + within
        pointers = x + padded_batch * patch_entry(
            columns, channel_step, depth_step, height_step, width_step,
            kernel_depth, kernel_height, kernel_width)[:, None]  # fmt: skip
        border = tl.zeros((BLOCK,), tl.float32)
        for step in range(first, last):
            line = line_place(step, steps_per_line, out_height, line_depth, line_height)
            run, place = run_place(step, steps_per_line, padded_batch, skipped, STRIDED, BLOCK_K)
            mask = (columns < side)[:, None] & (run < length)[None, :]
            values = tl.load(pointers + line * padded_batch + place[None, :], mask=mask, other=0.0)
            border += tl.sum(values.to(tl.float32), axis=1)
        emit_sums(target, sums, border, columns, part_of_group, padded_side, side, leading, scale,
                  corner, DIRECT)  # fmt: skip


def im2col_gram(
    x: Tensor,
    geometry: ConvGeometry,
    *,
    bias: bool = False,
    config: GramConfig | None = None,
) -> Tensor:
    """Gram matrix of the patches of ``x``, in float32.

    Args:
        x: ``[N, C, *spatial]`` in float32, bfloat16 or float16, any strides.
        geometry: of the convolution.
        bias: give every patch a last entry of one.
        config: tile sizes; by default chosen for the shape.

    Returns:
        ``[G, D, D]`` with ``D = C/G·|Δ| + bias``, symmetric to the last bit.

    Raises:
        TypeError: another dtype.
    """
    mode = precision_mode(x.dtype)
    side = x.shape[1] // geometry.groups * geometry.offsets
    locations = x.shape[0] * prod(geometry.output_size(x.shape[2:]))
    if x.numel() == 0 or locations == 0:
        return _without_products(x, geometry.groups, side, locations, bias)
    packed = pack(x, geometry, round_tf32=mode == "tf32")
    return packed_gram(packed, geometry, mode, bias=bias, corner=float(locations), config=config)


def packed_gram(
    packed: Packed,
    geometry: ConvGeometry,
    mode: str,
    *,
    results: int | None = None,
    bias: bool = False,
    scale: float = 1.0,
    corner: float = 0.0,
    config: GramConfig | None = None,
) -> Tensor:
    """Gram matrices of the patches of a packed map, in float32.

    Args:
        packed: with the zeros of the padding in it, rounded as ``mode`` wants it.
        geometry: of the convolution; every group of channels gives one Gram matrix.
        mode: of ``precision_mode``.
        results: the Gram matrices of ``groups / results`` groups after each other are added up;
            by default none are.
        bias, config: as for :func:`im2col_gram`.
        scale: factor of the result, but for its last entry with a bias.
        corner: that last entry: ``scale`` times the number of patches.

    Returns:
        ``[results, D, D]``.
    """
    groups = geometry.groups
    results = results or groups
    device = processor(packed.buffer)
    side = packed.channels // groups * geometry.offsets
    config = fit_stages(
        config or default_symmetric(side, mode), packed.buffer.element_size(), device.shared_bytes
    )
    walk = patch_walk(packed, geometry)
    steps_per_line = -(-walk.out[2] * packed.padded_batch // config.block_k)
    steps = walk.lines * steps_per_line
    tiles = lower_tiles(side, config.block_m) * groups
    steps_per_part = -(-steps // default_splits(config, tiles, steps, device.count))
    parts = -(-steps // steps_per_part) * (groups // results)
    output = symmetric_output(packed.buffer, results, side, config.block_m, parts, bias)
    schedule = (steps, steps_per_part, steps_per_line)
    _launch(packed, walk, output, groups, config, mode, schedule, scale, corner)
    return reduce_splits(output, scale, corner)


def _launch(
    packed: Packed,
    walk: PatchWalk,
    output: SymmetricOutput,
    groups: int,
    config: GramConfig,
    mode: str,
    schedule: tuple[int, int, int],
    scale: float,
    corner: float,
) -> None:
    parts = output.parts * output.groups // groups
    grid = (output.tiles + output.border_blocks, parts, groups)
    group_step = packed.channels // groups * walk.channel_step
    im2col_gram_kernel[grid](
        packed.buffer, output.target, output.sums, output.side, output.leading, output.tiles,
        *schedule, packed.padded_batch // packed.unit, group_step, walk.channel_step,
        *walk.offset_steps, *walk.kernel, walk.out[1], walk.out[2], *walk.line_steps,
        walk.stride_width, output.padded_side, scale, corner,
        HAS_BIAS=output.bias, DIRECT=output.direct, PRECISION=dot_precision(mode),
        STRIDED=walk.stride_width > 1, UNIT=packed.unit,
        EVEN_K=walk.out[2] * packed.padded_batch % config.block_k == 0,
        BLOCK=config.block_m, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _without_products(x: Tensor, groups: int, side: int, locations: int, bias: bool) -> Tensor:
    result = x.new_zeros((groups, side + bias, side + bias), dtype=torch.float32)
    if bias:
        result[:, -1, -1] = locations
    return result


def im2col_gram_reference(x: Tensor, geometry: ConvGeometry, *, bias: bool = False) -> Tensor:
    """The same in plain torch with the patches formed, in the dtype of ``x`` or float32."""
    pads = [pad for pair in reversed(geometry.padding) for pad in pair]
    padded = F.pad(x.to(statistic_dtype(x)), pads)
    out = geometry.output_size(x.shape[2:])
    views = [
        padded[_reached(offset, out, geometry)]
        for offset in product(*map(range, geometry.kernel_size))
    ]
    patches = torch.stack(views, 2)  # [N, C, K, *out]
    patches = patches.unflatten(1, (geometry.groups, -1)).movedim(1, 0)
    patches = patches.movedim((2, 3), (-2, -1))  # [G, N, *out, C/G, K]
    side = x.shape[1] // geometry.groups * geometry.offsets
    rows = patches.reshape(geometry.groups, x.shape[0] * prod(out), side)
    if bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    return rows.mT @ rows


def _reached(
    offset: tuple[int, ...], out: tuple[int, ...], geometry: ConvGeometry
) -> tuple[Any, ...]:
    """Index of what one kernel offset reaches of ``[N, C, *spatial]``."""
    steps = zip(offset, geometry.dilation, out, geometry.stride, strict=True)
    return (
        ...,
        *(
            slice(at * dilation, at * dilation + stride * (size - 1) + 1 if size else 0, stride)
            for at, dilation, size, stride in steps
        ),
    )


def offline_cases() -> Iterator[KernelCase]:
    """With strides and ends to mask, and with neither."""
    names = im2col_gram_kernel.arg_names
    integers = " ".join(names[names.index("side") : names.index("scale")])
    types = argument_types({"i32": integers, "fp32": "scale corner", "*fp32": "target sums"})
    for mode in SYMMETRIC:
        unit = VECTOR_BYTES // (2 if mode == "half" else 4)
        common = {"HAS_BIAS": True, "UNIT": unit}
        variants = {
            "even split": (types, common | {"STRIDED": False, "EVEN_K": True, "DIRECT": False}),
            "strided direct": (types, common | {"STRIDED": True, "EVEN_K": False, "DIRECT": True}),
        }
        only = {name: SYMMETRIC[name] if name == mode else () for name in SYMMETRIC}
        yield from gram_cases(
            "im2col_gram", im2col_gram_kernel, only, variants, frozenset(["side"])
        )
