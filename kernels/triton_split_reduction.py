# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Second reduction of a Gram matrix whose K loop was cut into parts.

    out[g] = scale · mirror( Σ_s partial[g, s] ),        border[g] = scale · Σ_s sums[g, s]

``partial`` is ``[G, S, tiles, B, B]`` with the lower tiles in the order of
``triton_symmetric.lower_tile``, ``sums`` is ``[G, S, padded]`` (column sums, where the result has
the homogeneous coordinate), ``out`` is ``[G, D + bias, D + bias]``. The parts are added in one
fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfc_fx.kernels.triton_case import KernelCase, argument_types
from kfc_fx.kernels.triton_configs import SYMMETRIC
from kfc_fx.kernels.triton_symmetric import lower_tile, store_border, store_mirrored

ROWS = 8
PARTS_AT_ONCE = 8
DIRECT_SIDE = 46_340  # its square is below 2^31: tiles are stored with 32-bit offsets


@triton.jit
def split_reduction_kernel(
    partial, sums, out, tiles, parts, side, leading, padded_side, scale, corner,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid ``[tiles · BLOCK / ROWS + border blocks, G]``."""
    program = tl.program_id(0)
    group = tl.cast(tl.program_id(1), tl.int64)
    strips: tl.constexpr = BLOCK // ROWS
    number = program // strips
    out += group * leading * leading
    part = tl.arange(0, PARTS)
    within = tl.arange(0, BLOCK)
    if number < tiles:
        first = (program % strips) * ROWS + tl.arange(0, ROWS)
        stride = tl.cast(tiles, tl.int64) * (BLOCK * BLOCK)
        tile = partial + group * parts * stride + tl.cast(number, tl.int64) * (BLOCK * BLOCK)
        places = first[None, :, None] * BLOCK + within[None, None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, parts, PARTS):
            index = (start + part)[:, None, None]
            values = tl.load(tile + index * stride + places, mask=index < parts, other=0.0)
            total += tl.sum(values, axis=0)
        tile_row, tile_column = lower_tile(number)
        row = (tile_row * BLOCK + first)[:, None]
        column = (tile_column * BLOCK + within)[None, :]
        store_mirrored(out, total * scale, row, column, side, leading)
    elif HAS_BIAS:
        columns = (program - tiles * strips) * BLOCK + within
        border = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, parts, PARTS):
            index = (start + part)[:, None]
            places = (group * parts + index) * padded_side + columns[None, :]
            border += tl.sum(tl.load(sums + places, mask=index < parts, other=0.0), axis=0)
        store_border(out, border * scale, columns, side, leading, corner)


@dataclass(frozen=True)
class SymmetricOutput:
    """Where the programs of a Gram kernel write: the result, or partial sums of it.

    ``target`` is ``out`` itself with one part of a result of usual size, else
    ``[G, S, tiles, B, B]``; ``sums`` is ``[G, S, padded]`` where there is a bias and ``target``
    is not ``out``.
    """

    out: Tensor
    target: Tensor
    sums: Tensor
    side: int
    block: int
    parts: int
    bias: bool

    @property
    def direct(self) -> bool:
        """Whether the programs write the result itself."""
        return self.target is self.out

    @property
    def groups(self) -> int:
        """Number of independent results."""
        return self.out.shape[0]

    @property
    def leading(self) -> int:
        """Row length of the result."""
        return self.side + int(self.bias)

    @property
    def tiles(self) -> int:
        """Number of lower tiles."""
        return lower_tiles(self.side, self.block)

    @property
    def border_blocks(self) -> int:
        """Number of column blocks of the homogeneous coordinate, its corner included."""
        return -(-self.leading // self.block) if self.bias else 0

    @property
    def padded_side(self) -> int:
        """Row length of ``sums``."""
        return self.border_blocks * self.block


def lower_tiles(side: int, block: int) -> int:
    """Number of ``block × block`` tiles on and below the diagonal."""
    rows = -(-side // block)
    return rows * (rows + 1) // 2


def symmetric_output(
    like: Tensor, groups: int, side: int, block: int, parts: int, bias: bool
) -> SymmetricOutput:
    """Allocate, unfilled, the result and its partial sums."""
    leading = side + int(bias)
    out = like.new_empty((groups, leading, leading), dtype=torch.float32)
    if parts == 1 and leading <= DIRECT_SIDE:
        return SymmetricOutput(out, out, out, side, block, parts, bias)
    tiles = lower_tiles(side, block)
    target = out.new_empty((groups, parts, tiles, block, block))
    border = -(-leading // block) * block
    sums = out.new_empty((groups, parts, border)) if bias else out
    return SymmetricOutput(out, target, sums, side, block, parts, bias)


def reduce_splits(output: SymmetricOutput, scale: float, corner: float) -> Tensor:
    """Add the parts up and return ``output.out``; nothing to do where it was written directly."""
    if output.direct:
        return output.out
    strips = output.tiles * (output.block // ROWS)
    split_reduction_kernel[(strips + output.border_blocks, output.groups)](
        output.target, output.sums, output.out, output.tiles, output.parts, output.side,
        output.leading, output.padded_side, scale, corner,
        HAS_BIAS=output.bias, BLOCK=output.block, ROWS=ROWS, PARTS=PARTS_AT_ONCE, num_warps=4,
    )  # fmt: skip
    return output.out


def offline_cases() -> Iterator[KernelCase]:
    """Every tile size of the symmetric kernels."""
    types = argument_types(
        {
            "i32": "tiles parts side leading padded_side",
            "fp32": "scale corner",
            "*fp32": "partial sums out",
        }
    )
    blocks = sorted({config.block_m for configs in SYMMETRIC.values() for config in configs})
    for block in blocks:
        constants = {"HAS_BIAS": True, "BLOCK": block, "ROWS": ROWS, "PARTS": PARTS_AT_ONCE}
        yield KernelCase(
            "split_reduction",
            split_reduction_kernel,
            f"{block}",
            "fp32",
            types,
            constants,
            frozenset(["padded_side"]),
            4,
            1,
        )


def split_reduction_reference(output: SymmetricOutput, scale: float, corner: float) -> Tensor:
    """The same in plain torch."""
    total = output.target.sum(1) * scale
    result = torch.zeros_like(output.out)
    block, side = output.block, output.side
    number = 0
    padded = -(-side // block) * block
    full = total.new_zeros(output.groups, padded, padded)
    for i in range(padded // block):
        for j in range(i + 1):
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            full[:, rows, columns] = total[:, number]
            number += 1
    lower = full[:, :side, :side].tril()
    result[:, :side, :side] = lower + lower.tril(-1).mT
    if output.bias:
        border = output.sums.sum(1)[:, :side] * scale
        result[:, side, :side] = border
        result[:, :side, side] = border
        result[:, side, side] = corner
    return result
