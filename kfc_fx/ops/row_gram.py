"""Gram matrix of rows: the input factor of a linear layer and every output factor."""

from __future__ import annotations

import torch
from torch import Tensor


def row_gram(x: Tensor, *, bias: bool = False) -> Tensor:
    """Sum of outer products of the rows of ``x``.

    Args:
        x: ``[..., C]``; all leading dimensions are rows.
        bias: append the homogeneous coordinate, a constant one, to every row.

    Returns:
        ``[C + bias, C + bias]``; float64 for a float64 input, else float32.
    """
    return torch.ops.kfc_fx.row_gram(x, bias)


@torch.library.custom_op("kfc_fx::row_gram", mutates_args=())
def _row_gram(x: Tensor, bias: bool) -> Tensor:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows = x.reshape(-1, x.shape[-1])
    if bias:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
    return rows.mT @ rows


@_row_gram.register_fake
def _(x: Tensor, bias: bool) -> Tensor:
    side = x.shape[-1] + int(bias)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((side, side), dtype=dtype)
