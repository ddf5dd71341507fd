"""Gram matrix of rows: the input factor of a linear layer and every output factor."""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.kernels import cpu_row_gram
from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.ops.convolution import check_dtype
from kfc_fx.ops.library import define


def row_gram(x: Tensor, *, bias: bool = False) -> Tensor:
    """Sum of outer products of the rows of ``x``: ``Σ_r x_r x_rᵀ``.

    Args:
        x: ``[..., C]``; all leading dimensions are rows. float32, float64, bfloat16 or float16,
            of any strides.
        bias: append the homogeneous coordinate, a constant one, to every row.

    Returns:
        ``[C + bias, C + bias]``; float64 for a float64 input, else float32.

    Raises:
        ValueError: ``x`` has no dimension, or another dtype.
    """
    if x.ndim == 0:
        raise ValueError("x must be [..., C]; it has no dimension")
    check_dtype(x)
    return torch.ops.kfc_fx.row_gram.default(x, bias)


def _on_any_device(x: Tensor, bias: bool) -> Tensor:
    return cpu_row_gram.row_gram(x, bias=bias)


def _fake(x: Tensor, bias: bool) -> Tensor:
    side = x.shape[-1] + int(bias)
    return x.new_empty((side, side), dtype=statistic_dtype(x))


define("row_gram(Tensor x, bool bias) -> Tensor", _on_any_device, _fake)
