# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gram matrix of rows on the tensor cores.

    G = Xᵀ X,    X: [B·R, C], or [B·R, C + 1] with a last column of ones

``X`` is read where it lies, as ``[B, R, C]`` with any strides: the rows of a linear layer's input,
or the locations of an ``NCHW`` gradient, without a copy; but for TF32, which must be rounded.
Only the tiles on and below the diagonal are multiplied; each is stored twice. The ones are never
read: their products are column sums, made by programs of the same launch. With few tiles the rows
are cut into parts, which ``triton_split_reduction`` adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import LINEAR, conv_geometry
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
from kfc_fx.kernels.triton_pack import VECTOR_BYTES, pack
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

LEAST_PACKED_BATCH = 16
ONE_AXIS = conv_geometry((1,))


@triton.jit
def row_gram_kernel(
    x, target, sums, rows, side, leading, tiles, steps, steps_per_part, steps_per_batch,
    stride_batch, stride_row, stride_column, padded_side, corner,
    HAS_BIAS: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid ``[tiles + border blocks, parts]``; a step is ``BLOCK_K`` rows of one batch entry."""
    number = tl.program_id(0)
    part = tl.program_id(1)
    first = part * steps_per_part
    last = tl.minimum(first + steps_per_part, steps)
    within = tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_K)
    if number < tiles:
        i, j = lower_tile(number)
        left_column = i * BLOCK + within
        right_column = j * BLOCK + within
        left = x + left_column.to(tl.int64)[:, None] * stride_column + row[None, :] * stride_row
        right = x + right_column.to(tl.int64)[None, :] * stride_column + row[:, None] * stride_row
        left_inside = (left_column < side)[:, None]
        right_inside = (right_column < side)[None, :]
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for step in range(first, last):
            start = (step % steps_per_batch) * BLOCK_K
            offset = tl.cast(step // steps_per_batch, tl.int64) * stride_batch
            offset += tl.cast(start, tl.int64) * stride_row
            here = start + row < rows
            a = tl.load(left + offset, mask=left_inside & here[None, :], other=0.0)
            b = tl.load(right + offset, mask=right_inside & here[:, None], other=0.0)
            total = multiply_add(a, b, total, PRECISION)
        emit_tile(target, total, part * tiles + number, i, j, side, leading, 1.0, BLOCK, DIRECT)
    elif HAS_BIAS:
        columns = (number - tiles) * BLOCK + within
        pointers = x + columns.to(tl.int64)[None, :] * stride_column + row[:, None] * stride_row
        inside = (columns < side)[None, :]
        border = tl.zeros((BLOCK,), tl.float32)
        for step in range(first, last):
            start = (step % steps_per_batch) * BLOCK_K
            offset = tl.cast(step // steps_per_batch, tl.int64) * stride_batch
            offset += tl.cast(start, tl.int64) * stride_row
            here = (start + row < rows)[:, None]
            values = tl.load(pointers + offset, mask=inside & here, other=0.0)
            border += tl.sum(values.to(tl.float32), axis=0)
        emit_sums(target, sums, border, columns, part, padded_side, side, leading, 1.0, corner,
                  DIRECT)  # fmt: skip


@dataclass(frozen=True)
class RowLayout:
    """``x`` as ``[batches, rows, columns]`` with element strides; ``x`` may be a copy."""

    x: Tensor
    batches: int
    rows: int
    stride_batch: int
    stride_row: int
    stride_column: int


def row_gram(x: Tensor, *, bias: bool = False, config: GramConfig | None = None) -> Tensor:
    """``XᵀX`` in float32.

    Args:
        x: ``[..., C]`` in float32, bfloat16 or float16; all leading dimensions are rows.
        bias: give every row a last entry of one.
        config: tile sizes; by default chosen for the shape.

    Returns:
        ``[C + bias, C + bias]``, symmetric to the last bit.

    Raises:
        TypeError: another dtype.
    """
    mode = precision_mode(x.dtype)
    side = x.shape[-1]
    if x.numel() == 0:
        return _without_products(x, bias)
    layout = rounded_layout(x) if mode == "tf32" else row_layout(x)
    device = processor(x)
    config = config or default_symmetric(side, mode)
    config = fit_stages(config, x.element_size(), device.shared_bytes)
    steps_per_batch = -(-layout.rows // config.block_k)
    steps = layout.batches * steps_per_batch
    parts = default_splits(config, lower_tiles(side, config.block_m), steps, device.count)
    steps_per_part = -(-steps // parts)
    parts = -(-steps // steps_per_part)
    output = symmetric_output(x, 1, side, config.block_m, parts, bias)
    corner = float(prod(x.shape[:-1]))
    _launch(layout, output, config, mode, (steps, steps_per_part, steps_per_batch), corner)
    return reduce_splits(output, 1.0, corner)[0]


def row_layout(x: Tensor) -> RowLayout:
    """Merge the leading dimensions of ``[..., C]`` into at most two, copying if it must.

    It copies where more than two remain, or where the kernel could read one element at a time
    only: neither columns nor rows adjacent, or adjacent but not aligned.
    """
    merged = _merge_leading(x)
    if merged.ndim > 3 or not _aligned(merged):
        merged = x.contiguous().reshape(1, -1, x.shape[-1])
    while merged.ndim < 3:
        merged = merged.unsqueeze(0)
    batches, rows, _ = merged.shape
    return RowLayout(merged, batches, rows, *merged.stride())


def rounded_layout(x: Tensor) -> RowLayout:
    """A copy of ``x``, ``[..., C]`` in float32, rounded to TF32 and with its rows adjacent.

    The tensor cores truncate, which would bias every square downwards; and they want TF32
    operands along K. One pass over ``x`` gives both. Rows of zeros may follow.
    """
    merged = _merge_leading(x)
    if merged.ndim == 3 and merged.shape[0] >= LEAST_PACKED_BATCH:
        packed = pack(merged.movedim(-1, 1), ONE_AXIS, round_tf32=True)
    else:
        rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        packed = pack(rows, LINEAR, round_tf32=True)
    rows_in_all = packed.buffer[0].numel()
    return RowLayout(packed.buffer, 1, rows_in_all, 0, 1, rows_in_all)


def row_gram_reference(x: Tensor, *, bias: bool = False) -> Tensor:
    """The same in plain torch, in the dtype of ``x`` or float32, whichever is wider."""
    wide = x.to(statistic_dtype(x))
    rows = wide.reshape(prod(x.shape[:-1]), x.shape[-1])
    if bias:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
    return rows.mT @ rows


def offline_cases() -> Iterator[KernelCase]:
    """Both layouts, with and without a second reduction, in every configuration."""
    strides = "stride_batch stride_row stride_column"
    integers = "rows side leading tiles steps steps_per_part steps_per_batch padded_side"
    types = argument_types(
        {"i32": f"{integers} {strides}", "fp32": "corner", "*fp32": "target sums"}
    )
    variants = {
        f"{layout} {'direct' if direct else 'split'}": (
            types | {adjacent: 1},
            {"HAS_BIAS": True, "DIRECT": direct},
        )
        for layout, adjacent in (("columns", "stride_column"), ("rows", "stride_row"))
        for direct in (False, True)
    }
    divisible = frozenset(f"rows side {strides}".split())
    return gram_cases("row_gram", row_gram_kernel, SYMMETRIC, variants, divisible)


def _launch(
    layout: RowLayout,
    output: SymmetricOutput,
    config: GramConfig,
    mode: str,
    schedule: tuple[int, int, int],
    corner: float,
) -> None:
    grid = (output.tiles + output.border_blocks, output.parts)
    row_gram_kernel[grid](
        layout.x, output.target, output.sums, layout.rows, output.side, output.leading,
        output.tiles, *schedule, layout.stride_batch, layout.stride_row, layout.stride_column,
        output.padded_side, corner,
        HAS_BIAS=output.bias, DIRECT=output.direct, PRECISION=dot_precision(mode),
        BLOCK=config.block_m, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _without_products(x: Tensor, bias: bool) -> Tensor:
    side = x.shape[-1] + int(bias)
    result = x.new_zeros((side, side), dtype=torch.float32)
    if bias:
        result[-1, -1] = prod(x.shape[:-1])
    return result


def _merge_leading(x: Tensor) -> Tensor:
    """Join each leading dimension to the next where their strides allow a view."""
    sizes, strides = [1], [0]
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes[-1] == 1:
            sizes[-1], strides[-1] = size, stride
        elif strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    return x.as_strided((*sizes, x.shape[-1]), (*strides, x.stride(-1)))


def _aligned(merged: Tensor) -> bool:
    *outer, row, column = merged.stride()
    if column != 1 and row != 1:
        return False
    unit = max(1, VECTOR_BYTES // merged.element_size())
    others = [*outer, row if column == 1 else column]
    return column == 1 or all(stride % unit == 0 for stride in others)
