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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    x = torch.randn(2, 4, 5, 6).to(dtype)
    numbers = [3, 3, 1, 2, 1, 0, 1, 1, 1, 1, 2]
    torch.library.opcheck(torch.ops.kfc_fx.separable_gram, (x, numbers))


def test_channels_last_and_views_give_the_same():
    x = torch.randn(3, 8, 6, 6).double()
    expected = separable_gram(x, (3, 3), padding=1)
    for view in (x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :8]):
        for found, value in zip(separable_gram(view, (3, 3), padding=1), expected, strict=True):
            torch.testing.assert_close(found, value)
