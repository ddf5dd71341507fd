# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Device functions that the Gram kernels share: the triangular schedule and the mirrored store.

A symmetric ``D × D`` result is computed in its lower tiles only. Tile number ``t`` is the pair
``(i, j)`` with ``t = i(i+1)/2 + j`` and ``j ≤ i``; what is stored at ``(r, c)`` is also stored at
``(c, r)``, so that the result is symmetric to the last bit.
"""

from __future__ import annotations

import functools
import os

import triton
import triton.language as tl


@functools.cache  # Triton decides when a kernel is defined
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def dot_precision(mode: str) -> str:
    """The ``PRECISION`` argument of a kernel for a precision mode of ``triton_configs``."""
    # The interpreter multiplies the bit patterns of bfloat16, so it must see float32.
    if interpreting():
        return "upcast"
    return "ieee" if mode == "ieee" else "tf32"


@triton.jit
def multiply_add(left, right, accumulator, PRECISION: tl.constexpr):
    """``accumulator + left @ right`` in float32."""
    if PRECISION == "upcast":
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        return tl.dot(left, right, accumulator, input_precision="ieee")
    else:  # noqa: RET505 - the branch is chosen when the kernel is compiled
        return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def lower_tile(number):
    """``(i, j)`` of a lower tile by its number."""
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded; one step either way puts it right for every count below 2^24.
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def store_mirrored(out, values, row, column, side, leading):
    """Store the part of ``values`` on and below the diagonal, and its mirror image.

    ``row`` and ``column`` broadcast to the shape of ``values``.
    """
    inside = (row < side) & (column < side)
    wide_row = row.to(tl.int64)
    wide_column = column.to(tl.int64)
    tl.store(out + wide_row * leading + column, values, mask=inside & (row >= column))
    tl.store(out + wide_column * leading + row, values, mask=inside & (row > column))


@triton.jit
def store_border(out, sums, columns, side, leading, corner):
    """Store the homogeneous coordinate's row and column, and the count in its corner."""
    values = tl.where(columns == side, corner, sums)
    last = (columns * 0 + side).to(tl.int64) * leading
    tl.store(out + last + columns, values, mask=columns <= side)
    tl.store(out + columns.to(tl.int64) * leading + side, values, mask=columns < side)


@triton.jit
def _store_half(out, values, row, column, side, leading):
    # 32-bit offsets; the launcher sees to their range.
    inside = (row < side) & (column < side)
    tl.store(out + (row * leading + column), values, mask=inside & (row >= column))
    tl.store(out + (column * leading + row), values, mask=inside & (row > column))


@triton.jit
def emit_tile(out, values, number, tile_row, tile_column, side, leading, scale,
              BLOCK: tl.constexpr, DIRECT: tl.constexpr):  # fmt: skip
    """Write one tile of ``[BLOCK, BLOCK]``: to its places in the result, or as a partial sum.

    A partial sum goes to ``out[number]`` whole, with no mask, for the second reduction.
    """
    within = tl.arange(0, BLOCK)
    if DIRECT:
        # In two halves: the addresses of a whole tile in two layouts do not fit in registers.
        half: tl.constexpr = BLOCK // 2
        pair = (values * scale).reshape(BLOCK, 2, half).permute(0, 2, 1)
        left, right = tl.split(pair)
        row = (tile_row * BLOCK + within)[:, None]
        column = (tile_column * BLOCK + tl.arange(0, half))[None, :]
        _store_half(out, left, row, column, side, leading)
        _store_half(out, right, row, column + half, side, leading)
    else:
        tile = out + tl.cast(number, tl.int64) * (BLOCK * BLOCK)
        tl.store(tile + within[:, None] * BLOCK + within[None, :], values)


@triton.jit
def emit_sums(out, partial, values, columns, part, padded_side, side, leading, scale, corner,
              DIRECT: tl.constexpr):  # fmt: skip
    """Write column sums: as the border of the result, or as a partial sum ``partial[part]``."""
    if DIRECT:
        store_border(out, values * scale, columns, side, leading, corner)
    else:
        tl.store(partial + tl.cast(part, tl.int64) * padded_side + columns, values)
