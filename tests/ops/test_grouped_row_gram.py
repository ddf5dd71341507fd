"""Grams of groups of rows equal a loop over rows; the op is registered as tracing needs it."""

from __future__ import annotations

import pytest
import torch

from kfc_fx.ops import grouped_row_gram
from tests.ops.convolution_cases import DTYPES, sum_of_outer_products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ends", [[3, 7, 9], [0, 9, 9], [2, 2, 5], [0, 0, 0], [9]])
def test_equals_the_loop_over_rows(dtype, bias, ends):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[ends[-1] :] = float("nan")  # rows behind the last end are nobody's
    grams = grouped_row_gram(x, torch.tensor(ends, dtype=torch.int32), bias=bias)
    assert grams.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grams.shape == (len(ends), 4 + bias, 4 + bias)
    for gram, start, end in zip(grams, [0, *ends], ends, strict=False):
        rows = torch.cat([x[start:end].double(), torch.ones(end - start, int(bias))], 1)
        expected = sum_of_outer_products(rows).to(gram.dtype)
        torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, ends = torch.randn(9, 4).to(dtype), torch.tensor([3, 3, 8])
    torch.library.opcheck(torch.ops.kfc_fx.grouped_row_gram, (x, ends, True))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"x must be \[S, C\] and ends \[groups\]"):
        grouped_row_gram(torch.ones(2, 3, 4), torch.tensor([2]))
    with pytest.raises(ValueError, match="dtypes"):
        grouped_row_gram(torch.ones(3, 2, dtype=torch.int32), torch.tensor([3]))
