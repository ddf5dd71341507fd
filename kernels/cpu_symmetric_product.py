"""``A Aᵀ`` at little more than half its cost: upper blocks only, then mirror."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# (least side, blocks per side): below the first, the smaller products would be slower
BLOCKS_BY_SIDE = ((4096, 8), (1024, 4), (256, 2), (0, 1))

Range = tuple[int, int]


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """``total[g] += first[g] second[g]ᵀ``: ``[G, a, b]`` from ``[G, a, L]`` and ``[G, b, L]``."""
    groups, rows, columns = total.shape
    if groups > 1 and rows * columns > 1:
        total.baddbmm_(first, second.mT)
    elif groups > 1:
        total += (first * second).sum(2, keepdim=True)
    elif rows * columns > 1:
        total[0].addmm_(first[0], second[0].mT)
    else:
        total += torch.dot(first[0, 0], second[0, 0])


def add_upper_gram(total: Tensor, factor: Tensor) -> None:
    """Add ``A[g] A[g]ᵀ`` to the upper blocks: ``[G, D, D]`` from ``[G, D, L]``, in place."""
    for (top, bottom), (left, right) in upper_blocks(total.shape[1]):
        add_product(total[:, top:bottom, left:right], factor[:, top:bottom], factor[:, left:right])


def mirror_upper(total: Tensor) -> Tensor:
    """Copy the upper blocks to the lower ones, in place; symmetric to the last bit."""
    for (top, bottom), (left, right) in upper_blocks(total.shape[1]):
        block = total[:, top:bottom, left:right]
        if top == left:
            symmetrise(block)
        else:
            total[:, left:right, top:bottom] = block.mT
    return total


def symmetrise(block: Tensor) -> None:
    """Average with the transpose: a product with itself may differ from it in the last bit."""
    block.copy_((block + block.mT) / 2)


def upper_blocks(side: int) -> list[tuple[Range, Range]]:
    """Row and column range of every block on or above the diagonal of a ``[side, side]``."""
    count = next(blocks for least, blocks in BLOCKS_BY_SIDE if side >= least)
    ranges = list(itertools.pairwise(side * i // count for i in range(count + 1)))
    return list(itertools.combinations_with_replacement(ranges, 2))
