"""Gram matrices of rows that stand one group after the other, such as the tokens of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.ops.convolution import check_dtype
from kfc_fx.ops.library import define
from kfc_fx.ops.row_gram import row_gram


def grouped_row_gram(x: Tensor, ends: Tensor, *, bias: bool = False) -> Tensor:
    """Sum of outer products of the rows of each group.

    Args:
        x: ``[S, C]``, the rows of group 0, then those of group 1, and so on. Rows behind the last
            end count for no group. float32, float64, bfloat16 or float16, of any strides.
        ends: ``[groups]`` integers that do not fall: where each group's rows end.
        bias: append the homogeneous coordinate, a constant one, to every row.

    Returns:
        ``[groups, C + bias, C + bias]``; float64 for a float64 input, else float32. Zeros for a
        group without rows.

    Raises:
        ValueError: ``x`` is no matrix, ``ends`` no vector, or ``x`` of another dtype.
    """
    if x.ndim != 2 or ends.ndim != 1:
        raise ValueError(
            f"x must be [S, C] and ends [groups], got {list(x.shape)} and {list(ends.shape)}"
        )
    check_dtype(x)
    return torch.ops.kfc_fx.grouped_row_gram.default(x, ends, bias)


def _on_any_device(x: Tensor, ends: Tensor, bias: bool) -> Tensor:
    # The numbers of rows are data; reading them waits for the device once.
    grams, start = [], 0
    for end in ends.tolist():
        grams.append(row_gram(x[start:end], bias=bias))
        start = end
    return torch.stack(grams)


def _fake(x: Tensor, ends: Tensor, bias: bool) -> Tensor:
    side = x.shape[-1] + int(bias)
    return x.new_empty((ends.shape[0], side, side), dtype=statistic_dtype(x))


define("grouped_row_gram(Tensor x, Tensor ends, bool bias) -> Tensor", _on_any_device, _fake)
