"""``A Aᵀ`` at little more than half its cost: upper blocks only, then mirror."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_matmul import goes_to_onednn, matmul, onednn_is_faster

# (least side, blocks per side): narrower blocks would multiply too slowly. oneDNN is the faster
# the wider they are, and of rows takes copies of their columns.
BLOCKS_BY_SIDE = ((4096, 8), (1024, 4), (256, 2), (0, 1))
ONEDNN_BLOCKS_BY_SIDE = ((4096, 8), (1024, 2), (0, 1))
NARROW = 128
LEAST_SPLIT = 1024
PIECES = 8
LEAST_LENGTH = 192  # with a shorter sum, mirroring costs more than the blocks save

Range = tuple[int, int]
Block = tuple[Range, Range]


def add_product(total: Tensor, first: Tensor, second: Tensor, *, fresh: bool = False) -> None:
    """``total[g] += first[g] second[g]ᵀ``: ``[G, a, b]`` from ``[G, a, L]`` and ``[G, b, L]``.

    ``fresh`` sets ``total``, which may be uninitialised, instead of adding to it.
    """
    groups, rows, columns = total.shape
    kept = 0 if fresh else 1
    if rows * columns == 1:
        products = _dots(first, second)
        total[:, 0, 0] = products if fresh else products + total[:, 0, 0]
    elif groups == 1 and max(rows, columns) <= NARROW and first.shape[2] >= LEAST_SPLIT:
        _add_in_pieces(total[0], first[0], second[0], kept)
    elif groups == 1 and goes_to_onednn(first, second.mT):
        product = matmul(first, second.mT)  # it has no form that adds to what is there
        total.copy_(product) if fresh else total.add_(product)
    elif groups == 1:
        total[0].addmm_(first[0], second[0].mT, beta=kept)
    else:
        total.baddbmm_(first, second.mT, beta=kept)


def _add_in_pieces(total: Tensor, first: Tensor, second: Tensor, kept: int) -> None:
    """A narrow product with a long sum as a batch of shorter ones: one call runs at a fraction of
    the speed, because BLAS packs long operands and divides the result among threads."""
    length = first.shape[1] // PIECES
    (high, long), (wide, other) = first.stride(), second.stride()
    rows = first.as_strided((PIECES, len(first), length), (length * long, high, long))
    columns = second.as_strided((PIECES, length, len(second)), (length * other, other, wide))
    products = torch.bmm(rows, columns)
    if kept:
        total += products.sum(0)
    else:
        torch.sum(products, 0, out=total)
    rest = length * PIECES
    if rest < first.shape[1]:
        total.addmm_(first[:, rest:], second[:, rest:].mT)


def _dots(first: Tensor, second: Tensor) -> Tensor:
    if len(first) == 1:
        return torch.dot(first[0, 0], second[0, 0])
    return (first * second).sum((1, 2))


def add_upper_gram(
    total: Tensor, factor: Tensor, blocks: Sequence[Block], *, fresh: bool = False
) -> None:
    """Add ``A[g] A[g]ᵀ`` to some blocks: ``[G, D, D]`` from ``[G, D, L]``, in place."""
    for (top, bottom), (left, right) in blocks:
        block = total[:, top:bottom, left:right]
        add_product(block, factor[:, top:bottom], factor[:, left:right], fresh=fresh)


def mirror_upper(total: Tensor, blocks: Sequence[Block]) -> None:
    """Copy the blocks above the diagonal to those below, in place."""
    for (top, bottom), (left, right) in blocks:
        if top != left:
            total[:, left:right, top:bottom] = total[:, top:bottom, left:right].mT


def upper_blocks(side: int, length: int) -> list[Block]:
    """Rows and columns of every block on or above the diagonal, for sums over ``length`` rows."""
    by_side = ONEDNN_BLOCKS_BY_SIDE if onednn_is_faster() else BLOCKS_BY_SIDE
    count = next(blocks for least, blocks in by_side if side >= least)
    count = count if length >= LEAST_LENGTH else 1
    ranges = list(itertools.pairwise(side * i // count for i in range(count + 1)))
    return list(itertools.combinations_with_replacement(ranges, 2))
