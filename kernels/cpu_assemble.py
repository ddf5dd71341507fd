"""Ω from its slots, and the slots' place in one flat tensor.

Per group the flat form is ``[J·c² products | B·c sums | N·T]``, the last two only with a bias:
products ``P[j]: [c, c]``, the sums of x over each distinct reach of an offset, and the number of
patches. All of it is linear in the data, so it adds up over micro-batches and takes an EMA.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.products import Product, ProductPlan

CHUNK_ELEMENTS = 2**17
LEAST_ROWS = 16  # the columns of transposed products are read by cache lines


def pack_slots(products: Tensor, sums: Tensor | None, patches: int) -> Tensor:
    """``[J, G, c, c]`` and, with a bias, ``[G, B, c]`` -> ``[G, numbers]``."""
    parts = [products.transpose(0, 1).flatten(1)]
    if sums is not None:
        parts.append(sums.flatten(1))
        parts.append(sums.new_full((sums.shape[0], 1), patches))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()


def reach_sums(x: Tensor, plan: ProductPlan, stride: tuple[int, ...], groups: int) -> Tensor:
    """Sums of ``x``: ``[N, C, *spatial]`` over the images and each reach: ``[G, B, C/G]``."""
    total = x.sum(0, dtype=statistic_dtype(x))
    sums = [
        _box(total, plan.slots[slot], stride)
        .flatten(1)
        .sum(1)
        .unflatten(0, (groups, x.shape[1] // groups))
        for slot in plan.reaches
    ]
    return torch.stack(sums, dim=1)


def _box(total: Tensor, product: Product, stride: tuple[int, ...]) -> Tensor:
    ranges = [
        slice(axis.phase + step * axis.start, axis.phase + step * axis.stop, step)
        for axis, step in zip(product, stride, strict=True)
    ]
    return total[(slice(None), *ranges)]


def assemble_slots(slots: Tensor, plan: ProductPlan, channels: int, bias: bool) -> Tensor:
    """``[G, numbers]`` -> ``[G, D, D]`` with ``D = c·K + bias``."""
    groups, offsets = slots.shape[0], len(plan.slot_of_pair)
    split = len(plan.slots) * channels**2
    products = slots[:, :split].unflatten(1, (len(plan.slots), channels, channels))
    side = channels * offsets
    omega = slots.new_empty((groups, side + bias, side + bias))
    _fill_blocks(omega[:, :side, :side], products, plan)
    if bias:
        fill_bias(
            omega,
            slots[:, split:-1].unflatten(1, (len(plan.reaches), channels)),
            slots[:, -1],
            plan,
        )
    return omega


def fill_bias(omega: Tensor, sums: Tensor, patches: Tensor | int, plan: ProductPlan) -> None:
    """The last row and column of Ω from the reach sums ``[G, B, c]`` and the number of patches."""
    columns = sums[:, list(plan.reach_of_offset)].mT.flatten(1)
    omega[:, :-1, -1] = columns
    omega[:, -1, :-1] = columns
    omega[:, -1, -1] = patches


def _fill_blocks(omega: Tensor, products: Tensor, plan: ProductPlan) -> None:
    """Gather the blocks of a few rows in cache, then interleave them with the offsets."""
    groups, _, channels, _ = products.shape
    offsets = len(plan.slot_of_pair)
    if channels == 1:  # nothing to interleave
        slots = torch.tensor(plan.slot_of_pair, device=products.device).view(1, -1)
        chosen = torch.gather(products.flatten(1), 1, slots.expand(groups, -1))
        omega.copy_(chosen.view(groups, offsets, offsets))
        return
    sources = torch.tensor(block_sources(plan), device=products.device)
    blocks = omega.unflatten(2, (channels, offsets)).unflatten(1, (channels, offsets))
    rows = max(LEAST_ROWS, CHUNK_ELEMENTS // max(1, groups * offsets**2 * channels))
    for start in range(0, channels, rows):
        both = _with_transposes(products, start, min(start + rows, channels))
        part = both.index_select(1, sources).unflatten(1, (offsets, offsets))  # [G, K, K', c, c']
        blocks[:, start : start + rows] = part.permute(0, 3, 1, 4, 2)


def _with_transposes(products: Tensor, start: int, stop: int) -> Tensor:
    """A few rows of every product, then of its transpose: ``[G, 2·J, stop - start, c]``."""
    groups, slots, channels, _ = products.shape
    both = products.new_empty((groups, 2 * slots, stop - start, channels))
    both[:, :slots] = products[:, :, start:stop]
    both[:, slots:] = products[:, :, :, start:stop].mT
    return both


@lru_cache(maxsize=512)
def block_sources(plan: ProductPlan) -> tuple[int, ...]:
    """Per block in row order, its index among the slots followed by their transposes.

    Blocks below the diagonal are transposes of those above.
    """
    return tuple(
        slot + (len(plan.slots) if i > j else 0)
        for i, row in enumerate(plan.slot_of_pair)
        for j, slot in enumerate(row)
    )
