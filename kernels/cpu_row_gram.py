"""Gram matrix of rows in ATen: ``Xᵀ X`` in upper blocks, read where it lies.

A linear layer's input is ``[..., C]`` in row order. The gradient of a convolution's output is the
view ``[N, *out, C]`` of ``[N, C, *out]``: its rows are taken image by image, as columns, and
multiplied there while they are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_symmetric_product import add_upper_gram, mirror_upper, upper_blocks
from kfc_fx.kernels.dtypes import statistic_dtype

BUFFER_ELEMENTS = 2**20
WIDEST_BATCH = 256
NARROW = 128  # BLAS packs rows twice as fast as columns; below this side it shows


def row_gram(x: Tensor, *, bias: bool) -> Tensor:
    """``x``: ``[..., C]`` -> ``[C + bias, C + bias]``."""
    dtype = statistic_dtype(x)
    side, length = x.shape[-1], prod(x.shape[:-1])
    gram = x.new_empty((side + bias, side + bias), dtype=dtype)
    _fill(gram[:side, :side].unsqueeze(0), x, length)
    if bias:
        sums = x.sum(tuple(range(x.ndim - 1)), dtype=dtype) if x.ndim > 1 else x.to(dtype)
        gram[:side, side] = sums
        gram[side, :side] = sums
        gram[side, side] = length
    return gram


def _fill(gram: Tensor, x: Tensor, length: int) -> None:
    if not x.numel():
        gram.zero_()
        return
    if x.dtype == gram.dtype and _multiplies_images(x):
        images = x.flatten(1, -2).mT  # [N, C, L]
        torch.sum(torch.bmm(images, images.mT), 0, out=gram[0])
        return
    blocks = upper_blocks(gram.shape[1], length)
    for number, part in enumerate(_parts(x, gram.dtype)):
        add_upper_gram(gram, part, blocks, fresh=number == 0)
    mirror_upper(gram, blocks)


def _multiplies_images(x: Tensor) -> bool:
    """Whether a batch of products, one for each image where it lies, beats a copy of all rows.

    It does while the products of all images together are no larger than the images.
    """
    if x.ndim < 3 or x.shape[-1] > min(WIDEST_BATCH, prod(x.shape[1:-1])):
        return False
    return not _has_row_order(x) and _has_row_order(x[0])


def _parts(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Factors ``[1, C, L]`` whose products add up, as views where one product can read them."""
    if x.dtype == dtype and (x.ndim < 3 or _has_row_order(x)):
        yield _factor(x.reshape(-1, x.shape[-1]))
        return
    rows = x.reshape(-1, x.shape[-1]) if x.ndim < 3 else x
    for part in rows.split(max(1, BUFFER_ELEMENTS * len(rows) // rows.numel())):
        yield _copied(part, dtype)


def _has_row_order(x: Tensor) -> bool:
    return all(
        x.stride(axis) == x.stride(axis + 1) * x.shape[axis + 1]
        for axis in range(x.ndim - 2)
        if x.shape[axis] > 1
    )


def _factor(rows: Tensor) -> Tensor:
    return rows.T.unsqueeze(0)


def _copied(part: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, ..., C]`` -> ``[1, C, n·L]``: rows where they are rows already, or narrow."""
    side = part.shape[-1]
    if part.stride(-1) == 1 or side <= NARROW:
        rows = part.new_empty(part.shape, dtype=dtype).copy_(part)
        return _factor(rows.view(-1, side))
    columns = part.movedim(-1, 0)
    return columns.new_empty(columns.shape, dtype=dtype).copy_(columns).view(1, side, -1)
