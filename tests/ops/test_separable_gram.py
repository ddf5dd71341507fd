"""The separable factor equals the partial traces of the dense one, for any geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfc_fx.ops import patch_gram, separable_gram


@st.composite
def convolutions(draw):
    ndim = draw(st.integers(1, 3))
    each = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * ndim))  # noqa: E731
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple((b, a) for b, a in zip(each(0, 2), each(0, 2), strict=True))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [
        max(1, r - sum(p)) + extra for r, p, extra in zip(reach, padding, each(0, 3), strict=True)
    ]
    groups = draw(st.sampled_from([1, 2, 3]))
    channels = groups * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(draw(st.integers(0, 3)), channels, *size, generator=generator).double()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x, kernel, options


def partial_traces(dense: torch.Tensor, offsets: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = dense.unflatten(2, (-1, offsets)).unflatten(1, (-1, offsets))
    return torch.einsum("gckdk->gcd", blocks), torch.einsum("gckcl->gkl", blocks)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(convolutions())
def test_partial_traces_of_the_dense_factor(case):
    x, kernel, options = case
    dense = patch_gram(x, kernel, **options)
    channel, offset = separable_gram(x, kernel, **options)
    expected = partial_traces(dense, torch.tensor(kernel).prod().item())
    torch.testing.assert_close(channel, expected[0])
    torch.testing.assert_close(offset, expected[1])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_one_number_holds_in_every_dimension(dimensions):
    x = torch.randn(2, 4, 6, 7, 5, dtype=torch.float64).flatten(2 + dimensions - 1)
    each = {"stride": 1, "padding": 1, "dilation": 1}
    tuples = {name: (number,) * dimensions for name, number in each.items()}
    found = separable_gram(x, 3, **each)
    for part, expected in zip(found, separable_gram(x, (3,) * dimensions, **tuples), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


def test_channels_last_and_views_give_the_same():
    x = torch.randn(3, 8, 6, 6).double()
    expected = separable_gram(x, (3, 3), padding=1)
    for view in (x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :8]):
        for found, value in zip(separable_gram(view, (3, 3), padding=1), expected, strict=True):
            torch.testing.assert_close(found, value)
