"""The row Gram equals a loop over rows, in any layout."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfc_fx.ops import row_gram
from tests.ops.convolution_cases import DTYPES, sum_of_outer_products


def with_ones(x: torch.Tensor, bias: bool) -> torch.Tensor:
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if bias else rows


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
    st.booleans(),
)
def test_equals_the_loop_over_rows(shape, dtype, start, bias):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    x = x.movedim(start % x.ndim, -1)
    gram = row_gram(x, bias=bias)
    assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = sum_of_outer_products(with_ones(x.double(), bias)).to(gram.dtype)
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 300), (3, 100, 40), (2, 520, 14, 14), (64, 5)])
@pytest.mark.parametrize("channels_first", [False, True])
def test_as_exact_as_torch(shape, dtype, channels_first):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.movedim(1, -1) if channels_first else x
    reference = with_ones(x.double(), True).T @ with_ones(x.double(), True)
    in_torch = with_ones(x, True).T @ with_ones(x, True)
    # Of float64 the reference is one more sum in some order: two part by about the root of the rows.
    rows = x.numel() / x.shape[-1]
    floor = 2 * rows**0.5 * 2**-52 if dtype == torch.float64 else 1e-6
    error = (row_gram(x, bias=True) - reference).abs().max()
    assert error <= 2 * (in_torch - reference).abs().max() + floor * reference.abs().max()


def test_a_convolution_over_no_dimension():
    from kfc_fx.ops import patch_gram

    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(patch_gram(x, (), bias=True)[0], row_gram(x, bias=True))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no dimension"):
        row_gram(torch.tensor(1.0))
    with pytest.raises(ValueError, match="dtypes"):
        row_gram(torch.ones(3, 2, dtype=torch.int32))
