# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Ω from its slots: one gather, one write.

    Ω[(c, i), (c', j)] = P[slot(i, j)][c, c']   for i ≤ j,     P[slot(i, j)][c', c]   for i > j

``slots`` is ``[G, numbers]`` as ``cpu_assemble`` lays it out, ``J·c²`` products, then with a bias
the sums over each reach and the number of patches; Ω is ``[G, c·K + bias, c·K + bias]``. Every
number of Ω is a place in ``slots``, so the border is part of the same gather.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kfc_fx.kernels.products import ProductPlan
from kfc_fx.kernels.triton_case import KernelCase, argument_types

BLOCK_ROWS = 16
BLOCK_COLUMNS = 128
WARPS = 8


@triton.jit
def assemble_kernel(
    slots, omega, pairs, reaches, channels, offsets, numbers, split, leading,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid ``[row blocks, column blocks, G]``.

    ``pairs`` is ``[K, K]`` int32, the slot of each pair; ``reaches`` is ``[K]`` int32.
    """
    group = tl.cast(tl.program_id(2), tl.int64)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    side = channels * offsets
    inside = (row < leading) & (column < leading)
    c, i = row // offsets, row % offsets
    d, j = column // offsets, column % offsets
    in_product = (row < side) & (column < side)
    slot = tl.load(pairs + i * offsets + j, mask=in_product, other=0).to(tl.int64)
    place = (slot * channels + tl.where(i > j, d, c)) * channels + tl.where(i > j, c, d)
    # On the border the channel and the offset are those of the coordinate that is not the bias.
    channel, offset = tl.where(row < side, c, d), tl.where(row < side, i, j)
    on_border = (row < side) != (column < side)
    reach = tl.load(reaches + offset + row * 0 + column * 0, mask=on_border, other=0).to(tl.int64)
    border = tl.where(on_border, split + reach * channels + channel, numbers - 1)
    place = tl.where(in_product, place, border)
    values = tl.load(slots + group * numbers + place, mask=inside)
    target = omega + group * leading * leading
    tl.store(target + row.to(tl.int64) * leading + column, values, mask=inside)


def assemble(slots: Tensor, plan: ProductPlan, channels: int, bias: bool) -> Tensor:
    """``[G, numbers]`` -> ``[G, D, D]`` with ``D = channels·K + bias``, in float32.

    Args:
        slots: float32, as ``cpu_assemble.pack_slots`` lays them out, contiguous.
        plan: of the convolution that they belong to.
        channels: per group.
    """
    groups, numbers = slots.shape
    offsets = len(plan.slot_of_pair)
    leading = channels * offsets + int(bias)
    omega = slots.new_empty((groups, leading, leading))
    if omega.numel() == 0:
        return omega
    grid = (-(-leading // BLOCK_ROWS), -(-leading // BLOCK_COLUMNS), groups)
    assemble_kernel[grid](
        slots.contiguous(), omega, *_tables(plan, slots.device), channels, offsets, numbers,
        len(plan.slots) * channels**2, leading,
        BLOCK_M=BLOCK_ROWS, BLOCK_N=BLOCK_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return omega


@lru_cache(maxsize=512)
def _tables(plan: ProductPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(plan.slot_of_pair, dtype=torch.int32, device=device),
        torch.tensor(plan.reach_of_offset, dtype=torch.int32, device=device),
    )


def assemble_reference(slots: Tensor, plan: ProductPlan, channels: int, bias: bool) -> Tensor:
    """The same in plain torch, block by block."""
    offsets = len(plan.slot_of_pair)
    side, split = channels * offsets, len(plan.slots) * channels**2
    omega = slots.new_zeros((slots.shape[0], side + int(bias), side + int(bias)))
    products = slots[:, :split].unflatten(1, (-1, channels, channels))
    for i, row in enumerate(plan.slot_of_pair):
        for j, slot in enumerate(row):
            block = products[:, slot].mT if i > j else products[:, slot]
            omega[:, i:side:offsets, j:side:offsets] = block
    if bias:
        sums = slots[:, split:-1].unflatten(1, (-1, channels))
        for i, reach in enumerate(plan.reach_of_offset):
            omega[:, i:side:offsets, side] = omega[:, side, i:side:offsets] = sums[:, reach]
        omega[:, side, side] = slots[:, -1]
    return omega


def offline_cases() -> Iterator[KernelCase]:
    """The one configuration."""
    types = argument_types(
        {
            "*fp32": "slots omega",
            "*i32": "pairs reaches",
            "i32": "channels offsets numbers split leading",
        }
    )
    constants = {"BLOCK_M": BLOCK_ROWS, "BLOCK_N": BLOCK_COLUMNS}
    divisible = frozenset(["channels", "split"])
    yield KernelCase("assemble", assemble_kernel, "", "fp32", types, constants, divisible, WARPS, 1)
